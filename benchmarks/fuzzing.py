"""Many nearly right requests on one port, and how they were answered."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton_grpc

from tests.support import fuzz
from tests.support.attacks import Target

_NUM_THREADS = 4
_AGAIN_S = 60.0  # for Triton to come back
_SHOWN = 3  # bad answers that are shown
_METHODS = ("ModelInfer", "ModelMetadata", "ModelConfig", "ServerLive", "RepositoryIndex", "ModelStreamInfer")


def fuzz_http(
    valid: Sequence[fuzz.Valid], paths: Sequence[str], seed: int, count: int, target: Target, *, openai: bool
) -> tuple[str, float]:
    """Fuzz the OpenAI port, or Triton's. The outcome counts the answers; BAD are no answers, and defects."""
    port = target.openai if openai else target.http

    def send(case: fuzz.Case) -> str:
        try:
            answer = fuzz.send(port, case)
        except TimeoutError:
            return "BAD: silent"
        except ConnectionRefusedError:
            _wait_for(target)
            return "refused"
        if answer is None:
            return "BAD: no answer" if case.is_http and openai else "closed"
        is_defect = answer[0] >= 500 if openai else b"InternalError: " in answer[1]  # Triton: 500 for wrong JSON, too
        return "BAD: 500" if is_defect else f"{answer[0] // 100}xx"

    return _fuzz(itertools.islice(fuzz.cases(valid, paths, seed), count), send, target)


def fuzz_grpc(seed: int, count: int, target: Target) -> tuple[str, float]:
    """Fuzz Triton's gRPC port: messages with changed bytes, and wrong tensors."""
    channel = grpc.insecure_channel(f"127.0.0.1:{target.grpc}")
    calls = {name: channel.unary_unary(f"/inference.GRPCInferenceService/{name}") for name in _METHODS}

    def send(case: tuple[str, bytes]) -> str:
        try:
            calls[case[0]](case[1], timeout=60)
            return "answered"
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                _wait_for(target)
            is_defect = "InternalError: " in (error.details() or "")
            return "BAD: defect" if is_defect else error.code().name.lower()

    with channel:
        return _fuzz(itertools.islice(_messages(target.model, seed), count), send, target)


def _fuzz(cases: Iterator[Any], send: Callable[[Any], str], target: Target) -> tuple[str, float]:
    before, tally, lock = target.triton.pid, Counter(), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                case = next(cases, None)
            if case is None:
                return
            result = send(case)
            with lock:
                tally[result] += 1
                if result.startswith("BAD") and tally[result] <= _SHOWN:
                    print(f"  {result}: {case!r:.600}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for future in [pool.submit(work) for _ in range(_NUM_THREADS)]:
            future.result()
    began = time.monotonic()
    _wait_for(target)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(tally.items()))
    return ("restarted, " if target.triton.pid != before else "") + counts, time.monotonic() - began


def _wait_for(target: Target) -> None:
    deadline = time.monotonic() + _AGAIN_S
    while not target.ask():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer {_AGAIN_S:g} s after a fuzzed request")
        time.sleep(0.1)


def _messages(model: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """(method, message): a right ModelInferRequest with changes."""
    rng = random.Random(seed)
    while True:
        inputs = []
        for name, datatype, value in (
            ("prompts", "BYTES", b"Once"),
            ("request_output_len", "UINT32", 2),
            ("temperature", "FP32", 0.5),
        ):
            dtype = {"BYTES": object, "UINT32": np.uint32, "FP32": np.float32}[datatype]
            tensor = triton_grpc.InferInput(name, [1, 1], datatype)
            tensor.set_data_from_numpy(np.array([[value]], dtype))
            inputs.append(tensor)
        message = _message(rng, rng.choice((model, model, f"{model}_streaming", "", "x" * 3000)), inputs)
        data = bytearray(message)
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        kind = rng.random()
        if kind < 0.1:
            data = data[: rng.randrange(len(data))]
        elif kind < 0.15:
            data = bytearray(rng.randbytes(rng.choice((0, 1, 100, 5000))))
        yield (rng.choice(_METHODS) if rng.random() < 0.1 else "ModelInfer"), bytes(data)


def _message(rng: random.Random, model: str, inputs: list[triton_grpc.InferInput]) -> bytes:
    request = triton_grpc.service_pb2.ModelInferRequest(model_name=model, id=rng.choice(("", "a", "é" * 500)))
    for tensor in inputs:
        place = request.inputs.add(name=tensor.name(), datatype=tensor.datatype(), shape=[1, 1])
        if rng.random() < 0.2:
            del place.shape[:]
            place.shape.extend(rng.choice(([], [0], [-1], [1], [1, 2], [2, 1], [1] * 40, [2**20, 1])))
        if rng.random() < 0.1:
            place.datatype = rng.choice(("", "FP64", "BYTES", "BOOL", "x" * 100))
        if rng.random() < 0.1:
            place.name = rng.choice(("", "stop", "n", "input_ids", "request_id", "x" * 1000))
        raw = tensor._get_content() or b""
        if rng.random() < 0.2:
            raw = rng.choice((b"", raw[:-1], raw + b"\0", rng.randbytes(len(raw)), b"\xff\xff\xff\x7f" + raw))
        request.raw_input_contents.append(raw)
    return request.SerializeToString()
