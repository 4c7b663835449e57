"""Rank 0's decisions: which requests run, in which slots, with which blocks, and what one step computes.

Stateless towards tensors: a plan holds numbers. Scheduling uses one quantity per sequence, `num_computed`: a step
computes some of the tokens between it and `num_tokens`. `schedule` may run again before `commit` gets the last plan's
tokens: it counts on one token per running sequence and plan, and the device feeds that token to the next step. A
sequence that turns out to have ended then costs one token, which is dropped. The host decides on beams and bad words
token by token, so their requests skip a plan that is made too early. A plan is of one cohort (engine.cohorts).
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from engine.beam import Candidate
from engine.blocks import BlockAllocator
from engine.budget import share_budget
from engine.cohorts import Cohort, Cohorts, may_fit
from engine.memory import SequenceMemory
from engine.metrics import Progress
from engine.plan import Plan, StepOutput
from engine.plan_builder import PlanBuilder
from engine.request import SHUTDOWN, Request, check_length
from engine.sequence import PendingOutput, Sequence, SequenceGroup
from engine.speculation import Speculation, append_drafted
from engine.waiting import WaitingQueue


class Scheduler:
    """In-flight batching: requests join and leave between any two steps.

    A request enters when its slots are free, and blocks for its prompt (engine.memory). Where blocks run out as
    sequences grow, the newest request is preempted: it leaves its slots and blocks, and enters again later with the
    tokens that it has, which are computed again. So its tokens stay the same, and those on their way count.

    Nothing starves. Requests run in the order in which they entered first; a preempted one keeps its place in it and
    enters before all that wait. The oldest running request is never preempted and gets a token from each step of its
    cohort (every other one where the host decides on its tokens and plans are made ahead), so a request that was
    preempted enters again at the latest when all older ones have ended. Origins take turns (engine.waiting): before a
    request of a new origin, at most one request of each origin that waits already enters. So with one other client it
    is the second to enter, whether that client asked for one prompt or for a thousand.

    Each step decodes every running sequence of a cohort, and spends the rest of `max_step_tokens` on prompts, in chunks
    where they are long; if it decodes any, the rest of `max_mixed_tokens` (0: as many). Either is raised to
    `max_batch_size`: then each step has room for a prompt's token, as a prompt's slot has no decode row. Prompts share
    the room so that short ones do not wait for long ones, and long ones go on (engine.budget has the bounds).
    """

    has_token_log_probs = True

    def __init__(
        self,
        max_batch_size: int,
        max_seq_len: int,
        max_step_tokens: int,
        block_size: int,
        num_blocks: int,
        has_prefix_cache: bool = True,
        max_mixed_tokens: int = 0,
        num_cohorts: int = 1,
    ) -> None:
        self.max_seq_len = max_seq_len
        self.max_step_tokens = max(max_step_tokens, max_batch_size)
        most = max_mixed_tokens or self.max_step_tokens
        self.max_mixed_tokens = min(max(most, max_batch_size), self.max_step_tokens)
        self.memory = SequenceMemory(max_batch_size, block_size, num_blocks, has_prefix_cache)
        self.speculation: Speculation | None = None  # set it, if at all, before the first step
        self.waiting = WaitingQueue()  # the preempted requests are its first ones
        self._running: dict[Request, SequenceGroup] = {}  # in the order in which they entered first
        self._preempted: dict[Request, SequenceGroup] = {}
        self._next: SequenceGroup | None = None  # of the first waiting request, when it did not fit
        self._cohorts = Cohorts(num_cohorts, np.min_scalar_type(max_batch_size))  # slots travel in as few bytes as fit
        self._pending: deque[PendingOutput] = deque()  # per plan on its way
        self._committed_at = 0.0
        self._most_fitting = self.memory.num_slots  # requests, as far as admissions have shown
        self._num_preempted = 0  # since the last commit

    @property
    def blocks(self) -> BlockAllocator:
        return self.memory.blocks

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def _most_running(self) -> int:
        """Requests that run, or would if their cohorts took all that wait and fit."""
        return min(len(self._running) + len(self.waiting), self._most_fitting)

    @property
    def num_cohorts(self) -> int:
        return self._cohorts.num_busy(self._most_running)

    @property
    def kv_cache_usage(self) -> float:
        return 1 - self.blocks.num_free / self.blocks.num_blocks

    def check(self, request: Request) -> None:
        """Raise ParameterError for a request that could never run. May be called from any thread."""
        check_length(request, self.max_seq_len, "the longest sequence served")
        check_length(request, self.blocks.num_blocks * self.memory.block_size, "the key-value cache")
        self.memory.check(request)

    def add(self, request: Request) -> None:
        """Queue a request that `check` let pass."""
        self.waiting.add(request)

    def schedule(self) -> Plan | None:
        """The next step, or None where there is nothing to compute."""
        if len(self._cohorts) > 1:
            self._cohorts.balance(self._running, self._most_running)
        for _ in self._cohorts:
            plan = self._plan_cohort(self._cohorts.next())
            if plan is not None:
                return plan
        return None

    def _plan_cohort(self, cohort: Cohort) -> Plan | None:
        builder = PlanBuilder(cohort)
        prefilling = self._plan_decodes(cohort, builder)
        self._admit(cohort, builder, prefilling)
        if prefilling:
            self._plan_prompts(prefilling, builder)
        if not builder.num_tokens:
            return None
        plan, pending = builder.finish()
        self._pending.append(pending)
        return plan

    def commit(self, step: StepOutput) -> Progress:
        """Take the output of the oldest plan that is not committed yet."""
        pending = self._pending.popleft()
        since = pending.cohort.committed_at
        now = self._committed_at = pending.cohort.committed_at = time.monotonic()
        progress, num_others = pending.measure(now)
        progress.num_preempted, self._num_preempted = self._num_preempted, 0
        progress.num_queried, progress.num_hit = self.memory.num_queried, self.memory.num_hit
        self.memory.num_queried = self.memory.num_hit = 0
        for group in pending.skipping_groups:
            group.num_in_flight -= 1
        for group in pending.started:  # it may have moved, to a cohort that was without requests for long
            self._cohorts[group.cohort].committed_at = now
        pending.give_extras(step)
        updated = self._append(pending.sequences, step, progress)
        if num_steady := progress.num_tokens - num_others:  # they got a token from the last plan too
            progress.gaps.append((now - since, num_steady))
        updated += append_drafted(pending, step, now, progress, self._end)
        for group, candidates in zip(pending.beam_groups, step.candidates, strict=True):
            if not group.request.is_finished:
                self._advance_beams(group, candidates, progress)
                updated.append(group.request)
        for group in pending.preempted:
            if group.sequences:
                self._settle(group)
        if self.speculation is not None:
            for group in self.speculation.look(self._running.values(), self.memory.num_sequences, now):
                self._cohorts[group.cohort].rows.remove(group)
        for request in updated:
            request.on_update(request)
        return progress

    def cancel(self, request: Request, reason: str) -> None:
        """End a request, waiting or running, with what it has; one that has ended, or never came, stays as it is."""
        group = self._running.get(request) or self._preempted.get(request)
        if group is None:
            if request not in self.waiting:
                return
            self.waiting.remove(request)
        else:
            if request.times.first_token:
                request.times.last_token = group.sampled_at or self._cohorts[group.cohort].committed_at
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

    def _plan_decodes(self, cohort: Cohort, builder: PlanBuilder) -> list[SequenceGroup]:
        """Plan a token for every sequence whose tokens are computed; returns the other running groups of the cohort.

        Steady groups go on by themselves while their blocks have room.
        """
        running = cohort.groups.values()
        prefilling = []
        for group in [g for g in running if not g.is_steady or g.sequences[0].num_computed >= g.capacity]:
            if not group.is_running:  # it was preempted for an older one, like all after it
                break
            if group.is_prefilling:
                if group.num_plannable:
                    prefilling.append(group)
                else:
                    builder.resume(group)
                continue
            first = group.sequences[0]
            if first.num_computed == group.max_tokens - 1 or (group.is_stepwise and group.num_in_flight):
                cohort.rows.remove(group)
                continue
            if group.is_speculating and group.has_unknown:
                continue
            if first.num_computed >= group.capacity and not self._grow(group, builder):
                break
            if group.is_stepwise:
                builder.add_stepwise(group)
            elif group.is_speculating and self.speculation is not None:
                self.speculation.plan(group, builder, self.memory.num_sequences)
            else:
                cohort.rows.add(group)
        builder.set_steady(*cohort.rows.step(running))
        return prefilling

    def _grow(self, group: SequenceGroup, builder: PlanBuilder) -> bool:
        """Give a group blocks for its next tokens, if need be those of newer groups; False: it was preempted itself."""
        while (new_blocks := self.memory.grow(group)) is None:
            if not self.memory.take_back(self._running.values()):
                newest = next(reversed(self._running.values()))
                self._preempt(newest)
                if newest is group:
                    return False
        builder.new_blocks += new_blocks
        return True

    def _preempt(self, group: SequenceGroup) -> None:
        """Take a group's slots and blocks: it waits, until its tokens are known and there is room for them."""
        self._num_preempted += 1
        self._stop_running(group)
        self._preempted[group.request] = group
        self.waiting.put_back(group.request)
        group.num_scored = max(group.num_scored, group.sequences[0].num_computed)
        group.is_running = group.is_settled = False
        for sequence in group.sequences:
            self.memory.release(sequence)
        if self._pending:
            self._pending[-1].preempted.append(group)
        else:
            self._settle(group)

    def _settle(self, group: SequenceGroup) -> None:
        """Note that nothing of a preempted group is on its way any more."""
        group.settle()
        if group.is_resumed:
            group.sampled_at = group.sampled_at or self._cohorts[group.cohort].committed_at

    def _admit(self, cohort: Cohort, builder: PlanBuilder, prefilling: list[SequenceGroup]) -> None:
        """Let waiting requests enter the cohort, in their order, until one does not fit or the cohort has its share."""
        while self.waiting and self._cohorts.has_room(cohort, self._most_running):
            request = self.waiting.first
            group = self._preempted.get(request) or self._next
            if group is None or group.request is not request:
                group = self._next = SequenceGroup.of(request)
            if not group.is_settled:
                return
            new_sequences = self.memory.admit(group)
            if new_sequences is None and self.memory.take_back(self._running.values()):
                new_sequences = self.memory.admit(group)
            if new_sequences is None:
                self._most_fitting = len(self._running) + 1
                return
            self.waiting.take(request)
            self._preempted.pop(request, None)
            self._next = None
            self._running[request] = group
            self._most_fitting = max(self._most_fitting, may_fit(len(self._running)))
            cohort.enter(group)
            request.times.scheduled = request.times.scheduled or time.monotonic()
            builder.new_sequences.append(new_sequences)
            if group.num_plannable:
                prefilling.append(group)
            else:  # all that it had was found
                builder.resume(group)

    def _plan_prompts(self, groups: list[SequenceGroup], builder: PlanBuilder) -> None:
        """Plan what there is room for of the known tokens that groups have not computed."""
        # Sequences of other cohorts wait for this step, too.
        is_mixed = builder.num_tokens or any(not group.is_prefilling for group in self._running.values())
        limit = self.max_mixed_tokens if is_mixed else self.max_step_tokens
        shares = share_budget([group.num_plannable for group in groups], max(0, limit - builder.num_tokens))
        for group, share in zip(groups, shares, strict=True):
            self._plan_chunks(group, share, builder)

    def _plan_chunks(self, group: SequenceGroup, count: int, builder: PlanBuilder) -> None:
        """Plan `count` of the tokens that a group's `num_plannable` counts."""
        is_prompt_computed = group.sequences[0].num_computed >= group.prompt_len
        for sequence in group.sequences if is_prompt_computed else group.sequences[:1]:
            if length := min(sequence.num_tokens - 1 - sequence.num_computed, count):
                start = sequence.num_computed
                builder.add_chunk(sequence, length)
                self.memory.keep_prompt(sequence, start, start + length)
                count -= length

    def _append(self, sequences: list[Sequence | None], step: StepOutput, progress: Progress) -> list[Request]:
        """Give each sequence its token; returns the updated requests, in order."""
        updated: list[Request] = []
        last: Request | None = None
        num_skipped = 0  # counted instead of the tokens: the loop is hot
        for sequence, token_id, log_prob in zip(sequences, step.token_ids, step.log_probs, strict=True):
            if sequence is None or sequence.output.finish_reason is not None:  # a beam's; ended in the meantime
                num_skipped += 1
                continue
            output, request = sequence.output, sequence.group.request
            output.log_probs.append(log_prob)  # Output.append in line, and few questions: the loop is hot
            output.cum_log_prob += log_prob
            token_ids = output.token_ids
            token_ids.append(token_id)
            is_full = len(token_ids) == request.sampling.max_new_tokens
            if is_full or token_id in request.end_ids or request.words is not None:
                reason = request.reason_to_end(token_ids)
                if reason is not None:
                    self._end(sequence, reason, progress)
            if request is not last:
                updated.append(request)
                last = request
        progress.num_tokens = len(sequences) - num_skipped
        return updated

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
        """Free a sequence's slot and blocks, if it has them; its group leaves with the last one."""
        group = sequence.group
        self._cohorts[group.cohort].rows.remove(group)
        group.sequences.remove(sequence)
        if group.is_running:
            self.memory.release(sequence)
        if group.sequences:
            return
        if group.is_running:
            self._stop_running(group)
        else:
            del self._preempted[group.request]
            self.waiting.remove(group.request)

    def _stop_running(self, group: SequenceGroup) -> None:
        del self._running[group.request]
        self._cohorts[group.cohort].leave(group)
