"""The key-value cache of this rank's layers, in blocks, and where each slot's tokens lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels.store_kv import store_kv


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


class DecodeMetadata(NamedTuple):
    """Rows of one new token each, as kernels.decode_attention takes them."""

    table: torch.Tensor  # [slots, max_seq_len] int32
    slots: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    workspace: torch.Tensor


class LayerCache(NamedTuple):
    """Keys and values of one layer. A storage format adds its fields here; signatures stay."""

    keys: torch.Tensor  # [num_blocks · block_size + 1, kv_heads_local, head_dim]
    values: torch.Tensor  # as keys

    def write(self, key: torch.Tensor, value: torch.Tensor, kv_locs: torch.Tensor) -> None:
        """Store new tokens: key and value [tokens, kv_heads_local, head_dim], at kv_locs [tokens] int64."""
        store_kv(key, value, self.keys, self.values, kv_locs)


class KVCache:
    """The keys and values of the stage's layers: `layers[i]` is the stage's layer i.

    The last location is a dummy: padding rows write there. With `num_slots`, `table`
    [slots + 1, max_seq_len] int32 has every slot's kv_locs for kernels, and in its last row that place.
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
        num_slots: int = 0,
        max_seq_len: int = 0,
    ) -> None:
        shape = (num_blocks * block_size + 1, kv_heads_local, head_dim)
        self.layers = [
            LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))) for _ in range(num_layers)
        ]
        self.block_size = block_size
        self.device = device
        self.table = None
        if num_slots:
            size = (num_slots + 1, max_seq_len)
            self.table = torch.full(size, num_blocks * block_size, dtype=torch.int32, device=device)
        self._places: dict[int, np.ndarray] = {}  # slot -> flat cache position of each of its tokens
        self._run_len: dict[int, int] = {}  # slot -> how many of its first positions follow one another

    @staticmethod
    def bytes_per_block(
        num_layers: int, block_size: int, kv_heads_local: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block over all layers of the stage."""
        return 2 * num_layers * block_size * kv_heads_local * head_dim * dtype.itemsize

    def assign(self, slot: int, block_ids: list[int]) -> None:
        """Give a slot its blocks; whatever it had before is forgotten."""
        self._set(slot, self._places_in(block_ids))
        self._upload(slot)

    def fork(self, slot: int, parent: int, length: int, block_ids: list[int]) -> None:
        """Let a slot read the first `length` tokens where `parent` has them; its own blocks hold what follows."""
        self._set(slot, np.concatenate([self._places[parent][:length], self._places_in(block_ids)]))
        self._upload(slot)

    def reorder(self, slots: list[int], parents: list[int], length: int) -> None:
        """Let each slot go on from the first `length` tokens of its parent, in place of its own.

        Nothing is copied but indices: a slot writes each token to a place of its own, which no other slot ever
        writes, so what beams share stays as it is (FasterTransformer's cache_indirection does the same).
        """
        histories = [self._places[parent][:length].copy() for parent in parents]
        for slot, history in zip(slots, histories, strict=True):
            kv_locs = self._places[slot]
            kv_locs[:length] = history
            self._set(slot, kv_locs)
        if self.table is not None:
            index = torch.tensor([slots, parents]).to(self.device, non_blocking=True)
            self.table[index[0], :length] = self.table[index[1], :length]

    def kv_locs(self, slot: int, start: int, length: int) -> np.ndarray:
        """The flat cache positions of the slot's tokens [start, start + length)."""
        return self._places[slot][start : start + length]

    def chunk(self, slot: int, first_row: int, start: int, length: int) -> PrefillChunk:
        """Describe a slot's tokens [start, start + length), which are the batch's rows from `first_row`."""
        kv_len = start + length
        kv_locs = self._places[slot][:kv_len]
        if kv_len <= self._run_len[slot]:
            return PrefillChunk(first_row, length, kv_len, slice(int(kv_locs[0]), int(kv_locs[0]) + kv_len))
        return PrefillChunk(first_row, length, kv_len, torch.from_numpy(kv_locs).to(self.device))

    def _places_in(self, block_ids: list[int]) -> np.ndarray:
        first = np.asarray(block_ids, dtype=np.int64) * self.block_size
        return (first[:, None] + np.arange(self.block_size)).ravel()

    def _set(self, slot: int, kv_locs: np.ndarray) -> None:
        breaks = np.flatnonzero(np.diff(kv_locs) != 1)
        self._places[slot] = kv_locs
        self._run_len[slot] = int(breaks[0]) + 1 if len(breaks) else len(kv_locs)

    def _upload(self, slot: int) -> None:
        if self.table is not None:
            kv_locs = self._places[slot]
            count = min(len(kv_locs), self.table.shape[1])
            self.table[slot, :count] = torch.from_numpy(kv_locs[:count].astype(np.int32)).to(
                self.device, non_blocking=True
            )
