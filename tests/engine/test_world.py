"""The MPI world and the groups' collectives, under mpirun."""

from __future__ import annotations

import re
import time

from tests.support.launch import ROOT
from tests.support.ranks import call_ranks, mpirun


def test_control_channel() -> None:
    done = mpirun(3, str(ROOT / "tests/multi/control_channel.py"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_silent_rank_0_ends_the_job() -> None:
    started = time.monotonic()
    done = mpirun(3, str(ROOT / "tests/multi/control_channel.py"), "--silent")
    assert done.returncode != 0
    assert re.search(r"rank [12] on \S+ heard nothing for 0 s", done.stdout), done.stdout + done.stderr
    assert time.monotonic() - started < 40


def test_collectives() -> None:
    call_ranks(4, "tests.multi.collectives:check")
