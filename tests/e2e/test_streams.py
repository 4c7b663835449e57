"""Streams, cancellation, deadlines and crowds through a real Triton, over gRPC and HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from pytriton.client import DecoupledModelClient, ModelClient
from transformers import AutoTokenizer, GPT2LMHeadModel

from convert import convert
from tests.support.checkpoints import make_gpt2
from tests.support.engines import hf_greedy
from tests.support.launch import Server, sentence, serving, tensor

MODEL = "tiny-gpt2"
LONG = 40_000  # tokens that take any machine much longer than SOON_S
SOON_S = 10.0
STREAMS = 256


@pytest.fixture(scope="module")
def server(converted: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """tp 2 on two ranks, with the default sizes."""
    flags = ["--hf-model-name", str(converted(2)), "--tp", "2", "--model-name", MODEL]
    with serving(2, tmp_path_factory.mktemp("server") / "log", *flags) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One sequence at a time, two in the queue, and requests that last: who does not leave keeps the others out."""
    folder = tmp_path_factory.mktemp("narrow")
    make_gpt2(folder / "source", vocab_size=303, layers=1, heads=2, hidden=32, n_positions=LONG + 10)
    weights = convert(folder / "source", folder / "ft_models", 1, "fp32")
    flags = ["--hf-model-name", str(weights), "--model-name", MODEL, "--max-batch-size", "1", "--max-queue-size", "2"]
    with serving(1, folder / "log", *flags) as running:
        yield running


def arrays(prompt: str, output_len: int, **more: Any) -> dict[str, np.ndarray]:
    """Inputs of the streaming model: no batch dimension."""
    inputs = {"prompts": np.array([prompt.encode()], object), "request_output_len": np.array([output_len], np.uint32)}
    return inputs | {name: np.atleast_1d(value) for name, value in more.items()}


def sse(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Responses of HTTP generate_stream as they come; closing the iterator closes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=60)
    try:
        path = f"/v2/models/{MODEL}_streaming/generate_stream"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    finally:
        connection.close()


def infer(server: Server, prompt: str, output_len: int, *more: dict[str, Any]) -> dict[str, Any]:
    """One prompt's outputs from the non-streaming model, by name."""
    inputs = [tensor("prompts", "BYTES", [prompt]), tensor("request_output_len", "UINT32", [output_len]), *more]
    status, answer = server.infer(MODEL, inputs)
    assert status == 200, answer
    return {output["name"]: output["data"] for output in answer["outputs"]}


PROMPTS = ["the rain in", "héllo wörld 🙂", "a"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_grpc_and_http_streams_are_the_whole_text(
    server: Server, gpt2_source: tuple[Path, GPT2LMHeadModel], prompt: str
) -> None:
    """The random model writes bytes that are no UTF-8 most of the time: pieces still are whole characters."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_source[0])
    prompt_ids = tokenizer.encode(prompt)
    expected = hf_greedy(gpt2_source[1], prompt_ids, 60)
    text = tokenizer.decode(prompt_ids + expected, skip_special_tokens=True)
    whole = infer(server, prompt, 60)
    assert whole["sentences"] == [text]
    with DecoupledModelClient(server.url("grpc"), f"{MODEL}_streaming") as client:
        answers = list(client.infer_sample(**arrays(prompt, 60)))
    assert len(answers) > 5
    assert b"".join(answer["sentences"][0, 0] for answer in answers).decode() == text
    assert [i for answer in answers for i in answer["output_ids"][0].tolist()] == expected
    last = answers[-1]
    assert last["sequence_length"].tolist() == whole["sequence_length"] == [len(prompt_ids) + 60]
    assert last["finish_reason"].tolist() == [[b"length"]]
    assert last["cum_log_probs"][0] == pytest.approx(whole["cum_log_probs"][0], abs=1e-3)
    pieces = list(sse(server, {"prompts": prompt, "request_output_len": 60}))
    assert "".join(piece["sentences"] for piece in pieces) == text
    assert pieces[-1]["finish_reason"] == "length"


def test_prompt_left_out_stop_words_and_log_probs_in_a_stream(server: Server) -> None:
    whole = infer(server, "the rain in", 40, tensor("exclude_input_in_output", "BOOL", [True]))["sentences"][0]
    assert not whole.startswith("the rain in")
    word = whole[10:13]
    body = {"prompts": "the rain in", "request_output_len": 40, "exclude_input_in_output": True, "stop_words": [word]}
    pieces = list(sse(server, {**body, "is_return_log_probs": True}))
    text = "".join(piece["sentences"] for piece in pieces)
    assert text == whole[: whole.index(word)]
    assert pieces[-1]["finish_reason"] == "stop"
    log_probs = [value for piece in pieces for value in np.atleast_1d(piece["output_log_probs"]).tolist()]
    num_tokens = sum(np.atleast_1d(piece["output_ids"]).size for piece in pieces)
    assert len(log_probs) == num_tokens
    assert sum(log_probs) == pytest.approx(pieces[-1]["cum_log_probs"], abs=1e-3)


@pytest.mark.slow("20 s of load; test_cancellation.py has as many streams of a toy")
def test_256_streams_at_once_none_starving(server: Server) -> None:
    """Every stream has its first piece before any has ended, and all are what they are alone."""
    expected = {prompt: infer(server, prompt, 60)["sentences"][0] for prompt in PROMPTS}
    first, last = [0.0] * STREAMS, [0.0] * STREAMS
    barrier = threading.Barrier(STREAMS)

    def read(index: int) -> str:
        barrier.wait()
        text = ""
        for answer in sse(server, {"prompts": PROMPTS[index % 3], "request_output_len": 60}):
            first[index] = first[index] or time.monotonic()
            text += answer["sentences"]
        last[index] = time.monotonic()
        return text

    started = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        texts = list(pool.map(read, range(STREAMS)))
    seconds = time.monotonic() - started
    print(f"{STREAMS} streams of 60 tokens in {seconds:.1f} s, first pieces after {max(first) - started:.1f} s at most")
    assert texts == [expected[PROMPTS[index % 3]] for index in range(STREAMS)]
    assert sorted(first)[-1] < sorted(last)[STREAMS // 2]


def is_free_soon(server: Server) -> bool:
    """Whether the narrow server's only slot is free soon: it takes the next request only then."""
    started = time.monotonic()
    assert infer(server, "next", 1)["finish_reason"] == ["length"]
    return time.monotonic() - started < SOON_S


def until(status: int, ask: Callable[[], tuple[int, dict[str, Any]]]) -> tuple[int, dict[str, Any]]:
    """Ask again until the answer has this status: on a busy machine earlier requests may not have arrived yet."""
    deadline = time.monotonic() + 30
    while (answer := ask())[0] != status and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def stop(server: Server, request_id: str) -> None:
    """Stop a request that was sent."""
    inputs = [tensor("stop", "BOOL", [True]), tensor("request_id", "BYTES", [request_id])]
    status, answer = until(200, lambda: server.infer(MODEL, inputs))
    assert status == 200, answer


def test_a_grpc_stream_that_is_cancelled_frees_its_slot(narrow: Server) -> None:
    got = threading.Event()
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{narrow.grpc}") as client:
        client.start_stream(lambda result, error: got.set())
        client.async_stream_infer(f"{MODEL}_streaming", grpc_inputs("word", LONG))
        assert got.wait(60)
        client.stop_stream(cancel_requests=True)
        assert is_free_soon(narrow)


def test_a_grpc_request_that_is_cancelled_frees_its_slot(narrow: Server) -> None:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{narrow.grpc}") as client:
        call = client.async_infer(MODEL, grpc_inputs("word", LONG, batched=True), lambda result, error: None)
        time.sleep(0.5)
        call.cancel()
        assert is_free_soon(narrow)


def test_an_http_stream_that_is_closed_frees_its_slot(narrow: Server) -> None:
    stream = sse(narrow, {"prompts": "word", "request_output_len": LONG})
    next(stream)
    stream.close()
    assert is_free_soon(narrow)


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_a_stop_with_the_id_frees_the_slot_and_answers_with_what_there_is(narrow: Server, state: str) -> None:
    """An HTTP request is not noticed to have gone: it is stopped by its id, in the queue as well."""
    ids = ["first", "second"] if state == "waiting" else ["first"]
    with ThreadPoolExecutor(2) as pool:
        futures = []
        for request_id in ids:
            futures.append(pool.submit(infer, narrow, "word", LONG, tensor("request_id", "BYTES", [request_id])))
            time.sleep(0.5)
        for request_id in reversed(ids):
            stop(narrow, request_id)
        assert is_free_soon(narrow)
        answers = [future.result() for future in futures]
    assert [answer["finish_reason"] for answer in answers] == [["cancelled"]] * len(ids)
    lengths = [answer["sequence_length"][0] for answer in answers]
    assert 10 < lengths[0] < LONG
    assert lengths[1:] == [4] * (len(ids) - 1)  # the prompt alone


def test_a_deadline_ends_a_request_with_what_it_has(narrow: Server) -> None:
    started = time.monotonic()
    answer = infer(narrow, "word", LONG, tensor("deadline_s", "FP32", [1.0]))
    assert 1.0 <= time.monotonic() - started < SOON_S
    assert answer["finish_reason"] == ["cancelled"]
    assert answer["sentences"][0].startswith("word")


def test_a_full_queue_is_503_and_passes(narrow: Server) -> None:
    with ThreadPoolExecutor(3) as pool:
        futures = []
        for request_id in ("a", "b", "c"):
            futures.append(pool.submit(infer, narrow, "word", LONG, tensor("request_id", "BYTES", [request_id])))
            time.sleep(0.3)
        inputs = [tensor("prompts", "BYTES", ["x"]), tensor("request_output_len", "UINT32", [1])]
        status, answer = until(503, lambda: narrow.infer(MODEL, [*inputs, tensor("deadline_s", "FP32", [0.5])]))
        assert (status, answer["error"]) == (503, "ServerBusy: 2 requests wait already, and at most 2 may")
        for request_id in ("a", "b", "c"):
            stop(narrow, request_id)
        for future in futures:
            future.result()
    assert is_free_soon(narrow)


def test_beams_and_samples_through_model_client(server: Server) -> None:
    inputs = {
        "prompts": np.array([[b"the rain in"], [b"a"]], object),
        "request_output_len": np.array([[12], [9]], np.uint32),
        "beam_width": np.array([[3], [1]], np.uint32),
        "n": np.array([[1], [2]], np.uint32),
        "runtime_top_p": np.array([[0.0], [0.9]], np.float32),
        "num_log_probs": np.array([[2], [0]], np.uint32),
        "is_return_prompt_log_probs": np.array([[True], [False]]),
        "is_return_next_token_logits": np.array([[True], [False]]),
    }
    answers = []
    for kind in ("http", "grpc"):
        with ModelClient(server.url(kind), MODEL) as client:
            answers.append(client.infer_batch(**inputs))
    for name, array in answers[0].items():
        assert np.array_equal(array, answers[1][name]), name
        if array.dtype == object:
            assert array.shape == (2, 3, 1), name
    answer = answers[0]
    assert answer["sentences"].shape == (2, 3, 1)
    assert answer["top_token_ids"].shape == (2, 3, 12, 2)
    assert answer["next_token_logits"].shape == (2, 303)
    sums = answer["cum_log_probs"][0]
    assert (sums[:-1] >= sums[1:]).all()  # equal lengths: best first
    assert answer["sentences"][1, 0, 0] != answer["sentences"][1, 1, 0]
    assert answer["sentences"][1, 2, 0] == b""


def test_generate_answers_too(server: Server) -> None:
    body = {"prompts": "the rain in", "request_output_len": 6, "stop_words": ["zzz", "yyy"]}
    request = urllib.request.Request(f"{server.url()}/v2/models/{MODEL}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = json.loads(answer.read())["sentences"]
    assert text == infer(server, "the rain in", 6)["sentences"][0]


def test_a_request_id_can_be_used_again(server: Server) -> None:
    for _ in range(3):
        infer(server, "a", 2, tensor("request_id", "BYTES", ["same"]))
    inputs = [tensor("stop", "BOOL", [True]), tensor("request_id", "BYTES", ["same"])]
    status, answer = server.infer(MODEL, inputs)
    assert (status, sentence(answer)) == (400, "request_id 'same' is not running")


def grpc_inputs(prompt: str, output_len: int, batched: bool = False) -> list[triton_grpc.InferInput]:
    inputs = []
    for name, array in arrays(prompt, output_len).items():
        array = array[None] if batched else array
        datatype = "BYTES" if array.dtype == object else "UINT32"
        inputs.append(triton_grpc.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs
