"""Slots and blocks of running sequences: what a request takes, how it grows, what it gives back."""

from __future__ import annotations

from collections.abc import Iterable

from engine.blocks import BlockAllocator, block_keys
from engine.plan import NewSequences
from engine.request import ParameterError, Request
from engine.sequence import NO_SLOT, Sequence, SequenceGroup

_LOOK_AHEAD = 3  # blocks beyond the one that a sequence needs, where there are plenty
_PLENTY = 2  # times as many blocks are free as all running sequences would take with their look-ahead


def watermark(num_running: int) -> int:
    """Blocks that stay free when a request enters, so that those that run can grow for block_size / 2 steps."""
    return num_running // 2


def most_blocks(num_sequences: int, max_seq_len: int, block_size: int) -> int:
    """As many as are of use: no request waits for blocks, if each of num_sequences is as long as it may be."""
    return num_sequences * -(-max_seq_len // block_size) + watermark(num_sequences)


class SequenceMemory:
    """Gives blocks on demand: to a request for its known tokens and one more, then to its sequences as they grow.

    A request enters only if it leaves the watermark free. Where blocks are plenty, a sequence gets several at once, so
    that few plans carry new blocks; `take_back` takes those that are not needed yet.

    With a prefix cache, full blocks of known tokens can be found by these tokens, and a request shares those that it
    begins with. A prompt's are found from the step after the one that computes them, an output's once it has ended
    or was preempted. At least the last known token is computed. A request for its prompt's log-probabilities computes
    what they need.
    """

    def __init__(self, num_slots: int, block_size: int, num_blocks: int, has_prefix_cache: bool) -> None:
        self.num_slots = num_slots
        self.has_prefix_cache = has_prefix_cache
        self.num_queried = self.num_hit = 0  # prompt tokens that were looked for, and found; the reader sets them to 0
        self.block_size = block_size
        self.blocks = BlockAllocator(num_blocks)
        self._free_slots = list(reversed(range(num_slots)))
        self._has_spare = False  # some sequence may hold blocks that it does not need yet

    @property
    def num_sequences(self) -> int:
        """Sequences that have slots."""
        return self.num_slots - len(self._free_slots)

    def check(self, request: Request) -> None:
        """Raise ParameterError for a request that has too many sequences, or too many blocks at its longest."""
        name = "n" if request.sampling.n > 1 else "beam_width"
        width = request.sampling.width
        if width > self.num_slots:
            raise ParameterError(name, f"is {width}; at most {self.num_slots} sequences run at once")
        # The last sampled token is never computed, so its keys and values need no place.
        new_tokens = request.sampling.max_new_tokens - 1
        needed = self._blocks_for(len(request.prompt_ids) + new_tokens) + self._blocks_for(new_tokens) * (width - 1)
        if needed > self.blocks.num_blocks:
            raise ParameterError(
                name,
                f"is {width}; with this prompt and {{}} that takes {needed} blocks, "
                f"and the key-value cache has {self.blocks.num_blocks}",
                "max_new_tokens",
            )

    def admit(self, group: SequenceGroup) -> NewSequences | None:
        """Give a group its slots, and blocks for its tokens; None if it must wait for them."""
        sequences, request = group.sequences, group.request
        if len(sequences) > len(self._free_slots):
            return None
        num_tokens = min(sequences[0].num_tokens, group.max_tokens - 1)
        counts = [self._blocks_for(num_tokens - (group.prompt_len if i else 0)) for i in range(len(sequences))]
        found = self._find(group)
        if sum(counts) - self.blocks.num_owned(found) + watermark(self.num_sequences) > self.blocks.num_free:
            return None
        self.blocks.share(found)
        for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            self._place(sequence, count, [] if index else found)
        self._count(group, len(found))
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
            len(found) * self.block_size,
        )

    def grow(self, group: SequenceGroup) -> list[tuple[int, int, list[int]]] | None:
        """Blocks for the next token of each of a group's sequences, as engine.plan.Plan has them.

        Returns None, and gives none, if there are too few.
        """
        full = [sequence for sequence in group.sequences if sequence.num_computed >= self._end(sequence)]
        num_free = self.blocks.num_free
        if len(full) > num_free:
            return None
        is_plenty = num_free > _PLENTY * (1 + _LOOK_AHEAD) * self.num_sequences
        grown = []
        for sequence in full:
            end = self._end(sequence)
            count = min(1 + _LOOK_AHEAD, self._blocks_for(group.max_tokens - 1 - end)) if is_plenty else 1
            block_ids = self._allocate(sequence, count)
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

    def keep_prompt(self, sequence: Sequence, start: int, end: int) -> None:
        """Let the prompt's blocks among tokens [start, end) be found: a plan computes them."""
        keys = sequence.group.prompt_keys
        if keys and sequence.first_own == 0:
            for index in range(start // self.block_size, min(end // self.block_size, len(keys))):
                self.blocks.keep(sequence.block_ids[index], keys[index])

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slot and blocks."""
        self._keep_output(sequence)
        self._free_slots.append(sequence.seq_slot)
        self.blocks.free(sequence.block_ids)
        self.blocks.free(sequence.shared_ids)
        sequence.seq_slot, sequence.block_ids, sequence.shared_ids = NO_SLOT, [], []

    def _measure(self, group: SequenceGroup) -> None:
        group.capacity = min(group.max_tokens - 1, *[self._end(sequence) for sequence in group.sequences])

    def _end(self, sequence: Sequence) -> int:
        """The first position that its blocks have no place for."""
        return sequence.first_own + len(sequence.block_ids) * self.block_size

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _find(self, group: SequenceGroup) -> list[int]:
        """The blocks that hold a group's first tokens already."""
        if not self.has_prefix_cache:
            return []
        first = group.sequences[0]
        if group.prompt_keys is None:
            group.prompt_keys = block_keys(group.request.prompt_ids, self.block_size)
        keys, num_known = group.prompt_keys, group.prompt_len
        if group.is_resumed:
            num_known = first.num_tokens
            if group.known_keys is None:
                group.known_keys = self._keys(first)
            keys = group.known_keys
        most = (num_known - 1) // self.block_size
        if group.request.sampling.prompt_log_probs:
            most = min(most, group.num_scored // self.block_size)
        return self.blocks.find(keys[:most])

    def _keys(self, sequence: Sequence) -> list[bytes]:
        """Of all full blocks of a sequence's known tokens; of a beam's prompt: its other tokens change places."""
        group = sequence.group
        prompt_keys = group.prompt_keys or []
        if group.beam_search is not None:
            return prompt_keys
        return block_keys([*group.request.prompt_ids, *sequence.output.token_ids], self.block_size, prompt_keys)

    def _place(self, sequence: Sequence, count: int, found: list[int]) -> None:
        """Give a sequence of a group that enters a slot and `count` blocks, of which it has the first ones."""
        group = sequence.group
        first = group.sequences[0]
        sequence.seq_slot = self._free_slots.pop()
        sequence.block_ids = found[:]
        sequence.first_own = 0 if sequence is first else group.prompt_len
        room = self._blocks_for(group.max_tokens - 1 - sequence.first_own) - len(found)
        self._allocate(sequence, count - len(found), room)
        sequence.num_computed = len(found) * self.block_size
        if sequence is not first:
            sequence.shared_ids = self.blocks.share(first.block_ids[: self._blocks_for(group.prompt_len)])
            # A slot without a beam has no tokens to compute.
            sequence.num_computed = group.prompt_len if group.output_ids(sequence) else sequence.num_tokens - 1

    def _allocate(self, sequence: Sequence, count: int, room: int = 0) -> list[int]:
        """Give a sequence `count` more blocks, as many as are free at least; returns them."""
        if sequence.block_ids:
            block_ids = self.blocks.extend(sequence.block_ids[-1], count, room)
        else:
            block_ids = self.blocks.allocate(count, room)
        assert block_ids is not None, "as many blocks were free"
        sequence.block_ids += block_ids
        return block_ids

    def _keep_output(self, sequence: Sequence) -> None:
        """Let the blocks of a sequence that leaves be found."""
        group = sequence.group
        if not self.has_prefix_cache or group.beam_search is not None or sequence.first_own % self.block_size:
            return  # blocks that begin inside of another sequence's
        num_known = group.prompt_len + len(sequence.output.token_ids)
        num_full = min(sequence.num_computed, num_known) // self.block_size
        first = group.prompt_len // self.block_size
        if num_full <= first:
            return
        num_shared = sequence.first_own // self.block_size
        for index, key in enumerate(self._keys(sequence)[first:num_full], first):
            self.blocks.keep(sequence.block_ids[index - num_shared], key)

    def _count(self, group: SequenceGroup, num_found: int) -> None:
        """Count a request's look for its prompt when it enters first, if it may use what it finds."""
        is_first = group.request.times.scheduled == 0
        if self.has_prefix_cache and is_first and not group.request.sampling.prompt_log_probs:
            self.num_queried += group.prompt_len
            self.num_hit += num_found * self.block_size
