"""Real server.py under real mpirun with a real Triton in front: answers, refusals, signals, deaths."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.support.engines import hf_greedy
from tests.support.launch import MODEL, TEXTS, Server, flags_of, serving, tensor


@pytest.fixture(scope="module")
def server(gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """tp 2 on two ranks, from the checkpoint, so that it converts first."""
    folder = tmp_path_factory.mktemp("server")
    flags = ["--hf-model-name", str(gpt2_source[0]), "--tp", "2", "--output-dir", str(folder / "ft_models")]
    with serving(2, folder / "log", *flags) as running:
        yield running


def test_ready_line_says_what_runs(server: Server) -> None:
    line = next(line for line in server.text.splitlines() if "ready:" in line)
    assert f"model {MODEL}, engine torch (no FasterTransformer library at " in line
    assert "tp 2 × pp 1, float32 on cpu" in line
    assert f"http://127.0.0.1:{server.http} and grpc://127.0.0.1:{server.grpc}" in line


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_client_prints_greedy_text_of_hugging_face(
    server: Server, gpt2_source: tuple[Path, GPT2LMHeadModel], kind: str
) -> None:
    folder, model = gpt2_source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    done = server.client("--model-name", MODEL, "--output-len", "64", "--json", "--prompts", *TEXTS, kind=kind)
    assert done.returncode == 0, done.stderr
    for text, line in zip(TEXTS, done.stdout.splitlines(), strict=True):
        answer = json.loads(line)
        prompt_ids = tokenizer.encode(text)
        expected = prompt_ids + hf_greedy(model, prompt_ids, 64)
        assert answer["output_ids"] == [expected]
        assert answer["sequence_length"] == [len(expected)]
        assert answer["sentences"] == [tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 2), (4, 1)], ids=lambda n: str(n))
def test_greedy_text_through_triton_at_other_grids(
    tp: int, pp: int, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_source[0])
    with serving(tp * pp, tmp_path / "log", *flags_of(converted(tp), tp), "--pp", str(pp)) as server:
        inputs = [tensor("prompts", "BYTES", TEXTS), tensor("request_output_len", "UINT32", [64] * len(TEXTS))]
        status, answer = server.infer(MODEL, inputs)
    assert status == 200, answer
    outputs = {output["name"]: output for output in answer["outputs"]}
    rows = np.array(outputs["output_ids"]["data"]).reshape(len(TEXTS), -1)
    for text, row, length in zip(TEXTS, rows, outputs["sequence_length"]["data"], strict=True):
        prompt_ids = tokenizer.encode(text)
        assert row[:length].tolist() == prompt_ids + hf_greedy(gpt2_source[1], prompt_ids, 64)


def test_client_takes_a_bare_host_and_prints_under_rules(server: Server) -> None:
    done = server.client("--url", f"127.0.0.1:{server.http}", "--model-name", MODEL, "--prompts", "one", "two")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(set(line) == {"─"} for line in lines) == 3
    assert lines[1].startswith("one")


def test_prompts_with_different_parameters_share_a_request(server: Server) -> None:
    """Each row equals the same row asked alone (the ancestor applied the first row's parameters to all)."""
    columns = {
        "request_output_len": ("UINT32", [5, 20, 12]),
        "runtime_top_k": ("UINT32", [0, 10, 0]),
        "runtime_top_p": ("FP32", [0.0, 0.0, 0.95]),
        "temperature": ("FP32", [1.0, 0.7, 1.2]),
        "random_seed": ("UINT64", [0, 11, 2**40]),
    }

    def ask(rows: list[int]) -> dict[str, dict]:
        inputs = [tensor("prompts", "BYTES", [TEXTS[r] for r in rows])]
        inputs += [tensor(name, dtype, [values[r] for r in rows]) for name, (dtype, values) in columns.items()]
        status, answer = server.infer(MODEL, inputs)
        assert status == 200, answer
        return {output["name"]: output for output in answer["outputs"]}

    together = ask([0, 1, 2])
    assert together["sentences"]["shape"] == [3, 1, 1]
    lengths = together["sequence_length"]["data"]
    width = together["output_ids"]["shape"][-1]
    ids = np.array(together["output_ids"]["data"]).reshape(3, width)
    for row in range(3):
        alone = ask([row])
        assert alone["sentences"]["data"] == [together["sentences"]["data"][row]]
        assert alone["sequence_length"]["data"] == [lengths[row]]
        assert alone["output_ids"]["data"] == ids[row, : lengths[row]].tolist()
        assert (ids[row, lengths[row] :] == 302).all()  # padded with end_id


def test_a_short_request_does_not_wait_for_long_ones(server: Server) -> None:
    def ask(output_len: int) -> float:
        started = time.monotonic()
        inputs = [tensor("prompts", "BYTES", ["word"]), tensor("request_output_len", "UINT32", [output_len])]
        status, answer = server.infer(MODEL, inputs)
        assert status == 200, answer
        return time.monotonic() - started

    ask(2)
    seconds: list[float] = []
    threads = [threading.Thread(target=lambda: seconds.append(ask(240))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    short = ask(2)
    for thread in threads:
        thread.join()
    assert len(seconds) == 8
    assert short < min(seconds) / 2


def test_client_shows_the_sentence_and_exits_1(server: Server) -> None:
    done = server.client("--model-name", MODEL, "--prompts", "x", "--output-len", "9999")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "client.py: request_output_len is 9999; with the prompt's 1 tokens that is 10000, "
        "and the longest sequence served is 256 tokens"
    )


def test_client_without_a_server_exits_3() -> None:
    import subprocess
    import sys

    from tests.support.launch import ROOT, free_ports

    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, str(ROOT / "client.py"), "--url", url, "--prompts", "x", "--init-timeout-s", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert f"no model gpt2 at {url} within 2 s" in done.stderr


def test_an_idle_server_sleeps(server: Server) -> None:
    ranks = [psutil.Process(pid) for pid in server.rank_pids]
    assert len(ranks) == 2
    before = [sum(rank.cpu_times()[:2]) for rank in ranks]
    time.sleep(10)
    shares = [(sum(rank.cpu_times()[:2]) - b) / 10 for rank, b in zip(ranks, before, strict=True)]
    assert max(shares) < 0.05, shares  # 0.03 on an idle machine (benchmarks/serving.py --idle)


def ask_in_background(server: Server, output_len: int) -> tuple[threading.Thread, list]:
    answers: list = []

    def ask() -> None:
        inputs = [tensor("prompts", "BYTES", ["word"]), tensor("request_output_len", "UINT32", [output_len])]
        try:
            answers.append(server.infer(MODEL, inputs))
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def test_a_signal_drains_and_all_ranks_exit_0(converted: Callable[[int], Path], tmp_path: Path) -> None:
    with serving(2, tmp_path / "log", *flags_of(converted(2), 2)) as server:
        thread, answers = ask_in_background(server, 250)
        time.sleep(0.3)
        assert server.stop(signal.SIGUSR1) == 0, server.text
        thread.join()
        status, answer = answers[0]
        assert status == 200, answer
        assert "SIGUSR1: finishing what is in flight" in server.text


@pytest.mark.parametrize("victim", ["a rank dies", "a rank hangs", "triton dies"])
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
        deadline = time.monotonic() + 15
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
            assert time.monotonic() < deadline, [p for p in family if p.is_running()]
            time.sleep(0.2)


def ends_with(tmp_path: Path, num_ranks: int, *flags: str, environment: dict[str, str] | None = None) -> str:
    """The log of a server that must end by itself with a code other than 0."""
    server = Server(num_ranks, tmp_path / "log", *flags, environment=environment)
    try:
        assert server.process.wait(90) != 0, server.text
    finally:
        server.kill()
    assert "Traceback" not in server.text
    return server.text


def test_wrong_world_size_says_the_right_command(converted: Callable[[int], Path], tmp_path: Path) -> None:
    text = ends_with(tmp_path, 1, *flags_of(converted(2), 2))
    assert "tp × pp takes 2 ranks and 1 were started: mpirun -n 2 " in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--hf-model-name", "/no/such/folder"],
            "hf_model_name is '/no/such/folder', and there is no such folder or file",
        ),
        (["--tp", "2"], "was converted for tp 1, and --tp is 2"),
        (
            ["--pp", "2", "--model-name", "a b"],
            "model_name is 'a b'; it may have letters, digits, '_', '.' and '-' only",
        ),
        (["--max-seq-len", "257"], "max_seq_len is 257; the model has 256 positions"),
        (["--data-type", "fp16"], "data_type is fp16; on a CPU it must be fp32 or bf16"),
        (["--device", "cuda"], "device is cuda, and torch sees no GPU"),
        (["--engine", "fastertransformer"], "and there is no such file"),
    ],
)
def test_what_cannot_start_says_why_once(
    converted: Callable[[int], Path], tmp_path: Path, flags: list[str], expected: str
) -> None:
    num_ranks = 2 if {"--tp", "--pp"} & set(flags) else 1
    text = ends_with(tmp_path, num_ranks, *flags_of(converted(1)), *flags)
    assert text.count(expected) == 1, text


def test_a_port_in_use_is_named(converted: Callable[[int], Path], tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        text = ends_with(tmp_path, 1, *flags_of(converted(1)), "--http-port", str(port))
    assert f"http_port is {port}; 127.0.0.1 cannot be bound there (Address already in use)" in text


# Without its manifest a folder passes for one of FasterTransformer's, which has no tokenizer.
TOKENIZER_FILES = ("manifest.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "model.wte.bin").write_bytes(b"1234"), "model.wte.bin: "),
        (lambda f: (f / "model.layers.1.mlp.dense_4h_to_h.weight.1.bin").unlink(), "weight.1.bin: "),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: 1 bytes; the manifest says "),
        (lambda f: [(f / name).unlink() for name in TOKENIZER_FILES], "has no tokenizer that transformers can read"),
        (lambda f: (f / "config.ini").write_text("[gpt]\nhead_num = 4\n"), "is missing from [gpt]"),
    ],
    ids=["truncated", "missing", "tokenizer", "no tokenizer", "config.ini"],
)
def test_a_damaged_folder_is_refused_on_all_ranks(
    converted: Callable[[int], Path], tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    import shutil

    folder = tmp_path / "2-gpu"
    shutil.copytree(converted(2), folder)
    damage(folder)
    text = ends_with(tmp_path, 2, *flags_of(folder, 2))
    assert expected in text
