#!/usr/bin/env python3
"""Faults of a running server and what becomes of it: a row for each fault.

    python benchmarks/faults.py
    python benchmarks/faults.py --only SIGSTOP

Each fault has a server of its own (2 ranks, models/stories, --step-timeout-s 5), which 8 streams of each front end use.
A row says whether the server went on or ended, after how many seconds, mpirun's exit code, how many clients were told
and after how long at most, what is left of the server, and the last error of its log. The exit code is 1 where

- a fault that the server must survive ended it, or answers came back after more than 15 s,
- another fault did not end it with a code other than 0 within the limit of a step and 10 s,
- a cut link between two hosts did not end it within the limit of a step and 5 s (mpirun's code says nothing there: Open
  MPI 5 ends with 0 where it loses its daemon on the other host first),
- a client waited on for as long,
- a process is left.

A full disk and a cut link need root: for a file system of its own, and for hosts that are network namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from engine.flags import add_flags
from tests.support import nodes
from tests.support.attacks import Target, target_of
from tests.support.launch import Server
from tests.support.ranks import ROOT
from tests.support.scrape import scrape

_MODEL = "stories"
_STEP_TIMEOUT_S = 5.0
_MOST_S = {True: 15.0, False: _STEP_TIMEOUT_S + 10.0}  # to be back, to be over
_CLIENTS = 8  # of each front end
_NEW_TOKENS = 250
_LEFT_S = 5.0  # for processes to end after mpirun has
_BEHIND_TRITON = ("tritonserver", "a stub")
_FAULTY = "tests/support/faulty_server.py"


@dataclass(frozen=True)
class Fault:
    """act: makes the fault; returns when it did, in time.monotonic(). goes_on: whether the server must survive it."""

    name: str
    act: Callable[[Server], float]
    goes_on: bool = False
    script: str = "server.py"
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What came of a fault."""

    fault: str
    exit_code: int | None  # None: it goes on
    seconds: float  # until it answers again, or mpirun has ended and all below it
    told: int  # clients that got an error or an end
    told_s: float  # until the last of them was told
    left: tuple[str, ...]
    last_line: str
    problems: tuple[str, ...]


def main() -> int:
    flags = parse_flags()
    rows = []
    for fault in table():
        if flags.only in fault.name:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(made(fault, Path(folder)))
            show(rows[-1])
    for name, obstacle, make in (
        ("full disk", None if os.geteuid() == 0 else "only root can mount a file system", full_disk),
        ("cut link", nodes.why_not(), cut_link),
    ):
        if flags.only in name and obstacle is not None:
            print(f"{name:<32} skipped: {obstacle}")
        elif flags.only in name:
            rows.append(make())
            show(rows[-1])
    report(torch.device("cpu"), benchmark="faults", model=_MODEL, tp=2, rows=[asdict(row) for row in rows])
    return 1 if any(row.problems for row in rows) else 0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, BenchmarkFlags, "rows", ("only",))
    return parser.parse_args()


def table() -> list[Fault]:
    """The faults that a running server meets."""

    def send(number: int, find: Callable[[Server], int]) -> Callable[[Server], float]:
        def act(server: Server) -> float:
            os.kill(find(server), number)
            return time.monotonic()

        return act

    def in_step(rank: int, kind: str) -> Fault:
        act = send(signal.SIGUSR2, lambda server: rank_pid(server, rank))
        return Fault(f"{kind} in a step of rank {rank}", act, script=_FAULTY, environment={"FAULT": kind})

    processes: list[tuple[str, Callable[[Server], int]]] = [
        ("mpirun", lambda server: server.process.pid),
        ("rank 0", lambda server: rank_pid(server, 0)),
        ("rank 1", lambda server: rank_pid(server, 1)),
        ("tritonserver", lambda server: target_of(server, _MODEL).triton.pid),
        ("a stub", lambda server: target_of(server, _MODEL).triton.children(recursive=True)[0].pid),
    ]
    kills = [Fault(f"kill -9 of {name}", send(signal.SIGKILL, p), name in _BEHIND_TRITON) for name, p in processes]
    # mpirun is left out: while it is stopped, its ranks serve on.
    stops = [Fault(f"SIGSTOP of {name}", send(signal.SIGSTOP, p), name in _BEHIND_TRITON) for name, p in processes[1:]]
    steps = [in_step(rank, kind) for kind in ("exception", "memory") for rank in (0, 1)]
    return [*kills, *stops, *steps, Fault("kill -9 of all clients", vanish, goes_on=True)]


def rank_pid(server: Server, rank: int) -> int:
    """The process of a rank."""
    variable = f"PMIX_RANK={rank}".encode()
    return next(p for p in server.rank_pids if variable in Path(f"/proc/{p}/environ").read_bytes().split(b"\0"))


def vanish(server: Server) -> float:
    """Let a process with 32 streams die; returns when it died, once its requests are cancelled."""
    before = scrape(server.openai)["num_requests_running"]
    script = f"from benchmarks.faults import crowd; crowd({server.openai})"
    client = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while scrape(server.openai)["num_requests_running"] < before + 8:
        time.sleep(0.1)
    client.kill()
    began = time.monotonic()
    client.wait()
    while scrape(server.openai)["num_requests_running"] > before:
        time.sleep(0.05)
    return began


def crowd(port: int, count: int = 32) -> None:
    """Streams that run until this process ends."""
    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(stream, port, "openai")


def stream(port: int, front_end: str) -> None:
    """Read a stream to its end. Raises OSError or HTTPException where the server ends it."""
    path, body = {
        "openai": ("v1/completions", {"prompt": "Once", "max_tokens": _NEW_TOKENS, "ignore_eos": True, "stream": True}),
        "triton": (
            f"v2/models/{_MODEL}_streaming/generate_stream",
            {"prompts": "Once", "request_output_len": _NEW_TOKENS, "ignore_eos": True},
        ),
    }[front_end]
    url = f"http://127.0.0.1:{port}/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
        while answer.readline():
            pass


class Clients:
    """Streams of both front ends, one after the other, until the server ends one or `stop`."""

    def __init__(self, openai: int, http: int) -> None:
        """openai, http: the server's ports."""
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(2 * _CLIENTS)
        ports = {"openai": openai, "triton": http}
        self._ends: list[Future[float]] = [
            self._pool.submit(self._run, port, name) for name, port in ports.items() for _ in range(_CLIENTS)
        ]

    def _run(self, port: int, front_end: str) -> float:
        """When the server ended a stream of it; 0 where it did not."""
        while not self._is_over.is_set():
            try:
                stream(port, front_end)
            except (OSError, http.client.HTTPException):
                return time.monotonic()
        return 0.0

    def stop(self) -> list[float]:
        """When each was told by an error, sorted."""
        self._is_over.set()
        ends = sorted(end.result() for end in self._ends)
        self._pool.shutdown()
        return [end for end in ends if end]


def made(fault: Fault, folder: Path) -> Row:
    """Start a server, make the fault, and see what becomes of both sides."""
    paths = {"PYTRITON_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    environment = {"OMP_NUM_THREADS": "1", **paths, **fault.environment}
    options = ["--hf-model-name", str(ROOT / "models/stories"), "--tp", "2", "--output-dir", str(folder)]
    options += ["--step-timeout-s", f"{_STEP_TIMEOUT_S:g}"]
    server = Server(2, folder / "log", *options, environment=environment, script=fault.script)
    try:
        server.wait_ready()
        target = target_of(server, _MODEL)
        family = psutil.Process(server.process.pid).children(recursive=True)
        clients = Clients(server.openai, server.http)
        while scrape(server.openai)["num_requests_running"] < 2 * _CLIENTS:
            time.sleep(0.1)
        began = fault.act(server)
        code = watch(server, target, fault.goes_on, began)
        left = list(leftovers(family)) if code is not None else []
        seconds = time.monotonic() - began
        told = clients.stop()
    finally:
        server.kill()
    problems = []
    if fault.goes_on != (code is None) or code == 0:
        problems.append("went on" if code is None else f"ended with {code}")
    if seconds > _MOST_S[fault.goes_on]:
        problems.append("too late")
    if told and told[-1] - began > _MOST_S[fault.goes_on]:
        problems.append("a client waited")
    problems += [f"left: {name}" for name in left]
    told_s = told[-1] - began if told else 0.0
    return Row(fault.name, code, seconds, len(told), told_s, tuple(left), last_error(server.text), tuple(problems))


def watch(server: Server, target: Target, goes_on: bool, began: float) -> int | None:
    """Wait until the server has ended or, where it must go on, answers; its exit code, or None where it runs."""
    while time.monotonic() - began < 2 * _MOST_S[goes_on]:
        code = server.process.poll()
        if code is not None:
            return code
        if goes_on and target.answering() is not None:
            return None
        time.sleep(0.05)
    return None


def leftovers(family: list[psutil.Process]) -> Iterator[str]:
    """The processes that are there a while after mpirun has ended, and are ended here."""
    _, alive = psutil.wait_procs(family, timeout=_LEFT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process.name()
            process.kill()


def full_disk() -> Row:
    """Start a server whose --output-dir is on a file system of 8 MB."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder, "disk")
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
        try:
            began = time.monotonic()
            options = ["--hf-model-name", str(ROOT / "models/stories"), "--tp", "2", "--output-dir", str(disk)]
            server = Server(2, Path(folder, "log"), *options)
            try:
                code = server.process.wait(60)
            finally:
                server.kill()
            left = tuple(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
            problems = ("ended with 0",) if code == 0 else ()
            return Row("full disk", code, time.monotonic() - began, 0, 0.0, left, last_error(server.text), problems)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
            shutil.rmtree(disk)


def cut_link() -> Row:
    """Serve on two hosts with tp 2, and take the cables between them out. Clients and Triton are on the first host."""
    with tempfile.TemporaryDirectory() as folder, nodes.two_nodes(Path(folder)) as hosts:
        with nodes.serving_on(hosts, 2, 1, "--step-timeout-s", f"{_STEP_TIMEOUT_S:g}") as server:
            script = f"from benchmarks.faults import tell; tell({server.openai}, {server.http})"
            command = hosts.on("n0", sys.executable, "-c", script)
            clients = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert clients.stdin is not None and clients.stdout is not None
            clients.stdout.readline()  # all streams run
            hosts.cut()
            began = time.monotonic()
            while (left := hosts.processes()) and time.monotonic() - began < 2 * _MOST_S[False]:
                time.sleep(0.05)
            seconds = time.monotonic() - began
            told = json.loads(clients.communicate("\n")[0])
            names = tuple(process.name() for process in left)
            code = server.process.poll()
        problems = [f"left: {name}" for name in names]
        if seconds > _STEP_TIMEOUT_S + 5:
            problems.append("too late")
        if len(told) < 2 * _CLIENTS or told[-1] - began > _STEP_TIMEOUT_S + 5:
            problems.append("a client waited")
        told_s = told[-1] - began if told else 0.0
        return Row("cut link", code, seconds, len(told), told_s, names, last_error(server.text), tuple(problems))


def tell(openai: int, http: int) -> None:
    """Run streams on a server's ports; print a line once all run, and after a line of stdin when each was told."""
    clients = Clients(openai, http)
    while scrape(openai)["num_requests_running"] < 2 * _CLIENTS:
        time.sleep(0.1)
    print("all run", flush=True)
    sys.stdin.readline()
    print(json.dumps(clients.stop()))


def last_error(text: str) -> str:
    """The last warning or error of the log; without one, what mpirun says between two lines of dashes."""
    errors = re.findall(r"^\S+ (?:ERROR|WARNING) .*$", text, re.MULTILINE)
    blocks = re.findall(r"^-{20,}$(.*?)^-{20,}$", text, re.MULTILINE | re.DOTALL)
    return " ".join((errors or blocks or [""])[-1].split())


def show(row: Row) -> None:
    """Print a row."""
    end = "goes on" if row.exit_code is None else f"ends with {row.exit_code}"
    print(
        f"{row.fault:<32} {end:<15} after {row.seconds:5.1f} s | {row.told} clients told, after {row.told_s:.1f} s"
        f" | left: {', '.join(row.left) or 'nothing'} | {row.last_line}"
        + "".join(f" | WRONG: {problem}" for problem in row.problems),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
