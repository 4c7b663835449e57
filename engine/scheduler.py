"""Rank 0's decisions: which requests run, in which slots, with which blocks, and what one step computes.

Stateless towards tensors: a plan holds numbers. Scheduling uses one quantity per sequence, `num_computed`: a step
computes some of the tokens between it and `num_tokens`. `schedule` may run again before `commit` gets the last plan's
tokens: it counts on one token per running sequence and plan, and the device feeds that token to the next step. A
sequence that turns out to have ended then costs one token, which is dropped. The host decides on beams and bad words
token by token, so their requests skip a plan that is made too early.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from engine.beam import BeamSearch, Candidate
from engine.blocks import BlockAllocator
from engine.metrics import Progress
from engine.plan import BeamReorder, Chunk, NewSequences, Plan, StepOutput
from engine.request import SHUTDOWN, Output, ParameterError, Request
from engine.sequence import Drafted, PendingOutput, Sequence, SequenceGroup
from engine.speculation import Speculation
from engine.waiting import WaitingQueue


def check_length(request: Request, limit: int, what: str) -> None:
    """Raise ParameterError where prompt and output together exceed `limit` tokens of `what`."""
    total = len(request.prompt_ids) + request.sampling.max_new_tokens
    if total > limit:
        raise ParameterError(
            "max_new_tokens",
            f"is {request.sampling.max_new_tokens}; with the prompt's {len(request.prompt_ids)} tokens "
            f"that is {total}, and {what} is {limit} tokens",
        )


class _Draft:
    """A plan while it is made: its decode rows as lists, and who gets the output."""

    def __init__(self) -> None:
        self.seq_slots: list[int] = []
        self.positions: list[int] = []
        self.chunks: list[Chunk] = []
        self.beam_reorders: list[BeamReorder] = []
        self.banned_ids: dict[int, list[int]] = {}
        self.decoding: list[Sequence | None] = []
        self.pending = PendingOutput([])  # its sequences: of the chunks, until the plan is finished

    def add_decode(self, sequence: Sequence, position: int) -> None:
        """Compute the sequence's token at the position, and sample the next one."""
        self.seq_slots.append(sequence.seq_slot)
        self.positions.append(position)
        self.decoding.append(sequence if sequence.group.beam_search is None else None)

    def add_drafts(self, sequence: Sequence, draft_ids: list[int]) -> None:
        """Compute the sequence's next token and drafts after it, and sample a token after each."""
        slot, length = sequence.seq_slot, 1 + len(draft_ids)
        self.chunks.append(Chunk(slot, sequence.num_computed, length, [slot], draft_ids))
        self.pending.drafted.append(Drafted(sequence, draft_ids, len(self.pending.sequences)))
        self.pending.sequences += [None] * length

    def ban(self, sequence: Sequence, output_ids: list[int]) -> None:
        banned = _banned(sequence.group.request, output_ids)
        if banned:
            self.banned_ids[sequence.seq_slot] = banned

    def finish(self, new_sequences: list[NewSequences], slot_type: np.dtype) -> tuple[Plan, PendingOutput] | None:
        if not self.seq_slots and not self.chunks:
            return None
        slots = np.array(self.seq_slots, dtype=slot_type)
        positions = np.array(self.positions, dtype=np.int32)
        self.pending.sequences[:0] = self.decoding
        for drafted in self.pending.drafted:
            drafted.first_row += len(self.decoding)
        plan = Plan(slots, positions, self.chunks, new_sequences, self.beam_reorders, self.banned_ids)
        return plan, self.pending


class Scheduler:
    """In-flight batching: requests join and leave between any two steps.

    A request enters when its slots are free, and all blocks that it can ever need: it is never preempted, and every
    running request ends. Origins take turns (engine.waiting): before a request of a new origin, at most one request
    of each origin that waits already enters. So with one other client it is the second to enter, whether that client
    asked for one prompt or for a thousand.

    Each step decodes every running sequence, and spends the rest of `max_step_tokens` on prompts, in chunks where they
    are long.
    """

    has_token_log_probs = True

    def __init__(
        self,
        max_batch_size: int,
        max_seq_len: int,
        max_step_tokens: int,
        block_size: int,
        num_blocks: int,
        speculation: Speculation | None = None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.max_step_tokens = max(max_step_tokens, max_batch_size)
        self.block_size = block_size
        self.blocks = BlockAllocator(num_blocks)
        self.waiting = WaitingQueue()
        self._running: dict[Request, SequenceGroup] = {}  # in order of admission
        self._slot_type = np.min_scalar_type(max_batch_size)  # slots travel in as few bytes as they need
        self._free_slots = list(reversed(range(max_batch_size)))
        self._pending: deque[PendingOutput] = deque()  # per plan on its way
        self._committed_at = 0.0
        self._speculation = speculation

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def kv_cache_usage(self) -> float:
        return 1 - self.blocks.num_free / self.blocks.num_blocks

    def check(self, request: Request) -> None:
        """Raise ParameterError for a request that could never run. May be called from any thread."""
        check_length(request, self.max_seq_len, "the longest sequence served")
        check_length(request, self.blocks.num_blocks * self.block_size, "the key-value cache")
        name = "n" if request.sampling.n > 1 else "beam_width"
        width = request.sampling.width
        if width > self.max_batch_size:
            raise ParameterError(name, f"is {width}; at most {self.max_batch_size} sequences run at once")
        needed = sum(self._blocks_needed(request))
        if needed > self.blocks.num_blocks:
            raise ParameterError(
                name,
                f"is {width}; with this prompt and {{}} that takes {needed} blocks, "
                f"and the key-value cache has {self.blocks.num_blocks}",
                "max_new_tokens",
            )

    def add(self, request: Request) -> None:
        """Queue a request that `check` let pass."""
        self.waiting.add(request)

    def schedule(self) -> Plan | None:
        """The next step, or None where there is nothing to compute."""
        new_sequences = self._admit()
        draft = _Draft()
        seq_slots, positions, decoding = draft.seq_slots, draft.positions, draft.decoding
        prefilling = []
        for group in self._running.values():
            if group.is_prefilling:
                prefilling.append(group)
            elif group.is_speculating:
                self._plan_drafts(group, draft)
            elif not group.is_stepwise:
                for sequence in group.sequences:
                    if sequence.num_tokens < group.max_tokens:  # add_decode in line: the loop is hot
                        seq_slots.append(sequence.seq_slot)
                        positions.append(sequence.num_computed)
                        decoding.append(sequence)
                        sequence.num_computed += 1
                        sequence.num_tokens += 1
            elif group.num_in_flight == 0:
                self._plan_stepwise(group, draft)
        budget = self.max_step_tokens - len(draft.seq_slots) - sum(chunk.length for chunk in draft.chunks)
        for group in prefilling:
            if budget == 0:
                break
            budget -= self._plan_chunk(group, budget, draft)
        finished = draft.finish(new_sequences, self._slot_type)
        if finished is None:
            return None
        plan, pending = finished
        self._pending.append(pending)
        return plan

    def commit(self, step: StepOutput) -> Progress:
        """Take the output of the oldest plan that is not committed yet."""
        pending = self._pending.popleft()
        since = self._committed_at
        now = self._committed_at = time.monotonic()
        progress, num_others = pending.measure(now)
        for group in pending.stepwise_groups:
            group.num_in_flight -= 1
        for request, log_probs in zip(pending.scored_prompts, step.prompt_log_probs, strict=True):
            if not request.is_finished:
                request.prompt_log_probs += log_probs
        for place, per_token in step.prompt_alternatives.items():
            request = pending.scored_prompts[place]
            if not request.is_finished:
                request.prompt_alternatives += per_token
        for request, logits in zip(pending.first_logits, step.next_token_logits, strict=True):
            if not request.is_finished:
                request.next_token_logits = logits
        for row, alternatives in step.alternatives.items():
            sequence = pending.sequences[row]
            if sequence is not None and sequence.output.finish_reason is None:
                sequence.output.alternatives.append(alternatives)
        updated = self._append(pending.sequences, step, progress)
        if num_steady := progress.num_tokens - num_others:  # they got a token from the last plan too
            progress.gaps.append((now - since, num_steady))
        updated += self._append_drafted(pending.drafted, step, progress)
        for group, candidates in zip(pending.beam_groups, step.candidates, strict=True):
            if not group.request.is_finished:
                self._advance_beams(group, candidates, progress)
                updated.append(group.request)
        if self._speculation is not None:
            self._speculation.look(self._running.values(), self._num_sequences, now)
        for request in updated:
            request.on_update(request)
        return progress

    def cancel(self, request: Request, reason: str) -> None:
        """End a request, waiting or running, with what it has; one that has ended, or never came, stays as it is."""
        group = self._running.get(request)
        if group is None:
            if request not in self.waiting:
                return
            self.waiting.remove(request)
        else:
            if request.times.first_token:
                request.times.last_token = group.sampled_at or self._committed_at
            if group.beam_search is not None:
                request.outputs = group.beam_search.results()
            self._leave_all(group)
        request.end(reason)

    def unfinished(self) -> list[Request]:
        """The requests that run, then those that wait."""
        return [*self._running, *self.waiting]

    def abort_all(self) -> None:
        """End every request; tokens on their way are dropped when they come."""
        for request in self.unfinished():
            self.cancel(request, SHUTDOWN)

    def _admit(self) -> list[NewSequences]:
        admitted = []
        while self.waiting and (request := self.waiting.first).sampling.width <= len(self._free_slots):
            needed = self._blocks_needed(request)
            if sum(needed) > self.blocks.num_free:
                break
            self.waiting.take(request)
            admitted.append(self._start(request, needed))
        return admitted

    def _start(self, request: Request, needed: list[int]) -> NewSequences:
        """Give a request its slots and blocks; needed: per sequence, as `_blocks_needed` counts them."""
        request.times.scheduled = time.monotonic()
        sampling, words, prompt_len = request.sampling, request.words, len(request.prompt_ids)
        block_ids = [self._take_blocks(count) for count in needed]
        shared = block_ids[0][: self._blocks_for(prompt_len)]
        slots = [self._free_slots.pop() for _ in needed]
        beam_search = BeamSearch(request) if sampling.beam_width > 1 else None
        group = SequenceGroup(request, prompt_len + sampling.max_new_tokens, beam_search)
        group.is_stepwise = beam_search is not None or (words is not None and words.has_bad)
        outputs = [Output() for _ in slots] if beam_search else request.outputs
        for index, (slot, ids, output) in enumerate(zip(slots, block_ids, outputs, strict=True)):
            own_ids = ids if index == 0 else self.blocks.share(shared) + ids
            group.sequences.append(Sequence(group, slot, own_ids, output, prompt_len))
        self._running[request] = group
        banned = words.always_banned if words is not None else []
        return NewSequences(slots, request.prompt_ids, sampling, request.end_ids, block_ids, banned)

    def _take_blocks(self, count: int) -> list[int]:
        block_ids = self.blocks.allocate(count)
        assert block_ids is not None, f"{count} blocks were free"
        return block_ids

    def _plan_chunk(self, group: SequenceGroup, budget: int, draft: _Draft) -> int:
        """Plan the next piece of a prompt, at most `budget` tokens; returns how many."""
        request, sampling, leader = group.request, group.request.sampling, group.sequences[0]
        start = leader.num_computed
        length = min(leader.num_tokens - start, budget)
        leader.num_computed += length
        is_last = leader.num_computed == leader.num_tokens
        is_beam = group.beam_search is not None
        sampled = [] if not is_last else [leader] if is_beam else group.sequences
        wants_more = sampling.width > 1 or sampling.prompt_log_probs or sampling.next_token_logits
        if length == 1 and is_last and not wants_more:
            draft.add_decode(leader, start)
        else:
            draft.chunks.append(Chunk(leader.seq_slot, start, length, [sequence.seq_slot for sequence in sampled]))
            draft.pending.sequences += [None] if is_beam and is_last else sampled
            if sampling.prompt_log_probs:
                draft.pending.scored_prompts.append(request)
            if is_last and sampling.next_token_logits:
                draft.pending.first_logits.append(request)
        if is_last:
            self._start_decoding(group, sampled, draft)
        return length

    def _start_decoding(self, group: SequenceGroup, sampled: list[Sequence], draft: _Draft) -> None:
        group.is_prefilling = False
        draft.pending.started.append(group)
        for sequence in sampled:
            draft.ban(sequence, [])
        for sequence in group.sequences:
            sequence.num_computed = sequence.num_tokens
            sequence.num_tokens += 1
        self._expect(group, draft)

    @property
    def _num_sequences(self) -> int:
        return self.max_batch_size - len(self._free_slots)

    def _plan_drafts(self, group: SequenceGroup, draft: _Draft) -> None:
        """Plan a sequence's last token with its drafts, once it is known. Without drafts it is planned ahead again."""
        assert self._speculation is not None
        (sequence,) = group.sequences
        if sequence.num_tokens > len(group.request.prompt_ids) + len(sequence.output.token_ids):
            return
        draft_ids = group.draft_ids[: self._speculation.share(self._num_sequences)]
        if draft_ids:
            draft.add_drafts(sequence, draft_ids)
        else:
            draft.add_decode(sequence, sequence.num_computed)
            draft.pending.stepwise_groups.append(group)
            group.num_in_flight += 1
            group.is_speculating = False
        sequence.num_computed += 1 + len(draft_ids)
        sequence.num_tokens += 1 + len(draft_ids)

    def _plan_stepwise(self, group: SequenceGroup, draft: _Draft) -> None:
        """Plan one more token of each sequence of a group that the host decides on token by token."""
        if group.beam_search is not None:
            beams = group.beams
            assert beams is not None, "a search without beams has ended"
            slots = [sequence.seq_slot for sequence in group.sequences]
            parents = [slots[parent] for parent in beams.parents]
            sequences = group.sequences[: len(parents)]
            start = sequences[0].num_computed
            reorder = BeamReorder(slots[: len(parents)], parents, start, beams.token_ids, beams.scores)
            draft.beam_reorders.append(reorder)
            outputs = [output.token_ids for _, output in group.beam_search.running]
            advanced = group.sequences
        else:
            sequences = advanced = [s for s in group.sequences if s.num_tokens < group.max_tokens]
            outputs = [sequence.output.token_ids for sequence in sequences]
        for sequence, output_ids in zip(sequences, outputs, strict=True):
            draft.add_decode(sequence, sequence.num_computed)
            draft.ban(sequence, output_ids)
        for sequence in advanced:
            sequence.num_computed += 1
            sequence.num_tokens += 1
        if sequences:
            self._expect(group, draft)

    def _expect(self, group: SequenceGroup, draft: _Draft) -> None:
        """Note that the draft samples for a group."""
        if group.is_stepwise:
            group.num_in_flight += 1
            draft.pending.stepwise_groups.append(group)
        if group.beam_search is not None:
            draft.pending.beam_groups.append(group)

    def _append(self, sequences: list[Sequence | None], step: StepOutput, progress: Progress) -> list[Request]:
        """Give each sequence its token; returns the updated requests, in order."""
        updated: list[Request] = []
        last: Request | None = None
        num_skipped = 0  # counted instead of the tokens: the loop is hot
        for sequence, token_id, log_prob in zip(sequences, step.token_ids, step.log_probs, strict=True):
            if sequence is None:
                num_skipped += 1
                continue
            output = sequence.output
            if output.finish_reason is not None:  # ended while this step was on its way
                num_skipped += 1
                continue
            request = sequence.group.request
            output.append(token_id, log_prob)
            reason = request.reason_to_end(output.token_ids)
            if reason is not None:
                self._end(sequence, reason, progress)
            if request is not last:
                updated.append(request)
                last = request
        progress.num_tokens = len(sequences) - num_skipped
        return updated

    def _append_drafted(self, all_drafted: list[Drafted], step: StepOutput, progress: Progress) -> list[Request]:
        """Give each sequence its tokens up to the first that is not the draft in its place; returns the requests."""
        updated = []
        for drafted in all_drafted:
            if drafted.sequence.output.finish_reason is None:
                self._take_drafted(drafted, step, progress)
                updated.append(drafted.sequence.group.request)
        return updated

    def _take_drafted(self, drafted: Drafted, step: StepOutput, progress: Progress) -> None:
        sequence, output = drafted.sequence, drafted.sequence.output
        group, num_accepted = sequence.group, drafted.num_accepted(step)
        num_wrong = len(drafted.draft_ids) - num_accepted
        sequence.num_computed -= num_wrong
        sequence.num_tokens -= num_wrong
        num_before = len(output.token_ids)
        for row in range(drafted.first_row, drafted.first_row + num_accepted + 1):
            if row in step.alternatives:
                output.alternatives.append(step.alternatives[row])
            output.append(step.token_ids[row], step.log_probs[row])
            reason = group.request.reason_to_end(output.token_ids)
            if reason is not None:
                self._end(sequence, reason, progress)
                break
        num_tokens = len(output.token_ids) - num_before
        progress.num_tokens += num_tokens
        progress.gaps.append(((self._committed_at - group.sampled_at) / num_tokens, num_tokens))
        group.sampled_at = self._committed_at
        progress.num_drafts += 1
        progress.num_drafted += len(drafted.draft_ids)
        progress.num_accepted += num_accepted

    def _end(self, sequence: Sequence, reason: str, progress: Progress) -> None:
        sequence.output.finish_reason = reason
        self._leave(sequence)
        if not sequence.group.sequences:
            self._finish(sequence.group.request, progress)

    def _finish(self, request: Request, progress: Progress) -> None:
        request.finish(self._committed_at)
        progress.finished.append(request)

    def _advance_beams(self, group: SequenceGroup, candidates: list[Candidate], progress: Progress) -> None:
        search = group.beam_search
        assert search is not None
        group.beams = search.advance(candidates)
        if group.beams is None:
            group.request.outputs = search.results()
            self._leave_all(group)
            self._finish(group.request, progress)

    def _leave_all(self, group: SequenceGroup) -> None:
        for sequence in list(group.sequences):
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Free a sequence's slot and blocks; its group leaves with the last one."""
        group = sequence.group
        group.sequences.remove(sequence)
        self._free_slots.append(sequence.seq_slot)
        self.blocks.free(sequence.block_ids)
        if not group.sequences:
            del self._running[group.request]

    def _blocks_needed(self, request: Request) -> list[int]:
        """Blocks that each of a request's sequences takes for itself."""
        # The last sampled token is never computed, so its keys and values need no place.
        new_tokens = request.sampling.max_new_tokens - 1
        first = self._blocks_for(len(request.prompt_ids) + new_tokens)
        return [first] + [self._blocks_for(new_tokens)] * (request.sampling.width - 1)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def _banned(request: Request, output_ids: list[int]) -> list[int]:
    """The tokens that would complete a bad word now, beyond those that hold one."""
    if request.words is None or not request.words.has_bad:
        return []
    return request.words.banned(request.prompt_ids, output_ids)
