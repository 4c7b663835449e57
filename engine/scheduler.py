"""Rank 0's decisions: who runs, in which slots, with which blocks, and what one step computes.

The scheduler plans; it never sees a tensor. `schedule` may be called again before the last plan's tokens are
known (`commit`): it counts on one token per running sequence and plan, and the device feeds that token to the next
step by itself. A sequence that turns out to have ended (end_id) then costs one token that is thrown away. Beams and
bad words are decided here, token by token, so their requests sit out a plan that is made too early for that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.beam import Beams, BeamSearch
from engine.blocks import BlockAllocator
from engine.plan import BeamReorder, Chunk, NewSequences, Plan, StepOutput
from engine.request import SHUTDOWN, Output, ParameterError, Request, Token


def check_length(request: Request, limit: int, what: str) -> None:
    """Raise ParameterError where prompt and output together exceed `limit` tokens of `what`."""
    total = len(request.prompt_ids) + request.sampling.max_new_tokens
    if total > limit:
        raise ParameterError(
            "max_new_tokens",
            f"is {request.sampling.max_new_tokens}; with the prompt's {len(request.prompt_ids)} tokens "
            f"that is {total}, and {what} is {limit} tokens",
        )


@dataclass(eq=False)
class Sequence:
    """One sequence of a request: a sample, or the place of a beam."""

    slot: int
    block_ids: list[int]
    output: Output
    num_sampled: int = 0  # tokens that some plan samples, whether known by now or not


@dataclass(eq=False)
class SequenceGroup:
    request: Request
    branches: list[Sequence]  # those that have not ended; all of them for beams
    beam_search: BeamSearch | None
    beams: Beams | None = None  # where its beams go on from
    num_prompt_planned: int = 0  # prompt tokens whose keys and values some plan computes
    num_in_flight: int = 0  # plans on their way that hold a part of it

    @property
    def is_decoding(self) -> bool:
        return self.num_prompt_planned == len(self.request.prompt_ids)

    @property
    def must_wait(self) -> bool:
        """Whether the next step can only be planned once the last one's tokens are known."""
        words = self.request.words
        return self.num_in_flight > 0 and (self.beam_search is not None or (words is not None and words.has_bad))


@dataclass(frozen=True)
class PendingOutput:
    """A part of a plan on its way: whose tokens, and what else, will come back for it."""

    running: SequenceGroup
    branches: list[Sequence]  # one per token
    has_candidates: bool
    has_prompt_log_probs: bool
    has_logits: bool


class Scheduler:
    """In-flight batching: requests join and leave between any two steps, first come, first served.

    A request enters when its slots are free and all blocks that it can ever need are: it is never preempted,
    and what runs always ends. Each step decodes every running sequence, and spends what is left of
    `max_step_tokens` on prompts, in pieces where they are long.
    """

    has_token_log_probs = True

    def __init__(
        self, max_batch_size: int, max_seq_len: int, max_step_tokens: int, block_size: int, num_blocks: int
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.max_step_tokens = max(max_step_tokens, max_batch_size)
        self.block_size = block_size
        self.blocks = BlockAllocator(num_blocks)
        self.waiting: deque[Request] = deque()
        self._running: list[SequenceGroup] = []  # in order of admission
        self._free_slots = list(reversed(range(max_batch_size)))
        self._in_flight: deque[list[PendingOutput]] = deque()  # per plan

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

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
        self.waiting.append(request)

    def schedule(self) -> Plan | None:
        """The next step, or None where there is nothing to compute."""
        plan = Plan([], self._admit())
        expected: list[PendingOutput] = []
        budget = self.max_step_tokens
        decodes = [r for r in self._running if r.is_decoding]
        prefills = [r for r in self._running if not r.is_decoding]
        for running in decodes:
            if not running.must_wait:
                budget -= self._plan_decode(running, plan, expected)
        for running in prefills:
            if budget == 0:
                break
            budget -= self._plan_prompt(running, budget, plan, expected)
        if not plan.chunks:
            return None
        for part in expected:
            part.running.num_in_flight += 1
        self._in_flight.append(expected)
        return plan

    def commit(self, step: StepOutput) -> None:
        """Take what the oldest plan not yet committed gave."""
        tokens, candidates = iter(step.tokens), iter(step.candidates)
        prompt_log_probs, logits = iter(step.prompt_log_probs), iter(step.next_token_logits)
        for part in self._in_flight.popleft():
            running, request = part.running, part.running.request
            running.num_in_flight -= 1
            own_tokens = [next(tokens) for _ in part.branches]
            own_candidates = next(candidates) if part.has_candidates else None
            own_log_probs = next(prompt_log_probs) if part.has_prompt_log_probs else []
            own_logits = next(logits) if part.has_logits else None
            if request.is_finished:  # ended while this step was on its way
                continue
            request.prompt_log_probs += own_log_probs
            if own_logits is not None:
                request.next_token_logits = own_logits
            if own_candidates is not None:
                running.beams = running.beam_search.advance(own_candidates)
                if running.beams is None:
                    self._end_beams(running)
            else:
                for branch, token in zip(part.branches, own_tokens, strict=True):
                    self._append(running, branch, token)
            if not running.branches:
                self._running.remove(running)
                request.is_finished = True
            if part.branches:
                request.on_update(request)

    def cancel(self, request: Request, reason: str) -> None:
        """End a request, waiting or running, with what it has; one that has ended, or never came, stays as it is."""
        running = next((r for r in self._running if r.request is request), None)
        if running is None:
            if request not in self.waiting:
                return
            self.waiting.remove(request)
        else:
            self._running.remove(running)
            if running.beam_search is not None:
                request.outputs = running.beam_search.results()
            for branch in list(running.branches):
                self._leave(running, branch)
        request.end(reason)

    def abort_all(self) -> None:
        """End every request; in-flight tokens are dropped when they come."""
        for request in [running.request for running in self._running] + list(self.waiting):
            self.cancel(request, SHUTDOWN)

    def _admit(self) -> list[NewSequences]:
        new_sequences = []
        while self.waiting and self.waiting[0].sampling.width <= len(self._free_slots):
            request = self.waiting[0]
            needed = self._blocks_needed(request)
            if sum(needed) > self.blocks.num_free:
                break
            self.waiting.popleft()
            block_ids = [self.blocks.allocate(count) for count in needed]
            shared = block_ids[0][: self._blocks_for(len(request.prompt_ids))]
            slots = [self._free_slots.pop() for _ in needed]
            sampling = request.sampling
            beam_search = BeamSearch(request) if sampling.beam_width > 1 else None
            outputs = [Output() for _ in slots] if beam_search else request.outputs
            branches = [
                Sequence(slot, ids if index == 0 else self.blocks.share(shared) + ids, output)
                for index, (slot, ids, output) in enumerate(zip(slots, block_ids, outputs, strict=True))
            ]
            self._running.append(SequenceGroup(request, branches, beam_search))
            banned = request.words.always_banned if request.words is not None else []
            new_sequences.append(NewSequences(slots, request.prompt_ids, sampling, request.end_id, block_ids, banned))
        return new_sequences

    def _plan_prompt(self, running: SequenceGroup, budget: int, plan: Plan, expected: list[PendingOutput]) -> int:
        """Plan the next piece of a prompt; returns its tokens."""
        request, start = running.request, running.num_prompt_planned
        length = min(len(request.prompt_ids) - start, budget)
        running.num_prompt_planned += length
        branches: list[Sequence] = []
        if running.is_decoding:
            branches = running.branches if running.beam_search is None else running.branches[:1]
        sampling = request.sampling
        slots = [branch.slot for branch in branches]
        banned = _banned(request, []) if slots else []
        plan.chunks.append(Chunk(running.branches[0].slot, start, length, slots, banned))
        is_beam = bool(slots) and running.beam_search is not None
        part = PendingOutput(
            running, list(branches), is_beam, sampling.prompt_log_probs, sampling.next_token_logits and bool(slots)
        )
        if slots or sampling.prompt_log_probs:
            expected.append(part)
        if slots:
            for branch in running.branches:
                branch.num_sampled += 1
        return length

    def _plan_decode(self, running: SequenceGroup, plan: Plan, expected: list[PendingOutput]) -> int:
        """Plan one more token of each of a request's sequences; returns how many."""
        request = running.request
        prompt_len = len(request.prompt_ids)
        if running.beam_search is not None:
            beams = running.beams
            branches = running.branches[: len(beams.parents)]
            all_slots = [branch.slot for branch in running.branches]
            slots = [branch.slot for branch in branches]
            parents = [all_slots[parent] for parent in beams.parents]
            start = prompt_len + branches[0].num_sampled - 1
            plan.beam_reorders.append(BeamReorder(slots, parents, start, beams.token_ids, beams.scores))
            outputs = [output.token_ids for _, output in running.beam_search.running]
        else:
            branches = [b for b in running.branches if b.num_sampled < request.sampling.max_new_tokens]
            outputs = [branch.output.token_ids for branch in branches]
        for branch, output_ids in zip(branches, outputs, strict=True):
            start = prompt_len + branch.num_sampled - 1
            plan.chunks.append(Chunk(branch.slot, start, 1, [branch.slot], _banned(request, output_ids)))
        for branch in running.branches if running.beam_search is not None else branches:
            branch.num_sampled += 1
        if branches:
            expected.append(PendingOutput(running, branches, running.beam_search is not None, False, False))
        return len(branches)

    def _append(self, running: SequenceGroup, branch: Sequence, token: Token) -> None:
        if branch.output.finish_reason is not None:  # ended while this step was on its way
            return
        branch.output.append(token)
        reason = running.request.reason_to_end(branch.output.token_ids)
        if reason is not None:
            branch.output.finish_reason = reason
            self._leave(running, branch)

    def _end_beams(self, running: SequenceGroup) -> None:
        running.request.outputs = running.beam_search.results()
        for branch in list(running.branches):
            self._leave(running, branch)

    def _leave(self, running: SequenceGroup, branch: Sequence) -> None:
        running.branches.remove(branch)
        self._free_slots.append(branch.slot)
        self.blocks.free(branch.block_ids)

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
