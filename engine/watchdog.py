"""Ends the process when something that must be quick takes too long: a rank that hangs would hang the job."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

_LOG = logging.getLogger("engine")
_CHECK_INTERVAL_S = 0.5


class Watchdog:
    """Watches one activity at a time, from a thread of its own.

    When a limit is exceeded the process may be stuck inside MPI or NCCL, where no exception reaches it; so it
    leaves with exit code 1 and without clean-up, and the launcher (mpirun, srun) ends the other ranks.
    """

    def __init__(self, before_exit: Callable[[], None] = lambda: None) -> None:
        self.before_exit = before_exit
        self._deadline = float("inf")
        self._message = ""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def limit(self, seconds: float, message: str) -> Iterator[None]:
        """While inside, the process has `seconds`; past them it logs `message` and ends."""
        self._message = message
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = float("inf")

    def allow(self, seconds: float, message: str) -> None:
        """From now on the process has `seconds`, for the way out: nothing lifts this but another call or `limit`."""
        self._message = message
        self._deadline = time.monotonic() + seconds

    def _watch(self) -> None:
        while True:
            time.sleep(_CHECK_INTERVAL_S)
            if time.monotonic() > self._deadline:
                _LOG.error("%s; ending the job", self._message)
                try:
                    self.before_exit()
                finally:
                    os._exit(1)
