"""The key-value cache of this rank's layers, in blocks, and where each slot's tokens lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class PrefillChunk:
    """One request's part of a step without kernels: rows [first_row, first_row + length), and its cache kv_locs.

    `kv_locs` are the positions of its tokens [0, kv_len) in the flat cache: a slice where its blocks follow
    one another (read without a copy), otherwise an index tensor.
    """

    first_row: int
    length: int
    kv_len: int
    kv_locs: slice | torch.Tensor

    @property
    def start(self) -> int:
        return self.kv_len - self.length


class LayerCache(NamedTuple):
    """Keys and values of one layer. A storage format adds its fields here; signatures stay."""

    keys: torch.Tensor  # [num_blocks · block_size + 1, kv_heads_local, head_dim]
    values: torch.Tensor  # as keys

    def write(self, key: torch.Tensor, value: torch.Tensor, kv_locs: torch.Tensor) -> None:
        """Store new tokens: key and value [tokens, kv_heads_local, head_dim], at kv_locs [tokens] int64."""
        self.keys[kv_locs] = key
        self.values[kv_locs] = value


class KVCache:
    """The keys and values of the stage's layers: `layers[i]` is the stage's layer i.

    The last location is the dummy slot's: padding rows write there. On a CPU the tensors are views of
    [kv_heads_local, num_locs, head_dim]: there a head is read alone, and 1.5 to 2 times as fast if it is contiguous.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads_local: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_locs = num_blocks * block_size + 1

        def allocate() -> torch.Tensor:
            if device.type == "cpu":
                return torch.empty(kv_heads_local, self.num_locs, head_dim, dtype=dtype).transpose(0, 1)
            return torch.empty(self.num_locs, kv_heads_local, head_dim, dtype=dtype, device=device)

        self.layers = [LayerCache(allocate(), allocate()) for _ in range(num_layers)]
        self.block_size = block_size
        self.device = device

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, kv_heads_local: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block over all layers of the stage."""
        return 2 * num_layers * block_size * kv_heads_local * head_dim * dtype.itemsize
