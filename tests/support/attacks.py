"""Attacks on a running Triton, each a function of a Target: what came of it, and after how long it answered again."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from tests.support.launch import MODEL, Server

_TIMEOUT_S = 60.0  # until it must answer again; the tests have tighter limits
_ASK_TIMEOUT_S = 2.0
_FULL_S = 8.0  # until Triton is started again for want of memory
_COMPLETIONS = "/v1/completions"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Target:
    """A Triton with a model, and `<model>_streaming`.

    root: the id of a process above tritonserver; body: a request of /generate that is quickly answered, with a single
    answer by both models; text: a BYTES output; number: an FP32 input of one value per row; prompt: a BYTES input;
    openai: the OpenAI port beside it, if any.
    """

    http: int
    grpc: int
    root: int
    model: str
    body: dict[str, Any]
    text: str
    number: str
    prompt: str
    openai: int = 0

    @property
    def triton(self) -> psutil.Process:
        """tritonserver. Raises LookupError where there is none, as while it is replaced."""
        for process in psutil.Process(self.root).children(recursive=True):
            if _lives(process) and process.name() == "tritonserver":
                return process
        raise LookupError(f"no tritonserver below process {self.root}")

    def ask(self, timeout_s: float = _ASK_TIMEOUT_S) -> bool:
        """Whether both models answer."""
        for model in (self.model, f"{self.model}_streaming"):
            url = f"http://127.0.0.1:{self.http}/v2/models/{model}/generate"
            request = urllib.request.Request(url, json.dumps(self.body).encode())
            try:
                urllib.request.urlopen(request, timeout=timeout_s).read()
            except (OSError, http.client.HTTPException):
                return False
        return True

    def answering(self) -> int | None:
        """The id of the tritonserver that answers; None where none does, or where it is replaced meanwhile."""
        try:
            pid = self.triton.pid
            return pid if self.ask() and self.triton.pid == pid else None
        except LookupError:
            return None

    def ask_openai(self, timeout_s: float = _ASK_TIMEOUT_S) -> bool:
        """Whether the OpenAI port answers on a new connection."""
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.openai}/health", timeout=timeout_s).read()
        except (OSError, http.client.HTTPException):
            return False
        return True


def target_of(server: Server, model: str = MODEL) -> Target:
    """The Triton of a server, and its OpenAI port."""
    body = {"prompts": "word", "request_output_len": 1}
    names = ("sentences", "temperature", "prompts")
    return Target(server.http, server.grpc, server.process.pid, model, body, *names, server.openai)


def _result(target: Target, attack: Callable[[], str], notice_s: float = 0.0) -> tuple[str, float]:
    """Run an attack; what it says, or that Triton was started again, and seconds from its end to good answers.

    notice_s: for so long a Triton that answers may yet be started again.
    """
    before = target.triton.pid
    outcome = attack()
    began = time.monotonic()
    while (after := target.answering()) is None or (after == before and time.monotonic() - began < notice_s):
        assert time.monotonic() - began < _TIMEOUT_S, f"no answer {_TIMEOUT_S:g} s after the attack"
        time.sleep(0.05)
    return ("restarted" if after != before else outcome), time.monotonic() - began


def signal_process(target: Target, victim: str, number: int) -> tuple[str, float]:
    """Send a signal to tritonserver or to the stub of the model."""
    triton = target.triton

    def is_victim(stub: psutil.Process) -> bool:
        return f"/{target.model}/" in " ".join(stub.cmdline())

    process = triton if victim == "tritonserver" else next(filter(is_victim, triton.children(recursive=True)))

    def attack() -> str:
        process.send_signal(number)
        return "not noticed"

    return _result(target, attack)


def kill_triton(target: Target) -> tuple[str, float]:
    """kill -9 of tritonserver."""
    return signal_process(target, "tritonserver", signal.SIGKILL)


def kill_stub(target: Target) -> tuple[str, float]:
    """kill -9 of the model's Python stub."""
    return signal_process(target, "stub", signal.SIGKILL)


def stop_triton(target: Target) -> tuple[str, float]:
    """SIGSTOP of tritonserver."""
    return signal_process(target, "tritonserver", signal.SIGSTOP)


def stop_stub(target: Target) -> tuple[str, float]:
    """SIGSTOP of the model's Python stub."""
    return signal_process(target, "stub", signal.SIGSTOP)


def _infer(target: Target, inputs: list[dict[str, Any]], **more: Any) -> str:
    url = f"http://127.0.0.1:{target.http}/v2/models/{target.model}/infer"
    request = urllib.request.Request(url, json.dumps({"inputs": inputs, **more}).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return f"answered {answer.status}"
    except urllib.error.HTTPError as error:
        return f"answered {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def _tensors(target: Target) -> list[dict[str, Any]]:
    datatypes = {str: "BYTES", int: "UINT32", float: "FP32"}
    return [
        {"name": name, "datatype": datatypes[type(value)], "shape": [1, 1], "data": [value]}
        for name, value in target.body.items()
    ]


def classify_http(target: Target) -> tuple[str, float]:
    """Ask for the classification of a BYTES output, over HTTP."""
    outputs = [{"name": target.text, "parameters": {"classification": 1}}]
    return _result(target, lambda: _infer(target, _tensors(target), outputs=outputs))


def classify_grpc(target: Target) -> tuple[str, float]:
    """Ask for the classification of a BYTES output, over gRPC."""

    def attack() -> str:
        inputs = []
        for tensor in _tensors(target):
            inputs.append(triton_grpc.InferInput(tensor["name"], tensor["shape"], tensor["datatype"]))
            dtype = {"BYTES": object, "UINT32": "uint32", "FP32": "float32"}[tensor["datatype"]]
            values = [v.encode() if isinstance(v, str) else v for v in tensor["data"]]
            inputs[-1].set_data_from_numpy(np.array([values], dtype=dtype))
        outputs = [triton_grpc.InferRequestedOutput(target.text, class_count=3)]
        with contextlib.closing(triton_grpc.InferenceServerClient(f"127.0.0.1:{target.grpc}")) as client:
            try:
                client.infer(target.model, inputs, outputs=outputs, client_timeout=30)
                return "answered"
            except InferenceServerException as error:
                return str(error.status())

    return _result(target, attack)


def claim_shape(target: Target, exponent: int) -> tuple[str, float]:
    """Claim a tensor of 2^exponent numbers, and send one."""
    claimed = {"name": target.number, "datatype": "FP32", "shape": [2**exponent], "data": [1.0]}
    others = [tensor for tensor in _tensors(target) if tensor["name"] != target.number]
    return _result(target, lambda: _infer(target, [*others, claimed]))


def endless_body(
    target: Target, max_bytes: int = 16 << 30, timeout_s: float = 60.0, *, openai: bool = False
) -> tuple[str, float]:
    """A chunked body that does not end before the connection does, or `max_bytes` or the seconds are over."""
    port, path = (target.openai, _COMPLETIONS) if openai else (target.http, f"/v2/models/{target.model}/infer")

    def attack() -> str:
        chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        sent, deadline = 0, time.monotonic() + timeout_s
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(head.encode())
            try:
                while sent < max_bytes and time.monotonic() < deadline:
                    connection.sendall(chunk)
                    sent += 2**20
            except OSError:
                return f"broken after {sent >> 20} MiB"
        return f"took {sent >> 20} MiB"

    return _result(target, attack, 0.0 if openai else _FULL_S)


@contextlib.contextmanager
def _half_open(port: int, count: int) -> Iterator[None]:
    """Connections that have sent half of a request's head."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            connection.sendall(b"POST /v2/models HTTP/1.1\r\nHost: a\r\nX-")
        yield


def half_open(target: Target, count: int = 1100, hold_s: float = 0.0, *, openai: bool = False) -> tuple[str, float]:
    """Connections that stay half open; the seconds until others are answered beside them."""
    before = target.triton
    with _half_open(target.openai if openai else target.http, count):
        began = time.monotonic()
        while not (target.ask_openai() if openai else target.ask()):
            if time.monotonic() - began > _TIMEOUT_S:
                return "locked out", _TIMEOUT_S
        seconds = time.monotonic() - began
        time.sleep(hold_s)
    return ("answers beside them" if _lives(before) else "restarted"), seconds


def large_prompt(target: Target, megabytes: int = 400) -> tuple[str, float]:
    """A text of so many MB, which the model must refuse, as a binary tensor over HTTP."""
    length = megabytes * 1_000_000
    others = [tensor for tensor in _tensors(target) if tensor["datatype"] != "BYTES"]
    parameters = {"binary_data_size": length + 4}
    prompt = {"name": target.prompt, "datatype": "BYTES", "shape": [1, 1], "parameters": parameters}
    head = json.dumps({"inputs": [*others, prompt]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    body = (head + length.to_bytes(4, "little"), megabytes, b"")
    return _result(target, lambda: _post_letters(target.http, f"/v2/models/{target.model}/infer", headers, *body))


def large_openai_prompt(target: Target, megabytes: int = 400) -> tuple[str, float]:
    """A text of so many MB over the OpenAI port, which must refuse it."""
    body = (b'{"max_tokens": 1, "prompt": "', megabytes, b'"}')
    return _result(target, lambda: _post_letters(target.openai, _COMPLETIONS, {}, *body))


def _post_letters(port: int, path: str, headers: dict[str, str], head: bytes, megabytes: int, tail: bytes) -> str:
    """A body of `head`, so many MB of the letter a, and `tail`; what came of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.putrequest("POST", path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(head) + megabytes * 1_000_000 + len(tail)))
        connection.endheaders(head)
        with contextlib.suppress(ConnectionError):  # the answer may be there before the body's end
            for _ in range(megabytes):
                connection.send(b"a" * 1_000_000)
            connection.send(tail)
        return f"answered {connection.getresponse().status}"
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def bad_words(target: Target, rows: int = 1024, words: int = 256) -> tuple[str, float]:
    """So many rows with so many bad words each, which the model must refuse."""
    tensors = [{**tensor, "shape": [rows, 1], "data": tensor["data"] * rows} for tensor in _tensors(target)]
    many = [f"word {number}" for number in range(rows * words)]
    tensors.append({"name": "bad_words", "datatype": "BYTES", "shape": [rows, words], "data": many})
    return _result(target, lambda: _infer(target, tensors))


def resident(process: psutil.Process) -> int:
    """Bytes of memory of a process and all below it."""
    family = [process, *process.children(recursive=True)]
    total = 0
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total
