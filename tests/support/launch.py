"""Starting real ranks and real servers for the tests, and ending them whatever happens."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def mpi_environment() -> dict[str, str]:
    """Named transports start in 0.3 s instead of 1.4; shared memory has another name in Open MPI 4."""
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    shared_memory = "vader" if re.search(r"\b4\.\d", version) else "sm"
    return {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": f"self,{shared_memory}"}


def mpirun_command(num_ranks: int, *command: str) -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *root, "--oversubscribe", "--bind-to", "none", "-n", str(num_ranks), sys.executable, *command]


def mpirun(num_ranks: int, *command: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a Python script on ranks to its end; its output is shown where an assertion on it fails."""
    environment = {**os.environ, **mpi_environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        mpirun_command(num_ranks, *command), capture_output=True, text=True, timeout=timeout_s, env=environment
    )


def run_engine(folder: Path, items: list[dict[str, Any]], tp: int, pp: int, *flags: str) -> list[dict[str, Any]]:
    """traffic.results of each of traffic's items, after a crowd on tp × pp ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        requests, outputs = Path(scratch, "requests.json"), Path(scratch, "outputs.json")
        requests.write_text(json.dumps(items))
        _engine_parity(folder, requests, tp, pp, "--outputs", str(outputs), *flags)
        return json.loads(outputs.read_text())


def greedy_items(prompts: list[list[int]], output_len: int) -> list[dict[str, Any]]:
    """Items that `run_engine` takes."""
    return [{"prompt_ids": ids, "sampling": {"max_new_tokens": output_len}} for ids in prompts]


def first_outputs(results: list[dict[str, Any]]) -> list[list[int]]:
    """The token ids of each result's first output."""
    return [result["outputs"][0]["token_ids"] for result in results]


def run_logits(folder: Path, prompts: list[list[int]], tp: int, pp: int, *flags: str) -> np.ndarray:
    """[prompts, vocab] fp32: the next token's logits on tp × pp ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        requests, logits = Path(scratch, "requests.json"), Path(scratch, "logits.npy")
        requests.write_text(json.dumps(greedy_items(prompts, 1)))
        _engine_parity(folder, requests, tp, pp, "--logits", str(logits), *flags)
        return np.load(logits)


def _engine_parity(folder: Path, requests: Path, tp: int, pp: int, *flags: str) -> None:
    script = str(ROOT / "tests/multi/engine_parity.py")
    done = mpirun(tp * pp, script, str(folder), str(requests), "--tp", str(tp), "--pp", str(pp), *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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


def conversion_memory(source: Path, output_dir: Path, tp: int) -> int:
    """MiB by which a process grows at most while it converts. (VmHWM: a child's ru_maxrss starts at its parent's.)"""
    command = [sys.executable, "-c", _CONVERT, str(source), str(output_dir), str(tp)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Server:
    """server.py under mpirun, on ports of its own, its log in a file."""

    def __init__(self, num_ranks: int, log: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.log = log
        self.http, self.grpc, self.metrics = free_ports(3)
        ports = ["--http-port", str(self.http), "--grpc-port", str(self.grpc), "--metrics-port", str(self.metrics)]
        command = mpirun_command(num_ranks, str(ROOT / "server.py"), "--http-address", "127.0.0.1", *ports, *flags)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **mpi_environment(), **(environment or {})},
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = 120) -> Server:
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
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

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
