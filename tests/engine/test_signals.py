"""Stop signals at the end of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.launch import ROOT

# Python deletes the object after it has given signals back their defaults.
_PROGRAM = """
import os, signal
from engine.signals import ignore_late_sigusr1, on_stop_signals

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)

on_stop_signals(lambda number, frame: None)
late = Late()
"""


@pytest.mark.parametrize(("last_line", "code"), [("ignore_late_sigusr1()", 0), ("", -10)])
def test_a_signal_during_pythons_end_does_not_kill(last_line: str, code: int) -> None:
    assert subprocess.run([sys.executable, "-c", _PROGRAM + last_line], cwd=ROOT).returncode == code
