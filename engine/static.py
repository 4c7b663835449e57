"""Static batches for an executor that runs whole ones (FasterTransformer's op). Numbers only: no torch.

A batch is computed from its prompts to its longest output; requests that come meanwhile wait for the next one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.request import SHUTDOWN, Request, SamplingParams
from engine.scheduler import check_length


@dataclass(frozen=True)
class Batch:
    """Requests that run together, from first to last token, the same on every rank."""

    prompts: list[list[int]]
    sampling: list[SamplingParams]

    @property
    def num_steps(self) -> int:
        """The batch's output length: that of its longest request."""
        return max(params.max_new_tokens for params in self.sampling)


class StaticScheduler:
    """First come, first served, as many at once as fit.

    The op pads prompts to the longest and generates the longest output for all, so a request joins a batch only
    while longest prompt + longest output stay within `max_seq_len`; one that does not fit keeps its place in line.
    """

    def __init__(self, max_batch_size: int, max_seq_len: int, end_id: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.end_id = end_id
        self.waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that the op cannot run. May be called from any thread."""
        check_length(request, self.max_seq_len, "the longest sequence served")
        if request.end_id != self.end_id:
            raise ValueError(f"end_id is {request.end_id}; the FasterTransformer engine ends at {self.end_id} only")

    def add(self, request: Request) -> None:
        """Queue a request that `check` let pass."""
        self.waiting.append(request)

    def schedule(self) -> Batch | None:
        """The next batch, or None where nothing waits or one is on its way."""
        if self._running or not self.waiting:
            return None
        left: deque[Request] = deque()
        longest_prompt = longest_output = 0
        for request in self.waiting:
            prompt = max(longest_prompt, len(request.prompt_ids))
            output = max(longest_output, request.sampling.max_new_tokens)
            if len(self._running) < self.max_batch_size and prompt + output <= self.max_seq_len:
                self._running.append(request)
                longest_prompt, longest_output = prompt, output
            else:
                left.append(request)
        self.waiting = left
        return Batch([r.prompt_ids for r in self._running], [r.sampling for r in self._running])

    def commit(self, outputs: list[list[int]]) -> None:
        """Take the batch's tokens, one list per request, each cut to what its request asked for."""
        requests, self._running = self._running, []
        for request, token_ids in zip(requests, outputs, strict=True):
            if request.is_finished:  # aborted while the batch ran
                continue
            for token_id in token_ids:
                request.append(token_id)
                if request.is_finished:
                    break
            assert request.is_finished, (len(token_ids), request.sampling.max_new_tokens)
            request.publish(list(request.output_ids))

    def abort_all(self) -> None:
        """End every request; the running batch's tokens are dropped when they come."""
        for request in [*self._running, *self.waiting]:
            request.finish_reason = SHUTDOWN
            request.publish([])
        self.waiting.clear()
