"""The patched proxy under a real Triton, with toy callables: who leaves is cancelled, who stays is answered."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from serving.triton.frontend import TritonFlags
from serving.triton.instance import TritonInstance
from tests.support.launch import free_ports
from tests.support.toy import Toy

SOON_S = 20.0  # less than the 30 s that a request waits if nobody cancels it
STREAMS = 256


class Served:
    """The toy as a model and as a streaming one, and clients of both."""

    def __init__(self, toy: Toy, triton: TritonInstance) -> None:
        self.toy = toy
        self.triton = triton
        self.flags = triton.flags
        self.grpc = triton_grpc.InferenceServerClient(f"127.0.0.1:{self.flags.grpc_port}")

    def generate(self, model: str, **inputs: Any) -> tuple[int, str]:
        end = "generate_stream" if model == "toy_streaming" else "generate"
        return self._post(f"{model}/{end}", inputs)

    def infer(self, **inputs: Any) -> tuple[int, str]:
        kinds = {"steps": "UINT32", "delay": "FP32", "error": "BYTES"}
        tensors = [
            {"name": name, "datatype": kinds[name], "shape": [1, 1], "data": [value]} for name, value in inputs.items()
        ]
        return self._post("toy/infer", {"inputs": tensors})

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.flags.http_port}/v2/models/{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def unary(self, steps: int, delay: float) -> Callable[[], None]:
        """Begin a gRPC request; returns how to cancel it."""
        return self.grpc.async_infer("toy", _inputs((1, 1), steps, delay), lambda result, error: None).cancel

    def stream(self, steps: int, delay: float) -> Callable[[], None]:
        """Begin a gRPC stream; returns how to cancel it."""
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{self.flags.grpc_port}")
        client.start_stream(lambda result, error: None)
        client.async_stream_infer("toy_streaming", _inputs((1,), steps, delay))
        return lambda: client.stop_stream(cancel_requests=True)

    def http_stream(self, steps: int, delay: float) -> Callable[[], None]:
        """Begin an HTTP stream; returns how to hang up."""
        body = json.dumps({"steps": steps, "delay": delay}).encode()
        connection = socket.create_connection(("127.0.0.1", self.flags.http_port))
        head = (
            f"POST /v2/models/toy_streaming/generate_stream HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        return connection.close

    @property
    def left(self) -> int:
        """Entries of requests in the maps of this process's side of the proxy."""
        connectors = [connector for model in self.triton.models for connector in model._requests_respones_connectors]
        return sum(
            len(connector._scopes)
            + len(connector._responses_queues)
            + len(connector._requests_server_client._handle_requests_tasks)
            for connector in connectors
        )


def _inputs(shape: tuple[int, ...], steps: int, delay: float) -> list[triton_grpc.InferInput]:
    inputs = [triton_grpc.InferInput("steps", shape, "UINT32"), triton_grpc.InferInput("delay", shape, "FP32")]
    inputs[0].set_data_from_numpy(np.full(shape, steps, dtype=np.uint32))
    inputs[1].set_data_from_numpy(np.full(shape, delay, dtype=np.float32))
    return inputs


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {SOON_S} s: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with mock.patch.dict(os.environ):
        toy = Toy()
        triton = TritonInstance(TritonFlags("127.0.0.1", *free_ports(3)), toy.models(), verbose=False)
        try:
            yield Served(toy, triton)
        finally:
            triton.kill()
            triton.close()


@pytest.mark.parametrize(("kind", "delay"), [("unary", 30), ("stream", 30), ("stream", 0.02), ("http_stream", 0.02)])
def test_who_leaves_is_cancelled(served: Served, caplog: pytest.LogCaptureFixture, kind: str, delay: float) -> None:
    started, cancelled = served.toy.started, served.toy.cancelled
    with caplog.at_level(logging.WARNING):
        leave = getattr(served, kind)(steps=100_000, delay=delay)
        _wait(lambda: served.toy.started == started + 1, "the request's start")
        time.sleep(0.2)
        assert served.toy.cancelled == cancelled
        leave()
        _wait(lambda: served.toy.cancelled == cancelled + 1, "the callable's CancelledError")
        _wait(lambda: served.left == 0, "empty maps")
    assert caplog.records == []


def test_many_who_leave_at_any_moment_leave_nothing_behind(served: Served) -> None:
    started, cancelled = served.toy.started, served.toy.cancelled
    for index in range(50):
        leave = (served.unary, served.stream)[index % 2](steps=100_000, delay=0.01)
        time.sleep(0.005 * (index % 5))
        leave()
    _wait(lambda: served.left == 0 and served.toy.started - started == served.toy.cancelled - cancelled, "empty maps")
    assert served.triton.process.exit_code() is None
    assert served.generate("toy", steps=2, delay=0.01)[0] == 200


def test_many_streams_run_at_once(served: Served) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        barrier = threading.Barrier(STREAMS)

        def run(_: int) -> list[int]:
            barrier.wait()
            text = served.generate("toy_streaming", steps=3, delay=1)[1]
            return [json.loads(line.removeprefix("data: "))["step"] for line in text.split("\n\n") if line]

        began = time.monotonic()
        assert list(pool.map(run, range(STREAMS))) == [[0, 1, 2]] * STREAMS
    assert time.monotonic() - began < STREAMS / 4, "streams wait for one another"
    _wait(lambda: served.left == 0, "empty maps")


def test_requests_of_the_model_that_does_not_stream_run_at_once(served: Served) -> None:
    with ThreadPoolExecutor(32) as pool:
        began = time.monotonic()
        assert {status for status, _ in pool.map(lambda _: served.infer(steps=1, delay=1), range(32))} == {200}
    assert time.monotonic() - began < 16  # half of what they take one after the other


@pytest.mark.parametrize(
    ("kind", "status", "sentence"),
    [("bad", 400, "BadRequest: no"), ("busy", 503, "ServerBusy: later"), ("defect", 500, "RuntimeError: broken")],
)
def test_errors_are_one_sentence_with_their_status(served: Served, kind: str, status: int, sentence: str) -> None:
    body = '{"error":"' + sentence + '"}'
    assert served.infer(error=kind) == (status, body)
    assert served.generate("toy_streaming", error=kind) == (400, f"data: {body}\n\n")


def test_empty_list_of_strings_is_as_good_as_none(served: Served) -> None:
    for model in ("toy", "toy_streaming"):
        status, body = served.generate(model, steps=1, delay=0, error=[])
        assert (status, json.loads(body.removeprefix("data: "))["step"]) == (200, 0)


def test_stream_without_a_response_ends(served: Served) -> None:
    assert served.generate("toy_streaming", steps=0, delay=0) == (200, "")
