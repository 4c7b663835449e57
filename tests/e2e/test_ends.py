"""Real server.py under real mpirun: signals, deaths of a rank or of Triton."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.launch import MODEL, Server, flags_of, serving, tensor


def ask_in_background(server: Server, output_len: int) -> tuple[threading.Thread, list]:
    """A request, and a list for its answer or error; returns once a stream that was begun after it has a token."""
    answers: list = []

    def ask() -> None:
        inputs = [tensor("prompts", "BYTES", ["word"]), tensor("request_output_len", "UINT32", [output_len])]
        try:
            answers.append(server.infer(MODEL, inputs))
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    body = json.dumps({"prompts": "word", "request_output_len": output_len}).encode()
    urllib.request.urlopen(f"{server.url()}/v2/models/{MODEL}_streaming/generate_stream", body, timeout=60).readline()
    return thread, answers


def test_a_signal_drains_and_all_ranks_exit_0(converted: Callable[[int], Path], tmp_path: Path) -> None:
    with serving(2, tmp_path / "log", *flags_of(converted(2), 2)) as server:
        thread, answers = ask_in_background(server, 250)
        assert server.stop(signal.SIGUSR1) == 0, server.text
        thread.join()
        status, answer = answers[0]
        assert status == 200, answer
        assert "SIGUSR1: finishing what is in flight" in server.text


@pytest.mark.parametrize(
    "victim",
    [
        "a rank dies",
        pytest.param("a rank hangs", marks=pytest.mark.slow("the commonest death stays; each starts a server")),
        pytest.param("triton dies", marks=pytest.mark.slow("the commonest death stays; each starts a server")),
    ],
)
def test_a_death_ends_the_job_and_answers_the_client(
    converted: Callable[[int], Path], tmp_path: Path, victim: str
) -> None:
    with serving(2, tmp_path / "log", *flags_of(converted(2), 2), "--step-timeout-s", "5") as server:
        pids = server.rank_pids
        family = psutil.Process(server.process.pid).children(recursive=True)
        leader = next(p.ppid() for p in family if p.name() == "tritonserver")
        follower = next(pid for pid in pids if pid != leader)
        thread, answers = ask_in_background(server, 250)
        started = time.monotonic()
        if victim == "triton dies":
            next(p for p in family if p.name() == "tritonserver").kill()
        else:
            os.kill(follower, signal.SIGKILL if victim == "a rank dies" else signal.SIGSTOP)
        code = server.process.wait(30)
        thread.join(30)
        assert not thread.is_alive()
        assert code != 0
        assert time.monotonic() - started < 30
        if victim == "a rank hangs":
            assert "a step took longer than 5 s: a rank hangs (or --step-timeout-s is too short" in server.text
        deadline = time.monotonic() + 30
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
            assert time.monotonic() < deadline, [p for p in family if p.is_running()]
            time.sleep(0.2)
