"""What the engine tells about itself: events for an observer, its load, and a log line every few seconds."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

from engine.request import Request

_LOG = logging.getLogger("engine")
INTERVAL_S = 10.0


@dataclass(slots=True)
class Progress:
    """What the output of one plan brought.

    started: requests that got their first token; num_tokens: new tokens, without those of beams, which are known at
    a request's end; gaps: (seconds since their last token, number of sequences); finished: requests that ended;
    num_preempted: requests that lost their slots and blocks for a time, since the last output; num_queried, num_hit:
    prompt tokens that were looked for in the prefix cache since then, and found.
    """

    started: list[Request] = field(default_factory=list)
    num_tokens: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    num_preempted: int = 0
    num_queried: int = 0
    num_hit: int = 0


@dataclass(frozen=True)
class Load:
    """The engine at one moment. kv_cache_usage: the share of its blocks that requests hold."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float


class Observer(Protocol):
    """Counts what the engine does. The engine's thread calls it: it must be quick and must not raise."""

    def count_plan(self, num_tokens: int) -> None:
        """A plan computes this many tokens of prompts and outputs."""
        ...

    def count_progress(self, progress: Progress) -> None:
        """A plan's output came."""
        ...

    def count_finished(self, request: Request) -> None:
        """A request ended, by itself or cancelled; one that ends with the server is not counted."""
        ...


class Statistics:
    """Counts steps, and logs their averages at most every INTERVAL_S seconds; an idle engine logs nothing."""

    def __init__(self) -> None:
        self._reset(time.monotonic())

    def _reset(self, now: float) -> None:
        self._since = now
        self._num_steps = self._num_sequences = self._most = 0

    def count(self, num_sequences: int, num_waiting: int) -> None:
        """Count a step: num_sequences get a token each, num_waiting requests wait."""
        now = time.monotonic()
        if now - self._since >= INTERVAL_S:
            if self._num_steps > 1:
                _LOG.info(
                    "%d steps, %.1f sequences a step (at most %d), %d requests waiting, %.0f tokens/s",
                    self._num_steps,
                    self._num_sequences / self._num_steps,
                    self._most,
                    num_waiting,
                    self._num_sequences / (now - self._since),
                )
            self._reset(now)
        self._num_steps += 1
        self._num_sequences += num_sequences
        self._most = max(self._most, num_sequences)
