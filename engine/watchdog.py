"""Ends the process if a step takes longer than its limit: a hung rank would hang the whole job."""

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

    A process past its limit may be stuck inside MPI or NCCL, and no exception reaches it there. So it exits with code
    1 and without clean-up; the launcher (mpirun, srun) ends the other ranks. before_exit: called first.
    """

    def __init__(self, before_exit: Callable[[], None] = lambda: None) -> None:
        self.before_exit = before_exit
        self._deadline = float("inf")
        self._message = ""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def limit(self, seconds: float, message: str) -> Iterator[None]:
        """While inside, the process has `seconds`; after them it logs `message` and exits."""
        self._message = message
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = float("inf")

    def allow(self, seconds: float, message: str) -> None:
        """Give the process `seconds` from now to end; only another call or `limit` removes this limit."""
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
