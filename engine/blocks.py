"""Which blocks of the key-value cache belong to whom. Numbers only: no tensors, no torch."""

from __future__ import annotations


class BlockAllocator:
    """Hands out block ids, consecutive ones where it can: the CPU reads a run of blocks without a copy."""

    def __init__(self, num_blocks: int) -> None:
        self._used = bytearray(num_blocks)
        self.num_free = num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int] | None:
        """`count` block ids, or None (and nothing taken) where fewer are free."""
        if count > self.num_free:
            return None
        start = self._used.find(bytes(count))
        if start >= 0:
            block_ids = list(range(start, start + count))
        else:
            block_ids = []
            position = -1
            while len(block_ids) < count:
                position = self._used.index(0, position + 1)
                block_ids.append(position)
        for block_id in block_ids:
            self._used[block_id] = 1
        self.num_free -= count
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back; freeing a free block is a bug and asserts."""
        for block_id in block_ids:
            assert self._used[block_id], f"block {block_id} is free already"
            self._used[block_id] = 0
        self.num_free += len(block_ids)
