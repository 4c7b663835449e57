"""A plan while it is made."""

from __future__ import annotations

import numpy as np

from engine.cohorts import Cohort
from engine.plan import BeamReorder, Chunk, NewSequences, Plan
from engine.sequence import Drafted, PendingOutput, Sequence, SequenceGroup

_NO_ROWS = np.empty(0, dtype=np.int32)


class PlanBuilder:
    """Collects a step: its decode rows, its chunks, and who gets the output."""

    def __init__(self, cohort: Cohort) -> None:
        self._slots = self._positions = _NO_ROWS  # of the steady rows, as is the next one
        self._steady: list[Sequence | None] = []
        self.seq_slots: list[int] = []  # of the other decode rows, as are the next two
        self.positions: list[int] = []
        self.decoding: list[Sequence | None] = []
        self.chunks: list[Chunk] = []
        self.new_sequences: list[NewSequences] = []
        self.new_blocks: list[tuple[int, int, list[int]]] = []
        self.beam_reorders: list[BeamReorder] = []
        self.banned_ids: dict[int, list[int]] = {}
        self.pending = PendingOutput([], cohort)  # its sequences: of the chunks, until the plan is finished

    def set_steady(self, slots: np.ndarray, positions: np.ndarray, sequences: list[Sequence | None]) -> None:
        """Compute the rows of the steady groups (engine.decode_rows)."""
        self._slots, self._positions, self._steady = slots, positions, sequences

    def add_decode(self, sequence: Sequence, position: int) -> None:
        """Compute the sequence's token at the position, and sample the next one."""
        self.seq_slots.append(sequence.seq_slot)
        self.positions.append(position)
        self.decoding.append(sequence if sequence.group.beam_search is None else None)

    def add_chunk(self, sequence: Sequence, length: int) -> None:
        """Compute the next `length` known tokens of a sequence. The last ones of a prompt sample its first token."""
        group, request = sequence.group, sequence.group.request
        sampling, is_beam = request.sampling, group.beam_search is not None
        start = sequence.num_computed
        end = sequence.num_computed = start + length
        is_last = end == sequence.num_tokens - 1 and not group.is_resumed
        sampled = [] if not is_last else [sequence] if is_beam else group.sequences
        wants_more = sampling.width > 1 or sampling.prompt_log_probs or sampling.next_token_logits
        if length == 1 and is_last and not wants_more:
            self.add_decode(sequence, start)
        else:
            slots = [other.seq_slot for other in sampled]
            scored_from = max(start, group.num_scored)
            is_scored = sampling.prompt_log_probs and scored_from < min(end, group.prompt_len - 1)
            self.chunks.append(Chunk(sequence.seq_slot, start, length, slots, scored_from if is_scored else None))
            self.pending.sequences += [None] if is_beam and is_last else sampled
            if is_scored:
                self.pending.scored_prompts.append(request)
            if is_last and sampling.next_token_logits:
                self.pending.first_logits.append(request)
        if is_last:
            group.is_prefilling = False
            self.pending.started.append(group)
            for other in sampled:
                self.ban(other, [])
            if group.is_stepwise:
                self.expect(group)

    def resume(self, group: SequenceGroup) -> None:
        """Compute the next token of each sequence of a group that has computed its known tokens again."""
        group.is_prefilling = False
        if group.is_stepwise:
            self.add_stepwise(group)
            return
        self.expect(group)
        for sequence in group.sequences:
            self.add_decode(sequence, sequence.num_computed)
            sequence.num_computed += 1

    def add_stepwise(self, group: SequenceGroup) -> None:
        """Compute one more token of each sequence of a group that the host decides on token by token."""
        sequences = group.sequences
        if group.beam_search is not None:
            beams = group.beams
            assert beams is not None, "a search without beams has ended"
            slots = [sequence.seq_slot for sequence in sequences]
            parents = [slots[parent] for parent in beams.parents]
            sequences = sequences[: len(parents)]
            start = sequences[0].num_computed
            reorder = BeamReorder(slots[: len(parents)], parents, start, beams.token_ids, beams.scores)
            self.beam_reorders.append(reorder)
        self.expect(group)
        for sequence in sequences:
            self.add_decode(sequence, sequence.num_computed)
            self.ban(sequence, group.output_ids(sequence))
        for sequence in group.sequences:
            sequence.num_computed += 1

    def add_drafts(self, sequence: Sequence, draft_ids: list[int]) -> None:
        """Compute the sequence's next token and drafts after it, and sample a token after each."""
        slot, length = sequence.seq_slot, 1 + len(draft_ids)
        self.chunks.append(Chunk(slot, sequence.num_computed, length, [slot], draft_ids=draft_ids))
        self.pending.drafted.append(Drafted(sequence, draft_ids, len(self.pending.sequences)))
        self.pending.sequences += [None] * length

    def ban(self, sequence: Sequence, output_ids: list[int]) -> None:
        """Ban the tokens that would complete a bad word now, beyond those that hold one."""
        request = sequence.group.request
        if request.words is None or not request.words.has_bad:
            return
        if banned := request.words.banned(request.prompt_ids, output_ids):
            self.banned_ids[sequence.seq_slot] = banned

    def expect(self, group: SequenceGroup) -> None:
        """Note that the step samples for a group, which may have got nothing from the step before."""
        group.num_in_flight += 1
        self.pending.skipping_groups.append(group)
        if group.beam_search is not None:
            self.pending.beam_groups.append(group)

    @property
    def num_tokens(self) -> int:
        """Tokens that it computes."""
        return len(self._steady) + len(self.seq_slots) + sum(chunk.length for chunk in self.chunks)

    def finish(self) -> tuple[Plan, PendingOutput]:
        """The plan and its output's owners."""
        slots, positions, decoding = self._rows()
        for drafted in self.pending.drafted:
            drafted.first_row += len(decoding)
        self.pending.sequences[:0] = decoding
        plan = Plan(
            slots,
            positions,
            self.chunks,
            self.new_sequences,
            self.new_blocks,
            self.beam_reorders,
            self.banned_ids,
        )
        return plan, self.pending

    def _rows(self) -> tuple[np.ndarray, np.ndarray, list[Sequence | None]]:
        """Slots, positions and owners of the decode rows: the longest ones come first, as in DecodeRows."""
        if not self.seq_slots:
            return self._slots, self._positions, self._steady
        slots = np.concatenate([self._slots, np.array(self.seq_slots, dtype=self._slots.dtype)])
        positions = np.concatenate([self._positions, np.array(self.positions, dtype=np.int32)])
        decoding = [*self._steady, *self.decoding]
        if self.beam_reorders:  # a search's rows keep their order
            return slots, positions, decoding
        order = np.argsort(-positions, kind="stable")  # samples of one request stay neighbours
        return slots[order], positions[order], [decoding[row] for row in order.tolist()]
