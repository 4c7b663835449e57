"""Starting real ranks and real servers for the tests, and ending them whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tests.support.ranks import ROOT, kill_family, mpi_environment, mpirun_command

_CONVERT = """
import re, sys
from pathlib import Path
import convert
import readers.nemo
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), "fp16")
print(peak() - before)
"""


def wait_for(is_so: Callable[[], object], timeout_s: float = 20) -> None:
    """Ask until it is so."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"it is not so after {timeout_s:g} s"
        time.sleep(0.005)


def conversion_memory(source: Path, output_dir: Path, tp: int) -> int:
    """MiB by which a process grows at most while it converts. (VmHWM: a child's ru_maxrss starts at its parent's.)"""
    command = [sys.executable, "-c", _CONVERT, str(source), str(output_dir), str(tp)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


_PORTS = range(20_000, 32_000)  # below those that Linux hands out by itself
_port_locks: dict[int, IO[str]] = {}


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that no other test process gets: each has a file that this process locks until it ends."""
    folder = Path(tempfile.gettempdir(), f"test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    ports: list[int] = []
    while len(ports) < count:
        port = random.choice(_PORTS)
        if port not in _port_locks and _lock_port(folder / str(port), port):
            ports.append(port)
    return ports


def _lock_port(path: Path, port: int) -> bool:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
            probe.bind(("127.0.0.1", port))
    except OSError:
        file.close()
        return False
    _port_locks[port] = file
    return True


class Ports:
    """The ports of one server on 127.0.0.1."""

    def __init__(self) -> None:
        self.http, self.grpc, self.metrics, self.openai = free_ports(4)

    @property
    def port_flags(self) -> list[str]:
        """server.py's flags for them."""
        values = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics, "openai": self.openai}
        ports = [word for kind, port in values.items() for word in (f"--{kind}-port", str(port))]
        return ["--http-address", "127.0.0.1", *ports]


class Server(Ports):
    """server.py, or a script that wraps it, under mpirun, on ports of its own, its log in a file."""

    def __init__(
        self,
        num_ranks: int,
        log: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        script: str = "server.py",
    ) -> None:
        self.log = log
        super().__init__()
        command = mpirun_command(num_ranks, str(ROOT / script), *self.port_flags, *flags)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **mpi_environment(), **(environment or {})},
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = 300) -> Server:
        deadline = time.monotonic() + timeout_s
        while "ready: model" not in self.text:
            assert self.process.poll() is None, f"the server ended:\n{self.text}"
            assert time.monotonic() < deadline, f"the server is not ready after {timeout_s} s:\n{self.text}"
            time.sleep(0.1)
        return self

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def rank_pids(self) -> list[int]:
        """The ranks' processes, in no order: mpirun's children that run server.py."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop(self, number: int = signal.SIGUSR1, timeout_s: float = 60) -> int:
        """Signal the ranks (mpirun itself does not always pass a signal on) and return mpirun's exit code."""
        for pid in self.rank_pids:
            os.kill(pid, number)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End mpirun and all below it: each rank has a process group of its own, tritonserver a session."""
        kill_family(self.process)

    def url(self, kind: str = "http") -> str:
        return {"http": f"http://127.0.0.1:{self.http}", "grpc": f"grpc://127.0.0.1:{self.grpc}"}[kind]

    def client(self, *flags: str, kind: str = "http", timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """client.py against this server, without --model-name."""
        command = [sys.executable, str(ROOT / "client.py"), "--url", self.url(kind), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)

    def infer(self, model: str, inputs: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        """A raw HTTP request in Triton's JSON protocol: (status, answer)."""
        request = urllib.request.Request(
            f"{self.url()}/v2/models/{model}/infer",
            json.dumps({"inputs": inputs}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@contextlib.contextmanager
def serving(num_ranks: int, log: Path, *flags: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready inside the block and gone after it."""
    server = Server(num_ranks, log, *flags, environment=environment)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


def tensor(name: str, datatype: str, values: list[Any]) -> dict[str, Any]:
    """One input of Triton's JSON protocol, a value per row."""
    return {"name": name, "datatype": datatype, "shape": [len(values), 1], "data": values}


def sentence(answer: dict[str, Any]) -> str:
    """The error of an answer, without the class's name that PyTriton puts before it."""
    return re.sub(r"^(BadRequest|InternalError): ", "", answer.get("error", ""))


MODEL = "tiny-gpt2"


TEXTS = ["the rain in", "a", "so many more words than in any other of these prompts, and then some"]


def flags_of(folder: Path, tp: int = 1) -> list[str]:
    return ["--hf-model-name", str(folder), "--tp", str(tp), "--model-name", MODEL]
