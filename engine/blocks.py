"""Allocates the blocks of the KV cache. Numbers only: no torch."""

from __future__ import annotations


class BlockAllocator:
    """Hands out block ids, consecutive ones if possible: a CPU reads a run of blocks without a copy.

    A block may have several owners: the samples or beams of one request share the prompt's blocks. A block is free
    again when its last owner frees it.
    """

    def __init__(self, num_blocks: int) -> None:
        self._is_used = bytearray(num_blocks)
        self._num_owners = [0] * num_blocks
        self.num_free = num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._is_used)

    def allocate(self, count: int) -> list[int] | None:
        """`count` block ids. Returns None, and takes nothing, if fewer are free."""
        if count > self.num_free:
            return None
        start = self._is_used.find(bytes(count))
        if start >= 0:
            block_ids = list(range(start, start + count))
        else:
            block_ids = []
            position = -1
            while len(block_ids) < count:
                position = self._is_used.index(0, position + 1)
                block_ids.append(position)
        for block_id in block_ids:
            self._is_used[block_id] = 1
            self._num_owners[block_id] = 1
        self.num_free -= count
        return block_ids

    def share(self, block_ids: list[int]) -> list[int]:
        """Add an owner to each block; returns the blocks."""
        for block_id in block_ids:
            assert self._is_used[block_id], f"block {block_id} is free"
            self._num_owners[block_id] += 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Remove an owner from each block. Asserts that the block is not free."""
        for block_id in block_ids:
            assert self._is_used[block_id], f"block {block_id} is free already"
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id] == 0:
                self._is_used[block_id] = 0
                self.num_free += 1
