"""Real server.py under real mpirun: signals, the death of a rank, and what other users may see."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.triton.launcher import SECRET
from tests.support.attacks import target_of
from tests.support.launch import MODEL, Server, flags_of, sentence, serving, tensor
from tests.support.ranks import ROOT
from tests.support.scrape import scrape


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
    with serving(2, tmp_path / "log", *flags_of(converted(2), 2), "--log-format", "json") as server:
        thread, answers = ask_in_background(server, 250)
        assert server.stop(signal.SIGUSR1) == 0, server.text
        thread.join()
        status, answer = answers[0]
        assert status == 200, answer
        assert "SIGUSR1: finishing what is in flight" in server.text
        assert re.search(r"[12] requests in flight were finished, 0 were cut off", server.text)
        lines = [json.loads(line) for line in server.text.splitlines()]  # every line is an object
        ended = [line for line in lines if line["message"] == "request" and line["finish_reasons"] == ["length"]]
        assert [(line["front_end"], line["output_tokens"]) for line in ended] == [("triton", 250)]


def ask_openai(server: Server, prompts: list[str], num_tokens: int) -> tuple[int, Any]:
    """(status, answer) of a completion over the OpenAI port."""
    body = {"prompt": prompts, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    url = f"http://127.0.0.1:{server.openai}/v1/completions"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def is_ready(url: str) -> bool:
    """Whether a readiness probe passes."""
    try:
        return urllib.request.urlopen(url, timeout=10).status == 200
    except (OSError, http.client.HTTPException):
        return False


@pytest.mark.slow("half a minute; the drain of one request stays")
def test_a_drain_loses_nothing(tmp_path: Path) -> None:
    """200 requests over both front ends are finished. Who is refused after the signal finds no front end ready.

    The signal comes at two thirds of their tokens, so that a slow machine has the rest within the default timeout.
    """
    count, num_tokens = 200, 128
    flags = ["--hf-model-name", str(ROOT / "models/stories"), "--output-dir", str(tmp_path)]
    with serving(1, tmp_path / "log", *flags) as server:

        def ask_triton(num_tokens: int) -> int:
            inputs = [
                tensor("prompts", "BYTES", ["Once upon"]),
                tensor("request_output_len", "UINT32", [num_tokens]),
                tensor("ignore_eos", "BOOL", [True]),
            ]
            return server.infer("stories", inputs)[0]

        ready = [f"{server.url()}/v2/health/ready", f"http://127.0.0.1:{server.openai}/health"]
        assert all(map(is_ready, ready))
        is_over = threading.Event()
        refused: list[tuple[int, list[bool]]] = []  # a late one's status, and what was ready then
        late: list[int] = []

        def come_late() -> None:
            while not is_over.wait(0.3):
                with contextlib.suppress(OSError, http.client.HTTPException):  # Triton lets nobody in
                    late.append(ask_triton(2))
                with contextlib.suppress(OSError, http.client.HTTPException):  # the port is closed
                    status, _ = ask_openai(server, ["Once upon"], 2)
                    if status != 200:
                        refused.append((status, list(map(is_ready, ready))))

        with ThreadPoolExecutor(count + 4) as pool:
            asked, others = [], []
            for _ in range(count // 2):
                asked.append(pool.submit(ask_triton, num_tokens))
                others.append(pool.submit(ask_openai, server, ["Once upon"], num_tokens))
            while (seen := scrape(server.openai))["generation_tokens_total"] < count * num_tokens * 2 / 3:
                time.sleep(0.1)
            assert seen["num_requests_running"] + seen["num_requests_waiting"] == count
            late_ones = [pool.submit(come_late) for _ in range(4)]
            try:
                assert server.stop(signal.SIGUSR1) == 0, server.text
            finally:
                is_over.set()
            assert [answer.result() for answer in asked] == [200] * len(asked)
            assert [answer.result()[0] for answer in others] == [200] * len(others)
            used = [answer.result()[1]["usage"]["completion_tokens"] for answer in others]
            for late_one in late_ones:
                late_one.result()
    assert used == [num_tokens] * len(others)
    assert set(late) <= {200}
    assert refused and all(found == (503, [False, False]) for found in refused)
    finished = re.search(r"(\d+) requests in flight were finished, 0 were cut off", server.text)
    assert finished and count <= int(finished[1]) <= count + 8


def test_what_a_drain_cuts_off_gives_code_1(converted: Callable[[int], Path], tmp_path: Path) -> None:
    rows = 32
    flags = ["--max-batch-size", "1", "--drain-timeout", "0.2"]
    with serving(1, tmp_path / "log", *flags_of(converted(1)), *flags) as server, ThreadPoolExecutor(2) as pool:
        inputs = [
            tensor("prompts", "BYTES", ["word"] * rows),
            tensor("request_output_len", "UINT32", [250] * rows),
            tensor("ignore_eos", "BOOL", [True] * rows),
        ]
        asked = pool.submit(server.infer, MODEL, inputs)
        asked_openai = pool.submit(ask_openai, server, ["word"] * rows, 250)
        time.sleep(1.0)
        assert server.stop(signal.SIGUSR1) == 1, server.text
        status, answer = asked.result()
        openai_status, openai_answer = asked_openai.result()
    sentence_end = "the server stopped before the request was finished"
    assert status == 503
    assert sentence(answer).endswith(sentence_end)
    assert openai_status == 503
    assert (openai_answer["error"]["message"], openai_answer["error"]["code"]) == (sentence_end, "server_stopping")
    found = re.search(r"(\d+) requests in flight were finished, (\d+) were cut off", server.text)
    assert found and int(found[2]) > 0 and int(found[1]) + int(found[2]) <= 2 * rows


def test_other_users_see_neither_token_nor_paths_nor_leftovers(
    converted: Callable[[int], Path], tmp_path: Path
) -> None:
    home = tmp_path / "home" / ("long" * 20)  # no socket could have a path as long as this one
    environment = {"PYTRITON_HOME": str(home)}
    log = tmp_path / "triton.log"
    flags = [*flags_of(converted(1)), "--triton-log", str(log)]
    with serving(1, tmp_path / "log", *flags, environment=environment) as server:
        triton = target_of(server).triton
        secret = triton.environ()[SECRET]
        token = secret.rpartition("=")[2]
        assert len(token) > 20
        for process in (triton, *triton.children(), *psutil.Process(server.process.pid).children()):
            assert token not in Path(f"/proc/{process.pid}/cmdline").read_text()
        url = f"{server.url()}/v2/models/{MODEL}/stats"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url)
        # Triton has the token: it was not lost on the way.
        urllib.request.urlopen(urllib.request.Request(url, headers={"triton-access-token": token})).read()
        config = urllib.request.urlopen(f"{server.url()}/v2/models/{MODEL}/config").read().decode()
        assert str(home) not in config and "workspace-path" in config
        (workspace,) = home.iterdir()
        segments = list(Path("/dev/shm").glob(f"pytrtion{triton.ppid()}-*"))
        assert len(segments) == 2
        modes = [path.stat().st_mode & 0o077 for path in (workspace, log, *segments)]
        assert modes == [0] * len(modes)
        server.kill()  # with its rank, and all below it
        for segment in segments:
            segment.touch()
    with serving(1, tmp_path / "log", *flags, environment=environment) as server:
        assert workspace not in list(home.iterdir())
        assert not any(segment.exists() for segment in segments)
        assert "removed the leftovers of 1 killed Tritons" in server.text


@pytest.mark.slow("starts a server three times")
def test_triton_that_does_not_start_ends_the_server(converted: Callable[[int], Path], tmp_path: Path) -> None:
    certificate = tmp_path / "no certificate"
    certificate.touch()
    flags = ["--grpc-certfile", str(certificate), "--grpc-keyfile", str(certificate)]
    server = Server(1, tmp_path / "log", *flags_of(converted(1)), *flags)
    try:
        assert server.process.wait(120) == 1
    finally:
        server.kill()
    assert "ERROR RuntimeError: Triton did not start: tritonserver ended with code" in server.text


@pytest.mark.parametrize(
    "victim",
    [
        "a rank dies",
        pytest.param("a rank hangs", marks=pytest.mark.slow("the commonest death stays; each starts a server")),
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
