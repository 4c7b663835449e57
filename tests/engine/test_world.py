"""The MPI world and the groups' collectives, under mpirun."""

from __future__ import annotations

import re
import time

import pytest

from engine.world import check_size, is_surplus
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


@pytest.mark.parametrize(
    ("variables", "is_second", "expected"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False, "2 Slurm tasks, .*: start with srun --mpi=pmix"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, True, "2 Slurm tasks, .*: start with srun --mpi=pmix"),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            True,
            "2 mpirun tasks, .* of mpi4py's MPI library",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False, None),  # mpirun inside a job
        ({}, False, None),
    ],
)
def test_worlds_of_one_rank_by_mistake(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_second: bool, expected: str | None
) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_surplus(1) == is_second
    if expected is None:
        check_size(1, 1, "mpirun -n 1")
    else:
        with pytest.raises(ValueError, match=expected):
            check_size(1, 1, "mpirun -n 1")
