"""The supervisor in this process, with a toy behind a real Triton: what fails is replaced, what is slow is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import psutil
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from serving.triton import supervisor as supervision
from serving.triton.frontend import TritonFlags
from serving.triton.supervisor import Backoff, TritonSupervisor
from serving.triton.workspace import remove_leftovers
from tests.support import attacks
from tests.support.attacks import Target
from tests.support.launch import free_ports
from tests.support.ranks import ROOT
from tests.support.toy import Toy

RECOVERY_S = 15.0
REST = pytest.mark.slow("its like stays")


class AtOnce(Backoff):
    """So that the tests' many restarts do not wait."""

    def wait_s(self, now: float) -> float:
        return 0.0


class Served:
    """A toy, its supervisor, and a target for attacks."""

    def __init__(self, toy: Toy, supervisor: TritonSupervisor) -> None:
        self.toy = toy
        self.supervisor = supervisor
        flags = supervisor.flags
        body = {"steps": 1, "delay": 0.0}
        self.target = Target(flags.http_port, flags.grpc_port, os.getpid(), "toy", body, "text", "delay", "error")

    def begin(self, pool: ThreadPoolExecutor, count: int) -> None:
        """Begin requests of an hour, of both models in turn; returns once all run."""
        started = self.toy.started
        for index in range(count):
            url = f"http://127.0.0.1:{self.target.http}/v2/models/toy{'_streaming' * (index % 2)}/generate"
            body = json.dumps({"steps": 1, "delay": 3600.0}).encode()
            pool.submit(urllib.request.urlopen, url, body)
        deadline = time.monotonic() + 20
        while self.toy.started < started + count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def toy_server() -> Iterator[Served]:
    with mock.patch.dict(os.environ), mock.patch.object(supervision, "Backoff", AtOnce):
        toy = Toy()
        told: list[None] = []
        flags = TritonFlags("127.0.0.1", *free_ports(3))
        supervisor = TritonSupervisor(flags, toy.models(), verbose=False, on_restart=lambda: told.append(None))
        try:
            supervisor.start()
            yield Served(toy, supervisor)
            supervisor.stop()
            assert len(told) == supervisor.num_restarts
        finally:
            supervisor.kill()


@pytest.fixture
def served(toy_server: Served) -> Served:
    """The toy's server, which answers: one test's Triton may be replaced after the test."""
    deadline = time.monotonic() + 60
    while toy_server.target.answering() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return toy_server


@pytest.mark.parametrize(
    "attack",
    [
        attacks.kill_stub,
        attacks.stop_triton,
        pytest.param(attacks.kill_triton, marks=REST),
        pytest.param(attacks.stop_stub, marks=REST),
        attacks.classify_http,
        pytest.param(attacks.classify_grpc, marks=REST),
        pytest.param(lambda target: attacks.claim_shape(target, 31), marks=REST),
        pytest.param(lambda target: attacks.claim_shape(target, 36), marks=REST),
    ],
    ids=["kill stub", "stop triton", "kill triton", "stop stub", "HTTP", "gRPC", "2^31", "2^36"],
)
def test_what_ends_triton_is_over_soon(served: Served, attack: Callable[[Target], tuple[str, float]]) -> None:
    outcome, seconds = attack(served.target)
    assert outcome == "restarted"
    assert seconds < RECOVERY_S


@REST
def test_an_endless_body_is_over_soon(served: Served) -> None:
    """Triton ends it itself at the limit of its memory, and answers on; or it is replaced."""
    outcome, seconds = attacks.endless_body(served.target)
    assert outcome == "restarted" or outcome.startswith("broken after")
    assert seconds < RECOVERY_S


def test_half_open_connections_lock_nobody_out(served: Served) -> None:
    outcome, seconds = attacks.half_open(served.target)
    assert outcome == "answers beside them"
    assert seconds < 2


def test_a_silent_model_is_replaced_and_a_slow_process_is_not(served: Served) -> None:
    restarts = served.supervisor.num_restarts
    served.toy.blocks_s = 4.5  # its loop answers nobody; Triton is fine
    assert served.target.ask(timeout_s=30)
    assert served.supervisor.num_restarts == restarts
    served.toy.is_mute = True
    began = time.monotonic()
    try:
        while served.supervisor.num_restarts == restarts:
            assert time.monotonic() - began < RECOVERY_S
            time.sleep(0.01)
    finally:
        served.toy.is_mute = False
    time.sleep(2)
    assert served.supervisor.num_restarts == restarts + 1


@pytest.mark.slow("half a minute")
def test_a_prompt_of_400_mb_takes_its_time(served: Served) -> None:
    restarts = served.supervisor.num_restarts
    outcome, _ = attacks.large_prompt(served.target)
    assert outcome == "answered 400"
    assert served.supervisor.num_restarts == restarts


@pytest.mark.slow("half a minute of all cores")
def test_a_busy_machine_is_no_failure(served: Served) -> None:
    restarts = served.supervisor.num_restarts
    count = 4 * (os.cpu_count() or 1)
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        with ThreadPoolExecutor(16) as pool:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                assert all(pool.map(lambda _: served.target.ask(timeout_s=60), range(16)))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert served.supervisor.num_restarts == restarts


@pytest.mark.slow("starts a Triton")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_grpc_is_encrypted_where_there_is_a_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    flags = TritonFlags("127.0.0.1", *free_ports(3), grpc_certfile=str(certificate), grpc_keyfile=str(key))
    supervisor = TritonSupervisor(flags, Toy().models(), verbose=False)
    assert supervisor.urls[1] == f"grpcs://127.0.0.1:{flags.grpc_port}"
    try:
        supervisor.start()
        url = f"localhost:{flags.grpc_port}"
        assert triton_grpc.InferenceServerClient(url, ssl=True, root_certificates=str(certificate)).is_server_ready()
        with pytest.raises(InferenceServerException):
            triton_grpc.InferenceServerClient(url).is_server_ready(client_timeout=5)
        supervisor.stop()
    finally:
        supervisor.kill()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"grpc_certfile": "/no/such"}, "grpc_certfile is '/no/such', and there is no such file"),
        ({"grpc_keyfile": __file__}, f"grpc_keyfile is {__file__!r}; it needs grpc_certfile, too"),
    ],
)
def test_half_of_tls_is_refused(files: dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        TritonFlags(**files)
    assert str(error.value) == expected


def resources(served: Served) -> dict[str, int]:
    """What a process has, and its user."""
    process = psutil.Process()
    folder = served.supervisor._instance.workspace.path.parent
    return {
        "files": process.num_fds(),
        "threads": threading.active_count(),
        "processes": len(process.children(recursive=True)),
        "workspaces": len([path for path in folder.iterdir() if f"-{os.getpid()}-" in path.name]),
        "shared memory": len(list(Path("/dev/shm").glob(f"pytrtion{os.getpid()}-*"))),
    }


def test_requests_in_flight_are_cancelled_and_nothing_is_left(served: Served) -> None:
    before: dict[str, int] = {}
    for _ in range(2):  # the first time makes what is made once
        before, cancelled = resources(served), served.toy.cancelled
        with ThreadPoolExecutor(8) as pool:
            served.begin(pool, 8)
            outcome, _ = attacks.kill_triton(served.target)  # leaving the pool waits for the clients' errors
        assert outcome == "restarted"
        assert served.toy.cancelled == cancelled + 8
        time.sleep(3)  # its threads end
    deadline = time.monotonic() + 70  # a thread was once still there after 20 s
    while any(now > then for now, then in zip(resources(served).values(), before.values(), strict=True)):
        assert time.monotonic() < deadline, (before, resources(served), threading.enumerate())
        time.sleep(0.1)


def test_leftovers_of_killed_servers_are_removed_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    tag = "make = Workspace(Path(sys.argv[1])); print(make.path, make.shared_memory_prefix, flush=True); input()"
    script = f"import sys; from pathlib import Path; from serving.triton.workspace import Workspace; {tag}"
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        made = [owner.stdout.readline().decode().split() for owner in owners]
        folders = [Path(folder) for folder, _ in made]
        segments = [Path("/dev/shm", f"{prefix}-segment") for _, prefix in made]
        for segment in segments:
            segment.touch()
        assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 2
        owners[0].kill()
        owners[0].wait()
        assert remove_leftovers(tmp_path) == 1
        assert [path.exists() for path in (*folders, *segments)] == [False, True, False, True]
    finally:
        for owner in owners:
            owner.kill()
            owner.wait()
    assert remove_leftovers(tmp_path) == 1
    assert not any(path.exists() for path in (*folders, *segments))


def test_the_third_restart_within_a_minute_waits() -> None:
    backoff = Backoff()
    assert [backoff.wait_s(now) for now in (0, 10, 20, 30, 45, 65)] == [0, 0, 5, 10, 15, 15]
    assert backoff.is_waiting
    assert [backoff.wait_s(now) for now in (200, 290)] == [0, 0]
    assert not backoff.is_waiting
