"""Real server.py under real mpirun with a real Triton in front: its answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.support.engines import hf_greedy
from tests.support.launch import MODEL, TEXTS, Server, flags_of, free_ports, serving, tensor
from tests.support.ranks import ROOT


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


@pytest.mark.parametrize(
    ("tp", "pp"),
    [
        (1, 1),
        (2, 2),
        pytest.param(1, 2, marks=pytest.mark.slow("tests/engine has the tokens of all grids")),
        pytest.param(4, 1, marks=pytest.mark.slow("tests/engine has the tokens of all grids")),
    ],
    ids=str,
)
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
    assert max(shares) < 0.05, shares  # 0.03 on an idle machine (benchmarks/idle.py)
