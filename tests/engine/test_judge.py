"""The judgements of server.py --check: each sentence has the rank, its host, the value and the remedy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from engine.judge import (
    Device,
    FolderView,
    Result,
    attempt,
    judge_devices,
    judge_folder,
    judge_hosts,
    judge_library,
    judge_rates,
    pair_rounds,
    silence,
)

HOSTS = ["n0", "n0", "n1", "n1"]
GPU = Device("H100", True, 79_000_000_000, 85_000_000_000)
CPU = Device("CPU", False, 4_000_000_000, 8_000_000_000)
WELL = FolderView("", True, True)


def test_a_line_has_the_outcome_the_name_and_the_sentence() -> None:
    assert str(Result("ports", True, "free")) == "ok      ports       free"
    assert str(Result("all-reduce", False, "slow")) == "FAILED  all-reduce  slow"


def test_an_error_is_one_line() -> None:
    def fail() -> str:
        raise RuntimeError("no\nport: take another")

    assert attempt("ports", fail) == Result("ports", False, "no port: take another")
    assert attempt("ports", lambda: "free") == Result("ports", True, "free")


def test_hosts_are_counted() -> None:
    assert judge_hosts([*HOSTS, "n2"]).sentence == "2 ranks on n0, 2 ranks on n1, 1 rank on n2"


def test_silent_ranks_are_named_with_their_hosts() -> None:
    assert silence("hosts", [3], HOSTS, 10).sentence == (
        "rank 3 on n1 does not answer rank 0 on n0 within 10 s: "
        "look at its host, its process and the network between them"
    )
    assert silence("hosts", [2, 3], HOSTS, 10).sentence.startswith("rank 2 on n1, rank 3 on n1 do not answer rank 0")


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (WELL, "/w is seen and written by all ranks"),
        (
            replace(WELL, error="Permission denied"),
            "rank 2 on n1 cannot write to /w (Permission denied): give ",
        ),
        (
            replace(WELL, sees_first=False),
            "rank 2 on n1 does not see what rank 0 on n0 wrote to /w: put --output-dir on",
        ),
        (replace(WELL, is_seen=False), "rank 0 on n0 does not see what rank 2 on n1 wrote to /w: put --output-dir"),
    ],
)
def test_the_folder_is_seen_both_ways(view: FolderView, expected: str) -> None:
    result = judge_folder(Path("/w"), HOSTS, [WELL, WELL, view, WELL])
    assert result.ok == (view is WELL)
    assert result.sentence.startswith(expected)


@pytest.mark.parametrize(
    ("device", "share", "expected"),
    [
        (GPU, 0, "4 × H100; a rank has 79 of 85 GB free"),
        (GPU, 30_000_000_000, "4 × H100; a rank has 79 of 85 GB free, and its weights take 30 GB at least"),
        (replace(GPU, name="", error="no GPU of its own"), 0, "rank 2 on n1: no GPU of its own"),
        (CPU, 0, "rank 2 on n1 sees no GPU, and rank 0 on n0 has H100: look at the driver there (nvidia-smi)"),
        (
            replace(GPU, free=12_300_000_000),
            30_000_000_000,
            "rank 2 on n1: H100 has 12.3 of 85 GB free, and its weights take 30 GB at least: end what uses it",
        ),
    ],
)
def test_devices(device: Device, share: int, expected: str) -> None:
    result = judge_devices([GPU, GPU, device, GPU], HOSTS, share)
    assert result.ok == (device is GPU)
    assert result.sentence.startswith(expected)


def test_the_library_loads_on_all_ranks() -> None:
    assert judge_library(["", "", "", ""], HOSTS) == Result(
        "library", True, "FasterTransformer's library loads on 4 ranks"
    )
    assert judge_library(["", "", "bad ELF", ""], HOSTS).sentence == "rank 2 on n1: bad ELF"
    assert judge_library(["", "", None, ""], HOSTS).sentence.startswith("rank 2 on n1: no FasterTransformer library at")


@pytest.mark.parametrize("ranks_of_hosts", [(1,), (2,), (8,), (1, 1), (8, 8), (3, 1, 2), (1,) * 8, (8,) * 16])
def test_pairs_join_all_ranks_and_all_hosts_in_few_rounds(ranks_of_hosts: tuple[int, ...]) -> None:
    hosts = [f"n{number}" for number, count in enumerate(ranks_of_hosts) for _ in range(count)]
    rounds = pair_rounds(hosts)
    pairs = list(chain.from_iterable(rounds))
    assert len(set(pairs)) == len(pairs)
    assert all(len(set(chain.from_iterable(pairs))) == 2 * len(pairs) for pairs in rounds)
    within = sum(hosts[a] == hosts[b] for a, b in pairs)
    assert within == len(hosts) - len(ranks_of_hosts)
    apart = [int(hosts[b][1:]) - int(hosts[a][1:]) for a, b in pairs if hosts[a] != hosts[b]]
    assert Counter(apart) == {d: len(ranks_of_hosts) - d for d in (1, 2, 4, 8) if d < len(ranks_of_hosts)}
    assert len(rounds) <= 2 + 3 * len(set(apart))


def test_rates_are_those_of_the_slower_end() -> None:
    found: list[dict[int, float | str]] = [{1: 0.001, 2: 0.1}, {0: 0.002}, {3: 0.001, 0: 0.1}, {2: 0.001}]
    result = judge_rates(found, HOSTS, "MPI", 4 << 20)
    assert result == Result(
        "all-reduce", True, "MPI, 4 MiB: 2097 to 4194 MB/s within a host; 42 MB/s between n0 and n1"
    )


def test_the_pair_that_both_ends_call_broken_is_named() -> None:
    """Rank 0 waits in vain for rank 2, which waits for rank 3."""
    found: list[dict[int, float | str]] = [{1: 0.001, 2: "no answer"}, {0: 0.001}, {3: "no answer"}, {2: "no answer"}]
    result = judge_rates(found, HOSTS, "NCCL", 4 << 20)
    assert result == Result("all-reduce", False, "rank 2 on n1 with rank 3 on n1: no answer")
