"""The MPI world and the groups' collectives, under mpirun."""

from __future__ import annotations

from tests.launch import ROOT, mpirun


def test_control_channel() -> None:
    done = mpirun(3, str(ROOT / "tests/multi/control_channel.py"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_collectives() -> None:
    done = mpirun(4, str(ROOT / "tests/multi/collectives.py"))
    assert done.returncode == 0, done.stdout + done.stderr
