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
        self._cursor = 0  # behind the room of the last sequence that was placed
        self.num_free = num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._is_used)

    def allocate(self, count: int, room: int = 0) -> list[int] | None:
        """`count` block ids, if possible at the start of `room` free ones, into which the sequence can grow.

        The next call looks behind that room first. Returns None, and takes nothing, if fewer than `count` are free.
        """
        if count > self.num_free:
            return None
        start = self._hole(max(count, room), count)
        block_ids = list(range(start, start + count)) if start >= 0 else self._scattered(count)
        self._take(block_ids)
        return block_ids

    def extend(self, last_id: int, count: int) -> list[int] | None:
        """As `allocate`, if possible the blocks that follow `last_id`."""
        block_ids = list(range(last_id + 1, last_id + 1 + count))
        if block_ids[-1] < self.num_blocks and not any(self._is_used[block_ids[0] : block_ids[-1] + 1]):
            self._take(block_ids)
            return block_ids
        return self.allocate(count)

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

    def _hole(self, *sizes: int) -> int:
        """The first of so many free blocks in a row, of the first size that there is; -1: there is none."""
        for size in sizes:
            for begin in (self._cursor, 0):
                start = self._is_used.find(bytes(size), begin)
                if start >= 0:
                    self._cursor = start + size
                    return start
        return -1

    def _scattered(self, count: int) -> list[int]:
        block_ids: list[int] = []
        position = -1
        while len(block_ids) < count:
            position = self._is_used.index(0, position + 1)
            block_ids.append(position)
        return block_ids

    def _take(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._is_used[block_id] = 1
            self._num_owners[block_id] = 1
        self.num_free -= len(block_ids)
