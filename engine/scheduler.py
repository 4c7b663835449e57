"""Rank 0's decisions: who runs, in which slot, with which blocks, and what one step computes.

The scheduler plans; it never sees a tensor. `schedule` may be called again before the last plan's tokens are
known (`commit`): it counts on one token per request and plan, and the device feeds that token to the next
step by itself. A request that turns out to have ended (end_id) then costs one token that is thrown away.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.blocks import BlockAllocator
from engine.request import SHUTDOWN, Request, SamplingParams


@dataclass(frozen=True)
class Admission:
    """A request that enters a slot: everything that ranks must know of it, once."""

    slot: int
    prompt_ids: list[int]
    sampling: SamplingParams
    block_ids: list[int]


@dataclass(frozen=True)
class Chunk:
    """A slot's tokens [start, start + length) in one step; `samples` where they reach the last known token."""

    slot: int
    start: int
    length: int
    samples: bool


@dataclass(frozen=True)
class Plan:
    """One step of the whole job, the same on every rank: chunks that decode come first, then prompts."""

    chunks: list[Chunk]
    admissions: list[Admission] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Forward passes that this plan stands for (the watchdog's limit grows with it)."""
        return 1

    @property
    def sampled_slots(self) -> list[int]:
        return [chunk.slot for chunk in self.chunks if chunk.samples]


def check_length(request: Request, limit: int, what: str) -> None:
    """Raise ValueError where prompt and output together exceed `limit` tokens of `what`."""
    total = len(request.prompt_ids) + request.sampling.max_new_tokens
    if total > limit:
        raise ValueError(
            f"request_output_len is {request.sampling.max_new_tokens}; with the prompt's "
            f"{len(request.prompt_ids)} tokens that is {total}, and {what} is {limit} tokens"
        )


@dataclass(eq=False)
class _Running:
    request: Request
    slot: int
    block_ids: list[int]
    num_planned: int = 0  # tokens whose keys and values some plan computes
    num_sampled: int = 0  # tokens that some plan samples, whether known by now or not

    @property
    def num_known(self) -> int:
        """Prompt and sampled tokens: a step may compute all of them that no plan has computed."""
        return len(self.request.prompt_ids) + self.num_sampled

    @property
    def is_all_planned(self) -> bool:
        return self.num_sampled == self.request.sampling.max_new_tokens


class Scheduler:
    """In-flight batching: requests join and leave between any two steps, first come, first served.

    A request enters when a slot is free and all blocks that it can ever need are: it is never preempted,
    and what runs always ends. Each step decodes every running request, and spends what is left of
    `max_step_tokens` on prompts, in pieces where they are long.
    """

    def __init__(
        self, max_batch_size: int, max_seq_len: int, max_step_tokens: int, block_size: int, num_blocks: int
    ) -> None:
        self.max_seq_len = max_seq_len
        self.max_step_tokens = max(max_step_tokens, max_batch_size)
        self.block_size = block_size
        self.blocks = BlockAllocator(num_blocks)
        self.waiting: deque[Request] = deque()
        self._running: list[_Running] = []  # in order of admission
        self._free_slots = list(reversed(range(max_batch_size)))
        self._in_flight: deque[list[_Running]] = deque()  # per plan: who gets a token

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that could never run. May be called from any thread."""
        check_length(request, self.max_seq_len, "the longest sequence served")
        check_length(request, self.blocks.num_blocks * self.block_size, "the key-value cache")

    def add(self, request: Request) -> None:
        """Queue a request that `check` let pass."""
        self.waiting.append(request)

    def schedule(self) -> Plan | None:
        """The next step, or None where there is nothing to compute."""
        chunks: list[Chunk] = []
        sampled: list[_Running] = []
        budget = self.max_step_tokens
        admissions = self._admit()
        decodes = [r for r in self._running if 0 < r.num_sampled and not r.is_all_planned]
        prefills = [r for r in self._running if r.num_sampled == 0]
        for running in decodes + prefills:
            length = min(running.num_known - running.num_planned, budget)
            if length == 0:
                break
            budget -= length
            start = running.num_planned
            running.num_planned += length
            samples = running.num_planned == running.num_known
            chunks.append(Chunk(running.slot, start, length, samples))
            if samples:
                running.num_sampled += 1
                sampled.append(running)
        if not chunks:
            return None
        self._in_flight.append(sampled)
        return Plan(chunks, admissions)

    def commit(self, token_ids: list[int]) -> None:
        """Take the tokens of the oldest plan not yet committed, one per sampled slot, in the plan's order."""
        sampled = self._in_flight.popleft()
        assert len(sampled) == len(token_ids), (len(sampled), len(token_ids))
        for running, token_id in zip(sampled, token_ids, strict=True):
            request = running.request
            if request.is_finished:  # ended while this step was on its way
                continue
            request.append(token_id)
            if request.is_finished:
                self._leave(running)
            request.publish([token_id])

    def abort_all(self) -> None:
        """End every request, waiting or running, with what it has; in-flight tokens are dropped later."""
        requests = [running.request for running in self._running] + list(self.waiting)
        for running in list(self._running):
            self._leave(running)
        self.waiting.clear()
        for request in requests:
            request.finish_reason = SHUTDOWN
            request.publish([])

    def _admit(self) -> list[Admission]:
        admissions = []
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            block_ids = self.blocks.allocate(self._blocks_for(request))
            if block_ids is None:
                break
            self.waiting.popleft()
            slot = self._free_slots.pop()
            self._running.append(_Running(request, slot, block_ids))
            admissions.append(Admission(slot, request.prompt_ids, request.sampling, block_ids))
        return admissions

    def _leave(self, running: _Running) -> None:
        self._running.remove(running)
        self._free_slots.append(running.slot)
        self.blocks.free(running.block_ids)

    def _blocks_for(self, request: Request) -> int:
        # The last sampled token is never computed, so its keys and values need no place.
        tokens = len(request.prompt_ids) + request.sampling.max_new_tokens - 1
        return -(-tokens // self.block_size)
