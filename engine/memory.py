"""Slots and blocks of running sequences: what a request takes, how it grows, what it gives back."""

from __future__ import annotations

from collections.abc import Iterable

from engine.blocks import BlockAllocator
from engine.plan import NewSequences
from engine.request import Request
from engine.sequence import NO_SLOT, Sequence, SequenceGroup

_LOOK_AHEAD = 3  # blocks beyond the one that a sequence needs, where there are plenty
_PLENTY = 2  # times as many blocks are free as all running sequences would take with their look-ahead


class SequenceMemory:
    """Gives blocks on demand: to a request for its known tokens and one more, then to its sequences as they grow.

    A request enters only if half a block for each sequence that runs stays free (the watermark), so that those can
    grow for block_size / 2 steps. Where blocks are plenty, a sequence gets several at once, so that few plans carry
    new blocks; `take_back` takes those that are not needed yet.
    """

    def __init__(self, num_slots: int, block_size: int, num_blocks: int) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self.blocks = BlockAllocator(num_blocks)
        self._free_slots = list(reversed(range(num_slots)))
        self._has_spare = False  # some sequence may hold blocks that it does not need yet

    @property
    def num_sequences(self) -> int:
        """Sequences that have slots."""
        return self.num_slots - len(self._free_slots)

    def most_blocks(self, request: Request) -> int:
        """The blocks that a request has at its longest."""
        # The last sampled token is never computed, so its keys and values need no place.
        new_tokens = request.sampling.max_new_tokens - 1
        first = self._blocks_for(len(request.prompt_ids) + new_tokens)
        return first + self._blocks_for(new_tokens) * (request.sampling.width - 1)

    def admit(self, group: SequenceGroup) -> NewSequences | None:
        """Give a group its slots, and blocks for its tokens; None if it must wait for them."""
        sequences, request = group.sequences, group.request
        if len(sequences) > len(self._free_slots):
            return None
        num_tokens = min(sequences[0].num_tokens, group.max_tokens - 1)
        counts = [self._blocks_for(num_tokens - (group.prompt_len if i else 0)) for i in range(len(sequences))]
        if sum(counts) + self.num_sequences // 2 > self.blocks.num_free:
            return None
        for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            sequence.first_own = group.prompt_len if index else 0
            has_tokens = index == 0 or bool(group.output_ids(sequence))
            sequence.num_computed = sequence.first_own if has_tokens else sequence.num_tokens - 1
            sequence.seq_slot = self._free_slots.pop()
            room = self._blocks_for(group.max_tokens - 1 - sequence.first_own)
            sequence.block_ids = self._allocated(self.blocks.allocate(count, room))
            if index:
                prompt_blocks = sequences[0].block_ids[: self._blocks_for(group.prompt_len)]
                sequence.shared_ids = self.blocks.share(prompt_blocks)
        self._measure(group)
        group.is_running = True
        words = request.words
        return NewSequences(
            [sequence.seq_slot for sequence in sequences],
            request.prompt_ids,
            request.sampling,
            request.end_ids,
            [sequence.block_ids[:] for sequence in sequences],
            words.always_banned if words is not None else [],
            [group.output_ids(sequence)[:] for sequence in sequences] if group.is_resumed else [],
            [sequence.index for sequence in sequences],
        )

    def grow(self, group: SequenceGroup) -> list[tuple[int, int, list[int]]] | None:
        """Blocks for the next token of each of a group's sequences, as engine.plan.Plan has them.

        Returns None, and gives none, if there are too few.
        """
        full = [sequence for sequence in group.sequences if sequence.num_tokens > self._end(sequence)]
        num_free = self.blocks.num_free
        if len(full) > num_free:
            return None
        is_plenty = num_free > _PLENTY * (1 + _LOOK_AHEAD) * self.num_sequences
        grown = []
        for sequence in full:
            end = self._end(sequence)
            count = min(1 + _LOOK_AHEAD, self._blocks_for(group.max_tokens - 1 - end)) if is_plenty else 1
            if sequence.block_ids:
                block_ids = self._allocated(self.blocks.extend(sequence.block_ids[-1], count))
            else:
                block_ids = self._allocated(self.blocks.allocate(count))
            sequence.block_ids += block_ids
            grown.append((sequence.seq_slot, end, block_ids))
            self._has_spare |= count > 1
        self._measure(group)
        return grown

    def take_back(self, groups: Iterable[SequenceGroup]) -> bool:
        """Free the blocks that running groups do not need yet; returns whether there were any."""
        if not self._has_spare:
            return False
        self._has_spare = False
        num_free = self.blocks.num_free
        for group in groups:
            for sequence in group.sequences:
                needed = self._blocks_for(min(sequence.num_tokens, group.max_tokens - 1) - sequence.first_own)
                if needed < len(sequence.block_ids):
                    self.blocks.free(sequence.block_ids[needed:])
                    del sequence.block_ids[needed:]
            self._measure(group)
        return self.blocks.num_free > num_free

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slot and blocks."""
        self._free_slots.append(sequence.seq_slot)
        self.blocks.free(sequence.block_ids)
        self.blocks.free(sequence.shared_ids)
        sequence.seq_slot, sequence.block_ids, sequence.shared_ids = NO_SLOT, [], []

    def _measure(self, group: SequenceGroup) -> None:
        group.capacity = min(self._end(sequence) for sequence in group.sequences)

    def _end(self, sequence: Sequence) -> int:
        """The first position that its blocks have no place for."""
        return sequence.first_own + len(sequence.block_ids) * self.block_size

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @staticmethod
    def _allocated(block_ids: list[int] | None) -> list[int]:
        assert block_ids is not None, "as many blocks were free"
        return block_ids
