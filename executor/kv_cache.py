"""The key-value cache of this rank's layers, in blocks, and where each slot's tokens lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.decode_attention import DecodeMetadata
from kernels.store_kv import store_kv

__all__ = ["DecodeMetadata", "KVCache", "LayerCache", "PrefillChunk"]


@dataclass(frozen=True)
class PrefillChunk:
    """One request's part of a step: rows [first_row, first_row + length) of the batch, and its cache kv_locs.

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
        store_kv(key, value, self.keys, self.values, kv_locs)


class KVCache:
    """The keys and values of the stage's layers: `layers[i]` is the stage's layer i.

    The last location is the dummy slot's: padding rows write there.
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
        shape = (num_blocks * block_size + 1, kv_heads_local, head_dim)
        self.layers = [
            LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))) for _ in range(num_layers)
        ]
        self.block_size = block_size
        self.device = device

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, kv_heads_local: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block over all layers of the stage."""
        return 2 * num_layers * block_size * kv_heads_local * head_dim * dtype.itemsize
