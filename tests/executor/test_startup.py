"""How many threads a rank takes, from what launchers and users set."""

from __future__ import annotations

import os

import pytest

from executor.startup import claim_cores

VARIABLES = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "SLURM_CPUS_PER_TASK", "OMPI_COMM_WORLD_SIZE", "SLURM_JOB_ID")


@pytest.mark.parametrize(
    ("environment", "local_size", "expected"),
    [
        ({}, 2, 4),
        ({}, 16, 1),
        ({"OMP_NUM_THREADS": "3"}, 2, 3),
        ({"SLURM_CPUS_PER_TASK": "2"}, 1, 2),
        ({"SLURM_CPUS_PER_TASK": "2", "OMPI_COMM_WORLD_SIZE": "1"}, 1, 8),  # sbatch's, not of mpirun's ranks
        ({"OMP_THREAD_LIMIT": "1"}, 2, 1),  # oneDNN gave garbage with more threads than the limit
        ({"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "6"}, 2, 2),
        ({"OMP_NUM_THREADS": "many"}, 2, 4),
    ],
)
def test_threads_of_a_rank(
    environment: dict[str, str], local_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert claim_cores(local_size) == expected
