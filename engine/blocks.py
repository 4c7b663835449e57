"""Allocates the blocks of the KV cache. Numbers only: no torch."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

_MOST_EVICTED = 1 / 16  # of all blocks, for a sequence's room: it may end long before it needs them


def block_keys(token_ids: Sequence[int], block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each full block of a text's tokens; known: the keys of its first blocks.

    Keys and values depend on the tokens of the block and on all before it, and on nothing else. So a key is the digest
    of the block's tokens and of the key before it, long enough that no two texts ever have the same.
    """
    keys = list(known)
    key = keys[-1] if keys else b""
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        key = blake2b(key + array("i", token_ids[start : start + block_size]).tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class BlockAllocator:
    """Hands out block ids, consecutive ones if possible: a CPU reads a run of blocks without a copy.

    A block may have several owners: the samples or beams of one request share the prompt's blocks, and requests share
    those that begin with the same tokens. A block is free again when its last owner frees it. A free block that was
    given a key (`keep`) keeps its content until the room is needed: those that were freed first go first, and of one
    text the last ones.
    """

    def __init__(self, num_blocks: int) -> None:
        self._is_used = bytearray(num_blocks)  # 0: free, and nothing is kept in it
        self._num_owners = [0] * num_blocks
        self._cursor = 0  # behind the room of the last sequence that was placed
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # free ones with a key, the next to go first
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
        start = self._hole(max(count, room))
        if start < 0:
            room = max(count, min(room, int(self.num_blocks * _MOST_EVICTED)))
            self._evict(room)
            start = self._hole(room, count)
        block_ids = list(range(start, start + count)) if start >= 0 else self._scattered(count)
        self._take(block_ids)
        return block_ids

    def extend(self, last_id: int, count: int, room: int = 0) -> list[int] | None:
        """As `allocate`, if possible the blocks that follow `last_id`."""
        block_ids = list(range(last_id + 1, last_id + 1 + count))
        if block_ids[-1] < self.num_blocks and not any(self._is_used[block_ids[0] : block_ids[-1] + 1]):
            self._take(block_ids)
            return block_ids
        return self.allocate(count, room)

    def share(self, block_ids: list[int]) -> list[int]:
        """Add an owner to each block, which has one or keeps its content; returns the blocks."""
        for block_id in block_ids:
            assert self._is_used[block_id], f"block {block_id} is free"
            if self._num_owners[block_id] == 0:
                del self._idle[block_id]
                self.num_free -= 1
            self._num_owners[block_id] += 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Remove an owner from each block of a text. Asserts that the block is not free."""
        for block_id in reversed(block_ids):
            assert self._num_owners[block_id], f"block {block_id} is free already"
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id] == 0:
                self.num_free += 1
                if block_id in self._key_of:
                    self._idle[block_id] = None
                else:
                    self._is_used[block_id] = 0

    def keep(self, block_id: int, key: bytes) -> None:
        """Let a block's content be found by its key, from now on and after it was freed; one block has each key."""
        assert self._num_owners[block_id], f"block {block_id} is free"
        if key not in self._by_key and block_id not in self._key_of:
            self._by_key[key] = block_id
            self._key_of[block_id] = key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the first keys, up to the first one that no block has."""
        found = []
        for key in keys:
            block_id = self._by_key.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_owned(self, block_ids: list[int]) -> int:
        """How many of the blocks are not free."""
        return sum(self._num_owners[block_id] > 0 for block_id in block_ids)

    def _evict(self, count: int) -> None:
        """Forget what is kept until `count` blocks are free and keep nothing, or all free ones."""
        while self._idle and self.num_free - len(self._idle) < count:
            block_id, _ = self._idle.popitem(last=False)
            del self._by_key[self._key_of.pop(block_id)]
            self._is_used[block_id] = 0

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
