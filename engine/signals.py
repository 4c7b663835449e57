"""Stop signals of a rank: what the first one does, and that the second one ends the process."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType

_LOG = logging.getLogger("server")
# mpirun kills its ranks 0.3 to 1 s after its own SIGTERM or SIGINT; most versions forward SIGUSR1 and wait.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def on_stop_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    """Call `handle` at each stop signal from now on."""
    for number in _STOP_SIGNALS:
        signal.signal(number, handle)


def ignore_late_sigusr1() -> None:
    """Ignore SIGUSR1 from now on: it would kill once Python's end has given it back its default.

    So would SIGTERM and SIGINT, but who sends those wants the process to end in any case.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_start_up(number: int, _frame: FrameType | None) -> None:
    """Exit at once: no request is in flight yet; the launcher ends the other ranks."""
    _LOG.error("%s during start-up; ending the job", signal.Signals(number).name)
    os._exit(128 + number)


class SecondSignal:
    """Calls `first` for the first signal; the second ends the process at once, after `before_exit`."""

    def __init__(self, first: Callable[[int], None], before_exit: Callable[[], None] = lambda: None) -> None:
        self.first = first
        self.before_exit = before_exit
        self.num_signals = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.num_signals += 1
        if self.num_signals == 1:
            self.first(number)
        else:
            self.before_exit()
            os._exit(1)
