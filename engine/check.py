"""server.py --check: what a long job needs of its ranks, hosts and network, within a minute. No torch here.

Each rank looks at what is its own and sends that to rank 0, which judges it (engine.judge) and prints a line for each
check. Rank 0 waits for no rank longer than a check's limit. A rank that does not answer ends the job: what follows
needs all of them.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from engine.judge import (
    Device,
    FolderView,
    Result,
    judge_devices,
    judge_folder,
    judge_hosts,
    judge_library,
    judge_rates,
    pair_rounds,
    silence,
)
from engine.signals import end_start_up, on_stop_signals
from engine.watchdog import Watchdog
from engine.world import Mail, is_surplus

_TOTAL_S = 45.0  # of all checks; with the imports before and the end after, less than a minute
_MARGIN_S = 5.0
_ANSWER_S = 10.0  # for a rank to answer in one check
_PAIRS_S = 25.0  # for a rank to measure its pairs or name the one that fails, which may wait for NCCL twice
_SEE_FILE_S = 3.0  # network file systems show a new file late


class Pairs(Protocol):
    """All-reduces between this rank and one other at a time."""

    kind: str  # MPI, NCCL or gloo
    num_bytes: int  # of the array that two ranks sum

    def seconds(self, rank: int) -> float: ...  # of one all-reduce; raises RuntimeError
    def close(self) -> None: ...  # once all pairs are measured


@dataclass(frozen=True)
class Machine:
    """What `run` asks of torch, on each rank."""

    device: Callable[[int], Device]  # of the rank's number on its host; raises nothing
    library: Callable[[], str | None]  # FasterTransformer's: as judge_library takes it
    gpu_pairs: Callable[[int, Sequence[str], Callable[[Any], Any]], Pairs]  # rank, hosts, rank 0's value to all ranks


class _Silence(Exception):
    """A rank does not answer rank 0, which has said so; or rank 0 does not answer."""


def run(mail: Mail, own: Sequence[Callable[[], Result]], machine: Machine, folder: Path, share: int) -> int:
    """Run all checks on one rank; returns its exit code, or ends the job with code 1.

    own: checks that rank 0 does alone, first. folder: which all ranks must share. share: bytes of the weights that a
    rank holds at least; 0: unknown.
    """
    if is_surplus(mail.size):
        return 1  # the other worlds' first says why
    # A rank that goes on after rank 0 has given up still writes its file; the launcher then ends it with a signal.
    on_stop_signals(partial(_remove_mark_and_end, _mark(folder, mail.rank)))
    checkup = _Checkup(mail)
    try:
        for check in own if mail.rank == 0 else ():
            checkup.show(check())
        checkup.find_hosts(folder)
        checkup.share_folder(folder)
        has_gpus = checkup.find_devices(machine, share)
        checkup.load_library(machine)
        checkup.measure_pairs(machine, has_gpus)
        return checkup.end()
    except _Silence:
        checkup.summarize()
        if mail.rank == 0:
            _remove_marks(folder)
        mail.abort()
        return 1


class _Checkup:
    """The checks that all ranks take part in: every rank calls the same methods in the same order."""

    def __init__(self, mail: Mail) -> None:
        self.mail = mail
        self.host = socket.gethostname()
        self.hosts: list[str] = []  # the ranks'
        self.num_failed = 0
        self._started = time.monotonic()
        self._tags = itertools.count(1)
        self._watchdog = Watchdog()
        self._begin("ports and Triton")

    def _begin(self, name: str) -> None:
        """Only for ranks that are stuck in a driver or a file system; all else has limits of its own."""
        who = f"rank {self.mail.rank} on {self.host}"
        self._watchdog.allow(self._left_s + _MARGIN_S, f"{who} is stuck in the check of {name}: look at this host")

    @property
    def _left_s(self) -> float:
        return self._started + _TOTAL_S - time.monotonic()

    def show(self, result: Result) -> None:
        """Rank 0: print a line."""
        if self.mail.rank == 0:
            self.num_failed += not result.ok
            print(result, flush=True)

    def summarize(self) -> None:
        """Rank 0: print how it ended."""
        if self.mail.rank == 0:
            what = f"{self.num_failed} FAILED" if self.num_failed else "all is well"
            print(f"{what}, after {time.monotonic() - self._started:.1f} s", flush=True)

    def find_hosts(self, folder: Path) -> None:
        """Ask each rank for its host. One that MPI does not reach may have written it into the folder."""
        self._begin("hosts")
        self.hosts = self._gather("hosts", self.host, lambda rank: _read(_mark(folder, rank)).partition(" ")[2])
        if self.mail.rank == 0:
            self.show(judge_hosts(self.hosts))

    def share_folder(self, folder: Path) -> None:
        """Each rank writes a file; rank 0 reads all of them, and the others read rank 0's."""
        self._begin("folder")
        is_new = not folder.exists()
        mark, word = _mark(folder, self.mail.rank), secrets.token_hex(8)
        error = _write(mark, f"{word} {self.host}")
        written = self._gather("folder", (mark.name, word, error, is_new))
        first_name, first_word, self.hosts = self._tell((mark.name, "" if error else word, self.hosts))
        deadline = time.monotonic() + _SEE_FILE_S
        answers = self._gather("folder", _sees(folder / first_name, first_word, deadline))
        if self.mail.rank == 0:
            deadline = time.monotonic() + _SEE_FILE_S
            views = [
                FolderView(error, sees_first, bool(error) or _sees(folder / name, word, deadline))
                for (name, word, error, _), sees_first in zip(written, answers, strict=True)
            ]
            self.show(judge_folder(folder, self.hosts, views))
        self._tell(None)  # rank 0 has read all files
        with suppress(OSError):
            mark.unlink()
        self._gather("folder", None)
        if any(is_new for *_, is_new in written):
            with suppress(OSError):
                folder.rmdir()

    def find_devices(self, machine: Machine, share: int) -> bool:
        """Each rank's GPU or CPU; returns whether all ranks have GPUs. Ranks share the memory of their host's CPU."""
        self._begin("devices")
        device = machine.device(self.hosts[: self.mail.rank].count(self.host))
        if not device.is_gpu:
            num_ranks = self.hosts.count(self.host)
            device = replace(device, free=device.free // num_ranks, total=device.total // num_ranks)
        devices = self._gather("devices", device)
        if self.mail.rank == 0:
            self.show(judge_devices(devices, self.hosts, share))
        return bool(self._tell(all(device.is_gpu and not device.error for device in devices)))

    def load_library(self, machine: Machine) -> None:
        """FasterTransformer's library, where a rank has it or is asked for it."""
        self._begin("library")
        errors = self._gather("library", machine.library())
        if any(error is not None for error in errors):
            self.show(judge_library(errors, self.hosts))

    def measure_pairs(self, machine: Machine, has_gpus: bool) -> None:
        """The rate between ranks of a host, and between hosts. A rank stops at its first pair that fails."""
        if self.mail.size == 1:
            return
        self._begin("all-reduce")
        pairs: Pairs = _MpiPairs(self.mail)
        if has_gpus:
            pairs = machine.gpu_pairs(self.mail.rank, self.hosts, self._tell)
        found: dict[int, float | str] = {}
        for pair in itertools.chain.from_iterable(pair_rounds(self.hosts)):
            if self.mail.rank in pair:
                other = sum(pair) - self.mail.rank
                try:
                    found[other] = pairs.seconds(other)
                except RuntimeError as error:
                    found[other] = " ".join(str(error).split())
                    break
        answers = self._gather("all-reduce", found, limit_s=_PAIRS_S)
        if self.mail.rank == 0:
            result = judge_rates(answers, self.hosts, pairs.kind, pairs.num_bytes)
            self.show(result)
            if not result.ok:  # a message that does not arrive would keep MPI from ending
                raise _Silence
        self._tell(None)
        pairs.close()

    def end(self) -> int:
        """All ranks end with the same code."""
        code = self._tell(min(self.num_failed, 1))
        self._watchdog.allow(float("inf"), "")
        self.summarize()
        return int(code)

    def _gather(
        self, name: str, value: Any, find_host: Callable[[int], str] = lambda rank: "", limit_s: float = _ANSWER_S
    ) -> list[Any]:
        """Rank 0: every rank's value, in rank order; other ranks: nothing. find_host: while `hosts` is unknown."""
        tag = next(self._tags)
        if self.mail.rank != 0:
            self.mail.post(value, 0, tag)
            return []
        limit_s = min(limit_s, self._left_s)
        answers = {0: value, **self.mail.collect(range(1, self.mail.size), tag, limit_s)}
        ranks = range(self.mail.size)
        missing = [rank for rank in ranks if rank not in answers]
        if missing:
            hosts = self.hosts or [answers.get(rank) or find_host(rank) or "an unknown host" for rank in ranks]
            self.show(silence(name, missing, hosts, limit_s))
            raise _Silence
        return [answers[rank] for rank in ranks]

    def _tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        tag = next(self._tags)
        if self.mail.rank == 0:
            for rank in range(1, self.mail.size):
                self.mail.post(value, rank, tag)
            return value
        answers = self.mail.collect([0], tag, self._left_s)
        if not answers:
            raise _Silence
        return answers[0]


class _MpiPairs:
    """All-reduces of two ranks over MPI: each sends its array to the other, and adds."""

    kind = "MPI"
    num_bytes = 4 << 20
    _TIMEOUT_S = 4.0

    def __init__(self, mail: Mail) -> None:
        self._mail = mail
        self._array = np.ones(self.num_bytes // 4, np.float32)

    def seconds(self, rank: int) -> float:
        """The fastest of three, after one that makes the connection."""
        other = np.empty_like(self._array)
        best = float("inf")
        for _ in range(4):
            started = time.monotonic()
            if not self._mail.exchange(self._array, other, rank, self._TIMEOUT_S):
                raise RuntimeError(
                    f"no answer over MPI within {self._TIMEOUT_S:g} s: look at the firewall between them, "
                    "and name the interface with OMPI_MCA_btl_tcp_if_include"
                )
            np.add(self._array, other, out=other)
            best = min(best, time.monotonic() - started)
        return best

    def close(self) -> None:
        """Nothing to free."""


def _mark(folder: Path, rank: int | str) -> Path:
    """A rank's file. Under Open MPI and Slurm, rank 0 knows its name without a message."""
    job = os.environ.get("PMIX_NAMESPACE", str(os.getppid())).replace("/", "-")
    return folder / f".check-{job}-{rank}"


def _remove_mark_and_end(mark: Path, number: int, frame: FrameType | None) -> None:
    """On a stop signal: a rank's own file does not stay behind."""
    with suppress(OSError):
        mark.unlink()
    end_start_up(number, frame)


def _remove_marks(folder: Path) -> None:
    """Remove the files of all ranks: those that do not answer cannot."""
    with suppress(OSError):
        for path in folder.glob(_mark(folder, "*").name):
            path.unlink()


def _write(path: Path, text: str) -> str:
    """Write a file, and its folder where there is none; returns the error, "" for none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return ""


def _read(path: Path) -> str:
    """A file's text; "" where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _sees(path: Path, word: str, deadline: float) -> bool:
    """Whether the file with this first word can be read, now or until the deadline."""
    while _read(path).partition(" ")[0] != word:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
