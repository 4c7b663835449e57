"""The judgements of server.py --check: what all ranks found, in rank order → one Result with one sentence. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """A check's outcome. sentence: where it is not ok, it names the rank, the value and the remedy."""

    name: str
    ok: bool
    sentence: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':6}  {self.name:10}  {self.sentence}"


@dataclass(frozen=True)
class Device:
    """What a rank computes on. free, total: bytes of memory, of the CPU this rank's part; error: why it has none."""

    name: str
    is_gpu: bool
    free: int
    total: int
    error: str = ""


@dataclass(frozen=True)
class FolderView:
    """What a rank found in the shared folder. error: why it could not write."""

    error: str
    sees_first: bool  # what rank 0 wrote
    is_seen: bool  # rank 0 sees what it wrote


def attempt(name: str, check: Callable[[], str]) -> Result:
    """The Result of a check that returns a sentence, or raises an error that has one."""
    try:
        return Result(name, True, check())
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return Result(name, False, " ".join(str(error).split()))


def on_host(rank: int, hosts: Sequence[str]) -> str:
    """A rank as all sentences name it."""
    return f"rank {rank} on {hosts[rank]}"


def num_ranks(count: int) -> str:
    """A number of ranks in words."""
    return "1 rank" if count == 1 else f"{count} ranks"


def judge_hosts(hosts: Sequence[str]) -> Result:
    """Ranks per host; there is no wrong number, as long as each rank finds a device."""
    counts = Counter(hosts).items()
    listed = ", ".join(f"{num_ranks(count)} on {host}" for host, count in counts)
    return Result("hosts", True, listed)


def silence(name: str, ranks: Sequence[int], hosts: Sequence[str], limit_s: float) -> Result:
    """Ranks that have not answered."""
    who = ", ".join(on_host(rank, hosts) for rank in ranks)
    verb, whose = ("does", "its host, its process") if len(ranks) == 1 else ("do", "their hosts, their processes")
    asked = f"{who} {verb} not answer {on_host(0, hosts)} within {limit_s:.0f} s"
    return Result(name, False, f"{asked}: look at {whose} and the network between them")


def judge_folder(folder: Path, hosts: Sequence[str], views: Sequence[FolderView]) -> Result:
    """Every rank must write there, see what rank 0 wrote, and be seen by rank 0."""
    for rank, view in enumerate(views):
        if view.error:
            remedy = "give a folder where all ranks may write with --output-dir"
            return Result("folder", False, f"{on_host(rank, hosts)} cannot write to {folder} ({view.error}): {remedy}")
        if not (view.sees_first and view.is_seen):
            writer, reader = (rank, 0) if view.sees_first else (0, rank)
            lost = f"{on_host(reader, hosts)} does not see what {on_host(writer, hosts)} wrote to {folder}"
            return Result("folder", False, f"{lost}: put --output-dir on a file system that all hosts share")
    return Result("folder", True, f"{folder} is seen and written by all ranks")


def judge_devices(devices: Sequence[Device], hosts: Sequence[str], share: int) -> Result:
    """Each rank needs a device with memory for its share of the weights: `share` bytes at least; 0: unknown."""
    with_gpu = [device.is_gpu for device in devices]
    for rank, device in enumerate(devices):
        if device.error:
            return Result("devices", False, f"{on_host(rank, hosts)}: {device.error}")
    if any(with_gpu) and not all(with_gpu):
        one, other = with_gpu.index(False), with_gpu.index(True)
        found = f"{on_host(one, hosts)} sees no GPU, and {on_host(other, hosts)} has {devices[other].name}"
        return Result("devices", False, f"{found}: look at the driver there (nvidia-smi), or give --device cpu")
    for rank, device in enumerate(devices):
        if device.free < share:
            found = f"{on_host(rank, hosts)}: {device.name} has {_gb(device.free)} of {_gb(device.total)} GB free"
            wanted = f"its weights take {_gb(share)} GB at least"
            return Result("devices", False, f"{found}, and {wanted}: end what uses it, or start more ranks")
    kinds = ", ".join(f"{count} × {name}" for name, count in Counter(device.name for device in devices).items())
    least = min(devices, key=lambda device: device.free)
    need = f", and its weights take {_gb(share)} GB at least" if share else ""
    return Result("devices", True, f"{kinds}; a rank has {_gb(least.free)} of {_gb(least.total)} GB free{need}")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}"


def judge_library(errors: Sequence[str | None], hosts: Sequence[str]) -> Result:
    """FasterTransformer's library must load on every rank. "": it did; None: there is none."""
    for rank, error in enumerate(errors):
        if error is None:
            error = "no FasterTransformer library at --lib-path, which other ranks have"
        if error:
            return Result("library", False, f"{on_host(rank, hosts)}: {error}")
    return Result("library", True, f"FasterTransformer's library loads on {num_ranks(len(errors))}")


def pair_rounds(hosts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of ranks: neighbours on each host, then the first ranks of hosts that are 1, 2, 4, … apart.

    The pairs of a round have no rank in common, so that they can run at once. Few rounds suffice for many hosts.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    within = [pair for ranks in by_host.values() for pair in itertools.pairwise(ranks)]
    firsts = [ranks[0] for ranks in by_host.values()]
    distances = [1 << k for k in range((len(firsts) - 1).bit_length())]
    between = [pair for distance in distances for pair in zip(firsts, firsts[distance:], strict=False)]
    rounds: list[list[tuple[int, int]]] = []
    for pairs in (within, between):
        first = len(rounds)
        for pair in pairs:
            for known in rounds[first:]:
                if not any(set(pair) & set(other) for other in known):
                    known.append(pair)
                    break
            else:
                rounds.append([pair])
    return rounds


def judge_rates(found: Sequence[dict[int, float | str]], hosts: Sequence[str], kind: str, num_bytes: int) -> Result:
    """All-reduces of `num_bytes` between two ranks: per rank, the other one → its seconds, or why there are none.

    A rank stops at its first failure, so the rank that waits for it next fails too: a pair that both ranks call broken
    is named before one that only one of them does.
    """
    broken = [(rank, other) for rank, answers in enumerate(found) for other, s in answers.items() if isinstance(s, str)]
    if broken:
        rank, other = next((pair for pair in broken if pair[::-1] in broken), broken[0])
        reason = found[rank][other]
        return Result("all-reduce", False, f"{on_host(rank, hosts)} with {on_host(other, hosts)}: {reason}")
    rates: dict[tuple[int, int], float] = {}
    for rank, answers in enumerate(found):
        for other, seconds in answers.items():
            pair = min(rank, other), max(rank, other)
            rates[pair] = min(rates.get(pair, float("inf")), num_bytes / float(seconds) / 1e6)
    within = [rate for (a, b), rate in rates.items() if hosts[a] == hosts[b]]
    between = {pair: rate for pair, rate in rates.items() if hosts[pair[0]] != hosts[pair[1]]}
    parts = []
    if within:
        span = f"{min(within):.0f} to {max(within):.0f}" if len(within) > 1 else f"{within[0]:.0f}"
        parts.append(f"{span} MB/s within a host")
    if between:
        slowest = min(between, key=lambda pair: between[pair])
        ends = f"{hosts[slowest[0]]} and {hosts[slowest[1]]}"
        parts.append(f"{max(between.values()):.0f} MB/s at best between hosts, {between[slowest]:.0f} between {ends}")
    if len(between) == 1:
        parts[-1] = f"{between[slowest]:.0f} MB/s between {ends}"
    return Result("all-reduce", True, f"{kind}, {num_bytes >> 20} MiB: {'; '.join(parts)}")
