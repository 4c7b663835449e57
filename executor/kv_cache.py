"""The key-value cache of this rank's layers, in blocks, and where each slot's tokens lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.layer_cache import LayerCache


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

    def first_seen(self, window: int) -> int:
        """The first position that the chunk's first token sees through a window, 0 for none."""
        return max(0, self.start + 1 - window) if window else 0

    def seen_locs(self, window: int) -> slice | torch.Tensor:
        """`kv_locs` from `first_seen` on."""
        first = self.first_seen(window)
        if isinstance(self.kv_locs, slice):
            return slice(self.kv_locs.start + first, self.kv_locs.stop)
        return self.kv_locs[first:]


class CacheShape(NamedTuple):
    """What a cache of any number of blocks looks like on this rank."""

    num_layers: int  # of the stage
    block_size: int
    kv_heads_local: int
    head_dim: int
    dtype: torch.dtype  # of the stored numbers

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers of the stage."""
        return 2 * self.num_layers * self.block_size * self.kv_heads_local * self.head_dim * self.dtype.itemsize


class KVScales(NamedTuple):
    """The scales of one layer of an fp8 cache, as LayerCache has them: [kv_heads_local] fp32 each."""

    keys: torch.Tensor
    values: torch.Tensor


class KVCache:
    """The keys and values of the stage's layers: `layers[i]` is the stage's layer i.

    The last location is the dummy slot's: padding rows write there. On a CPU the tensors are views of
    [kv_heads_local, num_locs, head_dim]: there a head is read alone, and 1.5 to 2 times as fast if it is contiguous.
    """

    def __init__(
        self, shape: CacheShape, num_blocks: int, device: torch.device, scales: Sequence[KVScales] | None = None
    ) -> None:
        """scales: of an fp8 cache, one pair a layer."""
        self.num_locs = num_blocks * shape.block_size + 1
        heads, head_dim, dtype = shape.kv_heads_local, shape.head_dim, shape.dtype

        def allocate() -> torch.Tensor:
            if device.type == "cpu":
                return torch.empty(heads, self.num_locs, head_dim, dtype=dtype).transpose(0, 1)
            return torch.empty(self.num_locs, heads, head_dim, dtype=dtype, device=device)

        self.layers = [
            LayerCache(allocate(), allocate(), *(scales[layer] if scales else ())) for layer in range(shape.num_layers)
        ]
        self.dtype = dtype
        self.block_size = shape.block_size
        self.device = device
