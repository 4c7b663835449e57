"""Which blocks of the key-value cache belong to whom. Numbers only: no tensors, no torch."""

from __future__ import annotations


class BlockAllocator:
    """Hands out block ids, consecutive ones where it can: the CPU reads a run of blocks without a copy.

    A block may have several owners (the samples or beams of one prompt share the prompt's): it is free again when
    the last one frees it.
    """

    def __init__(self, num_blocks: int) -> None:
        self._is_used = bytearray(num_blocks)
        self._num_owners = [0] * num_blocks
        self.num_free = num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._is_used)

    def allocate(self, count: int) -> list[int] | None:
        """`count` block ids, or None (and nothing taken) where fewer are free."""
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
        """Make blocks in use belong to one owner more; returns them."""
        for block_id in block_ids:
            assert self._is_used[block_id], f"block {block_id} is free"
            self._num_owners[block_id] += 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give up one ownership of each; freeing a free block is a bug and asserts."""
        for block_id in block_ids:
            assert self._is_used[block_id], f"block {block_id} is free already"
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id] == 0:
                self._is_used[block_id] = 0
                self.num_free += 1
