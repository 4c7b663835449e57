"""The engine's throughput, as a log line every few seconds."""

from __future__ import annotations

import logging
import time

_LOG = logging.getLogger("engine")
INTERVAL_S = 10.0


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
