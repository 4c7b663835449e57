"""Real ranks under mpirun: a script run to its end, and ranks that stay and run one function after another."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 180.0  # generous: it guards against a hang, and a busy machine takes its time
_CALL_TIMEOUT_S = 600.0


@functools.cache
def has_open_mpi_4() -> bool:
    """Whether mpirun is Open MPI 4's, as Debian has it, and not PyPI's 5."""
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    return re.search(r"\b4\.\d", version) is not None


def mpi_environment() -> dict[str, str]:
    """Named transports start in 0.3 s instead of 1.4; shared memory has another name in Open MPI 4."""
    return {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": f"self,{'vader' if has_open_mpi_4() else 'sm'}"}


def mpirun_command(num_ranks: int, *command: str) -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *root, "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks), sys.executable, *command]


def mpirun(num_ranks: int, *command: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a Python script on ranks to its end; its output is shown where an assertion on it fails."""
    environment = {**os.environ, **mpi_environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        mpirun_command(num_ranks, *command), capture_output=True, text=True, timeout=timeout_s, env=environment
    )


def kill_family(process: subprocess.Popen[Any]) -> None:
    """End mpirun and all below it: each rank has a process group of its own, tritonserver a session.

    What they leave is removed: a folder of prterun's, over which a later one with the same pid would fail to start
    ("The PMIx server's listener thread failed to start"), and PyTriton's shared memory.
    """
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    for pid in {process.pid, *(member.pid for member in family)}:
        shutil.rmtree(Path(tempfile.gettempdir(), f"ompi.{pid}"), ignore_errors=True)
        for path in Path("/dev/shm").glob(f"pytrtion{pid}-*"):
            path.unlink(missing_ok=True)


class Ranks:
    """Ranks of one mpirun that stay until `close`; tests/multi/pool.py is what they run."""

    def __init__(self, num_ranks: int) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._log = Path(self._scratch.name, "log")
        self._num_ranks = num_ranks
        self._connections: list[Connection] = []  # in rank order
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(Path(self._scratch.name, "socket")))
        self._listener.listen()
        self._listener.settimeout(0.5)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                mpirun_command(num_ranks, str(ROOT / "tests/multi/pool.py"), self._listener.getsockname()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **mpi_environment(), "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def call(self, function: str, *arguments: Any) -> list[Any]:
        """Run "module:name" as name(world, *arguments) on every rank; each rank's result, in rank order.

        Fails with what the ranks have printed where one of them raises an exception or does not answer in time.
        """
        self._connections = self._connections or self._accept()
        try:
            for connection in self._connections:
                connection.send((function, arguments))
            if all(connection.poll(_CALL_TIMEOUT_S) for connection in self._connections):
                return [connection.recv() for connection in self._connections]
        except (EOFError, OSError):  # the ranks are gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        raise AssertionError(f"{function} failed on the ranks:\n{self._log.read_text()[-6000:]}")

    def _accept(self) -> list[Connection]:
        connections: dict[int, Connection] = {}
        deadline = time.monotonic() + _START_TIMEOUT_S
        while len(connections) < self._num_ranks:
            with contextlib.suppress(TimeoutError):
                accepted = self._listener.accept()[0]
                accepted.setblocking(True)
                connection = Connection(accepted.detach())
                connections[connection.recv()] = connection
            is_alive = self._process.poll() is None
            assert is_alive and time.monotonic() < deadline, f"no ranks:\n{self._log.read_text()[-6000:]}"
        return [connections[rank] for rank in range(self._num_ranks)]

    def close(self) -> None:
        """End the ranks."""
        for connection in self._connections:
            connection.close()
        if self._connections:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        kill_family(self._process)
        self._listener.close()
        self._scratch.cleanup()


_kept: dict[int, Ranks] = {}


def call_ranks(num_ranks: int, function: str, *arguments: Any) -> list[Any]:
    """`Ranks.call` on ranks that are started at their first use and kept for this process's other tests."""
    if num_ranks not in _kept:
        _kept[num_ranks] = Ranks(num_ranks)
    try:
        return _kept[num_ranks].call(function, *arguments)
    except BaseException:
        _kept.pop(num_ranks).close()  # the next call starts others
        raise


@atexit.register
def _close_all() -> None:
    while _kept:
        _kept.popitem()[1].close()


def run_engine(folder: Path, items: list[dict[str, Any]], tp: int, pp: int, *flags: str) -> list[dict[str, Any]]:
    """traffic.results of each of traffic's items, after a crowd on tp × pp ranks."""
    return _engine_parity("generate", folder, items, tp, pp, *flags)


def run_soak(folder: Path, items: list[dict[str, Any]], tp: int, pp: int, *flags: str) -> Any:
    """tests.support.soak.run of its items on tp × pp ranks."""
    return _engine_parity("soak", folder, items, tp, pp, *flags)


def run_logits(folder: Path, prompts: list[list[int]], tp: int, pp: int, *flags: str) -> np.ndarray:
    """[prompts, vocab] fp32: the next token's logits on tp × pp ranks."""
    return _engine_parity("logits", folder, prompts, tp, pp, *flags)


def _engine_parity(function: str, folder: Path, inputs: list[Any], tp: int, pp: int, *flags: str) -> Any:
    """The one result that is not None."""
    arguments = (f"tests.multi.engine_parity:{function}", inputs, str(folder), "--tp", str(tp), "--pp", str(pp), *flags)
    if "cuda" in flags:  # ranks that stay would keep their GPUs' memory
        ranks = Ranks(tp * pp)
        try:
            results = ranks.call(*arguments)
        finally:
            ranks.close()
    else:
        results = call_ranks(tp * pp, *arguments)
    (result,) = [result for result in results if result is not None]
    return result


def greedy_items(prompts: list[list[int]], output_len: int) -> list[dict[str, Any]]:
    """Items that `run_engine` takes."""
    return [{"prompt_ids": ids, "sampling": {"max_new_tokens": output_len}} for ids in prompts]


def first_outputs(results: list[dict[str, Any]]) -> list[list[int]]:
    """The token ids of each result's first output."""
    return [result["outputs"][0]["token_ids"] for result in results]
