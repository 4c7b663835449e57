"""The engine's loop on rank 0, and the loop of the other ranks.

Rank 0 alone decides. A step makes a plan, sends it to every rank, executes it and commits its tokens. The other ranks
execute the plans that they receive (`follow`), until they receive STOP.
"""

from __future__ import annotations

import enum
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Collection
from typing import Any, Protocol

from engine.metrics import Load, Observer, Progress, Statistics
from engine.request import CANCELLED, SHUTDOWN, EngineBusy, EngineStopping, Request, SamplingParams
from engine.watchdog import Watchdog
from engine.world import World

_LOG = logging.getLogger("engine")
_HEARTBEATS_PER_TIMEOUT = 4  # an idle rank 0 meets the other ranks this often
_WARM_UP_S = 120.0  # the first plan may take so much longer: it touches the memory and loads the kernels


class Control(enum.Enum):
    """Messages of rank 0 that are no plans."""

    HEARTBEAT = "heartbeat"
    STOP = "stop"


class Scheduling(Protocol):
    """Makes plans (engine.scheduler.Scheduler, engine.static.StaticScheduler)."""

    has_token_log_probs: bool  # whether outputs have a log-probability per token

    @property
    def waiting(self) -> Collection[Request]: ...
    @property
    def num_running(self) -> int: ...  # requests
    @property
    def num_cohorts(self) -> int: ...  # parts of the running requests that are planned in turn, 1 at least
    @property
    def kv_cache_usage(self) -> float: ...  # share of its blocks
    @property
    def max_seq_len(self) -> int: ...  # tokens of a request, prompt and output together
    @property
    def has_work(self) -> bool: ...
    def check(self, request: Request) -> None: ...
    def add(self, request: Request) -> None: ...
    def schedule(self) -> Any | None: ...
    def commit(self, step: Any) -> Progress: ...
    def cancel(self, request: Request, reason: str) -> None: ...
    def unfinished(self) -> list[Request]: ...  # running and waiting
    def abort_all(self) -> None: ...


class Executor(Protocol):
    """Runs plans (executor.runner.TorchExecutor, executor.fastertransformer.FasterTransformerExecutor)."""

    num_ahead: int  # plans of a cohort that may be launched before the last one's tokens are read
    num_stages: int  # pipeline stages, which may compute different plans at the same time
    max_seq_len: int  # tokens of a request, prompt and output together
    max_step_tokens: int  # tokens of one plan
    max_mixed_tokens: int  # tokens of one plan that decodes; 0: as many
    max_draft_rows: int  # rows of a step up to which drafts are worth their time
    num_blocks: int  # of the KV cache, once prepared; 0: it runs whole static batches

    def prepare(self) -> None: ...  # collective; every rank has loaded its weights
    def execute(self, plan: Any) -> Any: ...
    def close(self) -> None: ...  # frees what must go before the ranks leave their groups


class Engine:
    """Rank 0's engine. `submit` and `stop` may be called from any thread; `run` is the engine's own thread.

    observer: set it, if at all, after `warm_up` and before `run`.
    """

    def __init__(
        self,
        scheduler: Scheduling,
        executor: Executor,
        world: World,
        watchdog: Watchdog,
        step_timeout_s: float,
        max_queue_size: int,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.world = world
        self.watchdog = watchdog
        self.step_timeout_s = step_timeout_s
        self.max_queue_size = max_queue_size
        # (request, None): add it; (request, reason): end it; None: check whether to stop
        self._inbox: queue.SimpleQueue[tuple[Request, str | None] | None] = queue.SimpleQueue()
        self._submit_lock = threading.Lock()
        self._num_submitted = self._num_taken = 0  # their difference: requests in the inbox
        self._launched: deque[Any] = deque()
        self.observer: Observer | None = None
        self._statistics = Statistics()
        self._stop_at: float | None = None
        self._draining: list[Request] = []  # what was unfinished when the stop came
        self._is_warm = False

    def submit(self, *requests: Request) -> None:
        """Queue all requests, or none. Their `on_update` is called for every later change.

        Requests of other calls take turns with them (engine.waiting).

        Raises ValueError for a request that can never run, EngineBusy if the queue is full, EngineStopping if the
        engine stops.
        """
        for request in requests:
            self.scheduler.check(request)
        with self._submit_lock:  # requests in the inbox when a stop comes are still answered; later ones are refused
            self.check_room(len(requests))
            self._num_submitted += len(requests)
            now, origin = time.monotonic(), object()
            for request in requests:
                request.times.arrived, request.origin = now, origin
                self._inbox.put((request, None))

    def check_room(self, num_requests: int) -> None:
        """Raise as `submit` would where the queue does not take so many requests now. May be called at any time."""
        if num_requests > self.max_queue_size:
            raise ValueError(f"the request has {num_requests} prompts; at most {self.max_queue_size} may wait")
        if self._stop_at is not None:
            raise EngineStopping("the server is stopping and takes no new requests")
        num_waiting = self._num_waiting
        if num_waiting + num_requests > self.max_queue_size:
            raise EngineBusy(f"{num_waiting} requests wait already, and at most {self.max_queue_size} may")

    def cancel(self, request: Request) -> None:
        """End a submitted request soon, with the tokens it has. A request that has ended is not changed."""
        self._inbox.put((request, CANCELLED))

    def warm_up(self) -> None:
        """Run a prompt and a decode step: both touch memory and load kernels once. Then all ranks meet.

        The prompt has two tokens if possible: the step of a single one is like a decode step.
        """
        prompt_ids = [0] * max(1, min(2, self.scheduler.max_seq_len - 2))
        request = Request(prompt_ids, SamplingParams(2))
        self.scheduler.add(request)
        while not request.is_finished:
            self.step()
        self._meet(self.step_timeout_s)

    @property
    def has_token_log_probs(self) -> bool:
        return self.scheduler.has_token_log_probs

    @property
    def is_stopping(self) -> bool:
        return self._stop_at is not None

    @property
    def load(self) -> Load:
        """What runs and waits now; any thread may read it."""
        return Load(self.scheduler.num_running, self._num_waiting, self.scheduler.kv_cache_usage)

    @property
    def _num_waiting(self) -> int:
        return len(self.scheduler.waiting) + self._num_submitted - self._num_taken

    def stop(self, drain_timeout_s: float) -> None:
        """Let `run` return when every submitted request has ended, at the latest after `drain_timeout_s`."""
        with self._submit_lock:
            self._stop_at = min(self._stop_at or math.inf, time.monotonic() + drain_timeout_s)
            self._inbox.put(None)  # wakes the loop

    @property
    def drained(self) -> tuple[int, int]:
        """After `run`: how many of the requests that ran or waited when the stop came were finished, and cut off."""
        reasons = [{output.finish_reason for output in request.outputs} for request in self._draining]
        cut_off = sum(SHUTDOWN in found for found in reasons)
        return len(reasons) - cut_off - sum(CANCELLED in found for found in reasons), cut_off

    def run(self) -> None:
        """Step until stopped; sleep while there is no work. At the end, send STOP to the other ranks."""
        while not self._is_over():
            if not self.step() and not self._is_over():  # the step may have ended the last request of a drain
                self._sleep()
        self._take_inbox()
        self.scheduler.abort_all()
        while self._launched:
            self._commit()
        with self.watchdog.limit(self.step_timeout_s, "a rank does not answer"):
            self.world.send(Control.STOP)

    def step(self) -> bool:
        """One step of the whole job; returns whether there is more work."""
        self._take_inbox()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._statistics.count(plan.num_sequences, len(self.scheduler.waiting))
            if self.observer is not None:
                self.observer.count_plan(plan.num_tokens)
            with self._limit(plan.num_steps):
                self.world.post(plan)
                self._launched.append(self.executor.execute(plan))
        if self._launched and plan is None:
            self._commit()
        while len(self._launched) >= self.scheduler.num_cohorts * (1 + self.executor.num_ahead):
            self._commit()
        # A commit without a plan may have freed slots or blocks for a waiting request: then there is work at once.
        return bool(self._launched) or self.scheduler.has_work

    def _commit(self) -> None:
        with self._limit(1):
            output = self._launched.popleft().wait()
        self._is_warm = True
        progress = self.scheduler.commit(output)
        self._statistics.num_accepted += progress.num_accepted
        if self.observer is not None:
            self.observer.count_progress(progress)
            for request in progress.finished:
                self.observer.count_finished(request)

    def _limit(self, num_steps: int) -> Any:
        seconds = step_limit_s(self.step_timeout_s, num_steps, self._is_warm)
        return self.watchdog.limit(seconds, _hang(seconds))

    def _take_inbox(self) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, message: tuple[Request, str | None] | None) -> None:
        if message is None:
            self._draining = self._draining or self.scheduler.unfinished()
            return
        request, reason = message
        if reason is None:
            self.scheduler.add(request)
            self._num_taken += 1
        else:
            was_finished = request.is_finished
            self.scheduler.cancel(request, reason)
            if self.observer is not None and request.is_finished and not was_finished:
                self.observer.count_finished(request)

    def _sleep(self) -> None:
        try:
            self._take(self._inbox.get(timeout=self.step_timeout_s / _HEARTBEATS_PER_TIMEOUT))
        except queue.Empty:
            # The wait before counts too: a hung rank is noticed within step_timeout_s.
            self._meet(self.step_timeout_s * (1 - 1 / _HEARTBEATS_PER_TIMEOUT))

    def _meet(self, limit_s: float) -> None:
        """Wait for the other ranks, while nothing is on its way."""
        with self.watchdog.limit(limit_s, "a rank does not answer"):
            self.world.send(Control.HEARTBEAT)
            self.world.barrier()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        has_work = self.scheduler.has_work or self._launched or not self._inbox.empty()
        return not has_work or time.monotonic() > self._stop_at


def follow(world: World, executor: Executor, watchdog: Watchdog, step_timeout_s: float) -> None:
    """The loop of every rank but 0: execute rank 0's plans until STOP.

    Until all ranks have met, rank 0 may be silent for longer than a step takes: a later stage's part of the first plan
    takes long, too.
    """
    is_warm = False
    while True:
        plan = world.receive(timeout_s=step_timeout_s if is_warm else None)
        if plan is Control.STOP:
            return
        seconds = step_limit_s(step_timeout_s, getattr(plan, "num_steps", 1), is_warm)
        with watchdog.limit(seconds, _hang(seconds)):
            if plan is Control.HEARTBEAT:
                world.barrier()
                is_warm = True
            else:
                executor.execute(plan)


def step_limit_s(step_timeout_s: float, num_steps: int, is_warm: bool) -> float:
    """The watchdog's limit for a plan of `num_steps` forward passes: one second more for each further one."""
    return step_timeout_s + (num_steps - 1) + (0.0 if is_warm else _WARM_UP_S)


def _hang(seconds: float) -> str:
    return f"a step took longer than {seconds:.0f} s: a rank hangs (or --step-timeout-s is too short for this model)"
