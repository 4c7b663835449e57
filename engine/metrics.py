"""What the engine is busy with, as a line in the log now and then. Knows numbers only."""

from __future__ import annotations

import logging
import time

_LOG = logging.getLogger("engine")
INTERVAL_S = 10.0


class Statistics:
    """Counts steps, and logs what they were like, at most every `INTERVAL_S` seconds and only where there were any."""

    def __init__(self) -> None:
        self._reset(time.monotonic())

    def _reset(self, now: float) -> None:
        self._since = now
        self._num_steps = self._num_sequences = self._most = 0

    def count(self, num_sequences: int, num_waiting: int) -> None:
        """Take note of a step that gives each of `num_sequences` a token, while `num_waiting` requests wait."""
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
