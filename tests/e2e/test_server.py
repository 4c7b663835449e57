"""Real server.py under real mpirun with a real Triton in front: its answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.support.attacks import target_of
from tests.support.engines import hf_greedy
from tests.support.launch import MODEL, TEXTS, Server, flags_of, free_ports, serving, tensor
from tests.support.ranks import ROOT
from tests.support.scrape import scrape

CHAT = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="module")
def server(gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """tp 2 on two ranks, from the checkpoint, so that it converts first."""
    folder = tmp_path_factory.mktemp("server")
    (port,) = free_ports(1)
    flags = ["--hf-model-name", str(gpt2_source[0]), "--tp", "2", "--output-dir", str(folder / "ft_models")]
    (folder / "chat.jinja").write_text(CHAT)
    flags += ["--chat-template", str(folder / "chat.jinja"), "--prometheus-port", str(port)]
    with serving(2, folder / "log", *flags) as running:
        running.prometheus = port
        yield running


def test_ready_line_says_what_runs(server: Server) -> None:
    line = next(line for line in server.text.splitlines() if "ready:" in line)
    assert f"model {MODEL}, engine torch (no FasterTransformer library at " in line
    assert "tp 2 × pp 1, float32 on cpu" in line
    assert f"http://127.0.0.1:{server.http} and grpc://127.0.0.1:{server.grpc}" in line
    stages = ("check", "find weights", "pick backend", "connect", "load", "prepare")
    assert re.search("start-up took: " + ", ".join(rf"{stage} \d+\.\d s" for stage in stages), server.text)


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


def test_any_of_several_end_ids_ends_a_text(server: Server, gpt2_source: tuple[Path, GPT2LMHeadModel]) -> None:
    """Each front end's list, a single value in its old shape, and generate's scalar: as Hugging Face's generate."""
    folder, model = gpt2_source
    prompt_ids = AutoTokenizer.from_pretrained(folder).encode(TEXTS[0])
    free = hf_greedy(model, prompt_ids, 20)
    early, late = free[4], free[9]
    expected = {}
    for end_ids in ((early,), (late,), (late, early)):
        out = model.generate(torch.tensor([prompt_ids]), max_new_tokens=20, eos_token_id=list(end_ids), pad_token_id=0)
        expected[end_ids] = out[0].tolist()

    def infer(name: str, *end_ids: int) -> list[int]:
        inputs = [tensor("prompts", "BYTES", [TEXTS[0]]), tensor("request_output_len", "UINT32", [20])]
        inputs.append({"name": name, "datatype": "UINT32", "shape": [1, len(end_ids)], "data": list(end_ids)})
        status, answer = server.infer(MODEL, inputs)
        assert status == 200, answer
        return next(output["data"] for output in answer["outputs"] if output["name"] == "output_ids")

    assert infer("end_id", late, early) == expected[late, early]
    assert infer("end_id", late) == expected[(late,)]
    for given in (late, [late]):
        body = {"prompts": TEXTS[0], "request_output_len": 20, "end_id": given}
        assert json.loads(post(f"{server.url()}/v2/models/{MODEL}/generate", body))["output_ids"] == expected[(late,)]
    for kind in ("http", "grpc"):
        flags = ["--model-name", MODEL, "--output-len", "20", "--json", "--prompts", TEXTS[0], "--end-id"]
        done = server.client(*flags, str(late), str(early), kind=kind)
        assert json.loads(done.stdout)["output_ids"] == [expected[late, early]], done.stderr
    body = {"prompt": prompt_ids, "max_tokens": 20, "temperature": 0, "stop_token_ids": [late, early]}
    usage = json.loads(post(f"http://127.0.0.1:{server.openai}/v1/completions", body))["usage"]
    assert usage["total_tokens"] == len(expected[late, early])


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_client_chats(
    server: Server, gpt2_source: tuple[Path, GPT2LMHeadModel], kind: str, stream: list[str], tmp_path: Path
) -> None:
    """Each answer is Hugging Face's continuation of the chat in its template."""
    folder, model = gpt2_source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in ({"prompt": "é"}, {"messages": talk}))
    )
    flags = ["--chat", "--prompts-file", str(tmp_path / "p.jsonl"), "--system", "Be kind.", "--output-len", "12"]
    output = tmp_path / "o.jsonl"
    done = server.client("--model-name", MODEL, *flags, "--output", str(output), *stream, kind=kind)
    assert done.returncode == 0, done.stderr
    first = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é"}]
    for messages, line in zip((first, talk), output.read_text().splitlines(), strict=True):
        answer = json.loads(line)
        options = {"chat_template": CHAT, "add_generation_prompt": True, "return_dict": False}
        prompt_ids = tokenizer.apply_chat_template(messages, **options)
        new = hf_greedy(model, prompt_ids, 12)
        assert answer["messages"] == messages
        assert answer["output_ids"] == [new if stream else prompt_ids + new]
        assert answer["sentences"] == [tokenizer.decode(new, skip_special_tokens=True)]


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


def post(url: str, body: dict[str, Any], **headers: str) -> bytes:
    headers["Content-Type"] = "application/json"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60).read()


def test_both_front_ends_count_and_log(server: Server) -> None:
    """The metrics grow by what was asked; the log has a line for each request, and no prompt."""
    before, start = scrape(server.prometheus), len(server.text)
    inputs = [tensor("prompts", "BYTES", ["secret words", "more"]), tensor("request_output_len", "UINT32", [5, 7])]
    body = {"id": "triton-1", "inputs": inputs}
    post(f"{server.url()}/v2/models/{MODEL}/infer", body)
    inputs[1]["data"] = [5, 9999]
    with pytest.raises(urllib.error.HTTPError):
        post(f"{server.url()}/v2/models/{MODEL}/infer", body | {"id": "triton-2"})
    post(
        f"http://127.0.0.1:{server.openai}/v1/completions",
        {"model": MODEL, "prompt": [4, 5, 6], "max_tokens": 3, "temperature": 0, "ignore_eos": True},
        **{"X-Request-Id": "openai-1"},
    )
    with pytest.raises(urllib.error.HTTPError):
        post(
            f"http://127.0.0.1:{server.openai}/v1/completions",
            {"prompt": "secret", "max_tokens": -1},
            **{"X-Request-Id": "openai-2"},
        )
    after = scrape(server.prometheus)
    assert scrape(server.openai).keys() == after.keys()
    grown = {name: after[name] - before[name] for name in before}
    deadline = time.monotonic() + 20
    while (text := server.text[start:]).count(" id=") < 4 and time.monotonic() < deadline:  # mpirun passes lines on
        time.sleep(0.1)
    lines = re.findall(r" INFO \[rank 0\] (?:request|refused) (id=.*)", text)
    rows = [dict(field.split("=", 1) for field in re.findall(r'\w+="[^"]*"|\S+', line)) for line in lines]
    found = {row["id"]: row for row in rows}
    assert list(found) == ["triton-1", "triton-2", "openai-1", "openai-2"]
    one, two, three, four = found.values()
    assert (one["front_end"], one["prompts"], one["output_tokens"]) == ("triton", "2", "12")
    assert 0 <= float(one["queue_s"]) < float(one["first_token_s"]) < float(one["total_s"]) < 60
    assert (two["front_end"], two["reason"]) == ("triton", "invalid")
    assert two["error"].startswith('"max_new_tokens is 9999; ')
    assert (three["front_end"], three["prompt_tokens"], three["output_tokens"]) == ("openai", "3", "3")
    assert (four["front_end"], four["reason"]) == ("openai", "invalid")
    assert (one["finish_reasons"], three["finish_reasons"]) == ("length", "length")
    assert "secret" not in server.text
    assert grown["request_success_total{finished_reason=length}"] == 3
    assert grown["generation_tokens_total"] == 5 + 7 + 3
    assert grown["prompt_tokens_total"] == int(one["prompt_tokens"]) + 3
    assert grown["inter_token_latency_seconds_count"] == 4 + 6 + 2
    assert grown["time_to_first_token_seconds_count"] == grown["e2e_request_latency_seconds_count"] == 3
    assert grown["gpt_server_refused_requests_total{front_end=triton,reason=invalid}"] == 1
    assert grown["gpt_server_refused_requests_total{front_end=openai,reason=invalid}"] == 1
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def complete(server: Server, num_tokens: int, **fields: Any) -> Any:
    """The open answer to a greedy request over the OpenAI port."""
    body = {"prompt": [4, 5, 6], "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **fields}
    url = f"http://127.0.0.1:{server.openai}/v1/completions"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60)


def test_the_openai_port_goes_on_while_triton_is_killed(server: Server) -> None:
    """Streams get all their tokens, whoever comes meanwhile is answered, and the metrics count the restart."""
    target = target_of(server)
    restarts = scrape(server.openai)["gpt_server_triton_restarts_total"]
    triton, began = target.triton, threading.Event()
    is_back = threading.Event()

    def stream() -> list[tuple[str, dict[str, int]]]:
        """The text and the usage of streams, one after the other, until Triton is back."""
        found = []
        while not is_back.is_set():
            text, usage = "", {}
            with complete(server, 100, stream=True, stream_options={"include_usage": True}) as answer:
                for event in (json.loads(line[6:]) for line in answer if line.startswith(b"data: {")):
                    text += "".join(choice["text"] for choice in event["choices"])
                    usage = event["usage"]
                    began.set()
            found.append((text, usage))
        return found

    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(stream)
        assert began.wait(60)
        triton.kill()
        deadline, num_answers = time.monotonic() + 15, 0
        try:
            while not target.ask():
                assert time.monotonic() < deadline
                with complete(server, 2) as answer:
                    assert json.load(answer)["usage"]["completion_tokens"] == 2
                num_answers += 1
        finally:
            is_back.set()
    with complete(server, 100) as answer:
        whole = json.load(answer)
    assert num_answers > 0
    assert all(found == (whole["choices"][0]["text"], whole["usage"]) for found in streams.result())
    assert target.triton.pid != triton.pid
    assert scrape(server.openai)["gpt_server_triton_restarts_total"] == restarts + 1


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
