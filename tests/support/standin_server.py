"""A stand-in for the server, without Triton: HTTP and gRPC as the client speaks them, and a model of counted words.

The model answers a prompt with the words w0, w1, …, one each `token_s`. What else it shall do stands in the prompt:
"bad": refused; "broken": fails; "busy 2": refused twice as busy; "reset 2": the connection is closed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

import client
from tests.support.launch import ROOT

NAME = "standin"
PROMPT_ID = 99
_DATATYPES = {"sentences": "BYTES", "finish_reason": "BYTES", "sequence_length": "INT64", "output_ids": "INT32"}


class Refusal(Exception):
    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Reset(Exception):
    """Close the connection without an answer."""


class Model:
    """Rows of tensors in, rows out; remembers what it was asked."""

    def __init__(self) -> None:
        self.token_s = 0.0
        self.heeds_stops = True
        self.asked: list[dict[str, np.ndarray]] = []
        self.tries: Counter[str] = Counter()
        self.times: list[float] = []  # of the tries
        self.running: dict[str, asyncio.Event] = {}
        self.stopped: list[str] = []
        self.keys: list[str] = []  # of requests that have one

    async def answer(self, inputs: dict[str, np.ndarray]) -> AsyncIterator[dict[str, np.ndarray]]:
        """One response per token, the prompt in the first; several samples come in one response."""
        request_id = inputs["request_id"].item().decode()
        if "stop" in inputs:
            if request_id not in self.running:
                raise Refusal(f"BadRequest: request_id {request_id} is not running", 400)
            self.stopped.append(request_id)
            if self.heeds_stops:
                self.running[request_id].set()
            yield self._arrays([""], [0], "cancelled", np.zeros((1, 0), np.int32))
            return
        prompt = inputs["prompts"].item().decode() if "prompts" in inputs else "ids"
        self._misbehave(prompt)
        self.asked.append(inputs)
        is_cancelled = self.running[request_id] = asyncio.Event()
        try:
            n = inputs["n"].item() if "n" in inputs else 1
            text, num_tokens = "", inputs["request_output_len"].item()
            for token in range(num_tokens):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(is_cancelled.wait(), self.token_s)
                piece = (prompt if token == 0 else "") + f" w{token}"
                text += piece
                is_last = token == num_tokens - 1 or is_cancelled.is_set()
                reason = ("cancelled" if is_cancelled.is_set() else "length") if is_last else None
                if n == 1:
                    yield self._arrays([piece], [token + 2], reason, np.full((1, 1), token, np.int32))
                elif is_last:
                    ids = np.array([[PROMPT_ID, *range(token + 1)]] * n, np.int32)
                    yield self._arrays([text] * n, [token + 2] * n, reason, ids)
                if is_last:
                    return
        finally:
            self.running.pop(request_id, None)

    def _misbehave(self, prompt: str) -> None:
        word, *number = prompt.split() or [""]
        self.tries[prompt] += 1
        self.times.append(time.monotonic())
        if word == "bad":
            raise Refusal("BadRequest: prompts[0] is bad", 400)
        if word == "broken":
            raise Refusal("InternalError: internal error: it broke", 500)
        if word in ("busy", "reset") and self.tries[prompt] <= int(number[0]):
            raise Refusal("ServerBusy: the queue is full", 503) if word == "busy" else Reset

    @staticmethod
    def _arrays(texts: list[str], lengths: list[int], reason: str | None, ids: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {"sentences": np.array([[text.encode()] for text in texts], dtype=object), "output_ids": ids}
        if reason:
            arrays["sequence_length"] = np.array(lengths)
            arrays["finish_reason"] = np.array([[reason.encode()]] * len(texts), dtype=object)
        return arrays

    async def whole_answer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Batched arrays of one row; output_ids have the prompt too."""
        responses = [response async for response in self.answer({name: a[0] for name, a in inputs.items()})]
        last = responses[-1]
        texts = [
            "".join(piece.decode() for piece in pieces)
            for pieces in zip(*(r["sentences"][:, 0] for r in responses), strict=True)
        ]
        prompt_ids = [np.full((1, 1), PROMPT_ID, np.int32)] if len(texts) == 1 else []
        ids = [*prompt_ids, *(r["output_ids"] for r in responses)]
        arrays = {**last, "sentences": np.array([[text.encode()] for text in texts], dtype=object)}
        return {name: a[None] for name, a in {**arrays, "output_ids": np.concatenate(ids, axis=1)}.items()}


class _Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, model: Model) -> None:
        self.model = model

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in (NAME, f"{NAME}_streaming"))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if "api_key" in request.parameters:
            self.model.keys.append(request.parameters["api_key"].string_param)
        try:
            return self._response(await self.model.whole_answer(self._inputs(request)))
        except (Refusal, Reset) as error:
            codes = {400: grpc.StatusCode.INVALID_ARGUMENT, 500: grpc.StatusCode.INTERNAL}
            code = codes.get(getattr(error, "status", 503), grpc.StatusCode.UNAVAILABLE)
            await context.abort(code, f"[request id: <id_unknown>] {error}")

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            try:
                async for arrays in self.model.answer(self._inputs(request)):
                    yield service_pb2.ModelStreamInferResponse(infer_response=self._response(arrays))
            except Refusal as error:
                yield service_pb2.ModelStreamInferResponse(error_message=f"[request id: <id_unknown>] {error}")
            except Reset:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    @staticmethod
    def _inputs(request: Any) -> dict[str, np.ndarray]:
        return {
            tensor.name: _array(tensor.datatype, tensor.shape, content)
            for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
        }

    @staticmethod
    def _response(arrays: dict[str, np.ndarray]) -> Any:
        response = service_pb2.ModelInferResponse(model_name=NAME)
        for name, array in arrays.items():
            response.outputs.add(name=name, datatype=_DATATYPES[name], shape=array.shape)
            is_text = array.dtype == object
            response.raw_output_contents.append(serialize_byte_tensor(array).item() if is_text else array.tobytes())
        return response


def _array(datatype: str, shape: Any, content: bytes) -> np.ndarray:
    if datatype == "BYTES":
        return deserialize_bytes_tensor(content).reshape(shape)
    return np.frombuffer(content, triton_to_np_dtype(datatype)).reshape(shape)


class _Http:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.app = web.Application(client_max_size=2**28)
        self.app.router.add_get("/v2/health/ready", self.server_ready)
        self.app.router.add_get("/v2/models/{model}/ready", self.ready)
        self.app.router.add_post("/v2/models/{model}/infer", self.infer)
        self.app.router.add_post("/v2/models/{model}/generate_stream", self.generate_stream)

    async def server_ready(self, request: web.Request) -> web.Response:
        return web.Response()

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["model"] in (NAME, f"{NAME}_streaming") else 400)

    async def infer(self, request: web.Request) -> web.Response:
        body = await request.read()
        offset = int(request.headers["Inference-Header-Content-Length"])
        inputs = {}
        head = json.loads(body[:offset])
        if "api_key" in head.get("parameters", {}):
            self.model.keys.append(head["parameters"]["api_key"])
        for tensor in head["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            inputs[tensor["name"]] = _array(tensor["datatype"], tensor["shape"], body[offset : offset + size])
            offset += size
        try:
            arrays = await self.model.whole_answer(inputs)
        except Reset:
            request.transport.close()
            return web.Response()
        except Refusal as error:
            return web.json_response({"error": str(error)}, status=error.status)
        outputs = [
            {"name": name, "datatype": _DATATYPES[name], "shape": a.shape, "data": [_plain(v) for v in a.ravel()]}
            for name, a in arrays.items()
        ]
        return web.json_response({"model_name": NAME, "outputs": outputs})

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        inputs = {}
        for name, values in json.loads(await request.read()).items():
            values = [value.encode() if isinstance(value, str) else value for value in values]
            inputs[name] = np.array(values, dtype=object if isinstance(values[0], bytes) else None)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            async for arrays in self.model.answer(inputs):
                if not answer.prepared:
                    await answer.prepare(request)
                values = {name: [_plain(v) for v in a.ravel()] for name, a in arrays.items()}
                event = {name: v[0] if len(v) == 1 else v for name, v in values.items()}
                await answer.write(f"data: {json.dumps({'model_name': NAME, **event})}\n\n".encode())
        except Reset:
            request.transport.close()
        except Refusal as error:
            if error.status != 500:  # this one after the status, as PyTriton's errors may come
                return web.Response(text=f"data: {json.dumps({'error': str(error)})}", status=error.status)
            await answer.prepare(request)
            await answer.write(f"data: {json.dumps({'error': str(error)})}\n\n".encode())
        return answer


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value.item()


class StandinServer:
    """Inside `with` it serves on ports of its own; `model` is what tests look at."""

    def __init__(self) -> None:
        self.model = Model()
        self.ports: dict[str, int] = {}
        self._is_ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def url(self, kind: str = "http") -> str:
        return f"{kind}://127.0.0.1:{self.ports[kind]}"

    def ask(self, *flags: str, kind: str = "http") -> tuple[int, str, str]:
        """client.main in this process: (exit code, stdout, stderr)."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        argv = ["client.py", "--url", self.url(kind), "--model-name", NAME, *flags]
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = client.main()
        out.flush()
        return code, out.buffer.getvalue().decode(), err.getvalue()

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """client.py as a process of its own."""
        command = [sys.executable, str(ROOT / "client.py"), "--url", self.url(), "--model-name", NAME, *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    async def _serve(self) -> None:
        runner = web.AppRunner(_Http(self.model).app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Grpc(self.model), server)
        self.ports = {"http": runner.addresses[0][1], "grpc": server.add_insecure_port("127.0.0.1:0")}
        await server.start()
        self._over = asyncio.Event()
        self._is_ready.set()
        await self._over.wait()
        await server.stop(0)
        await runner.cleanup()

    def release(self) -> None:
        """End what still runs."""
        for is_cancelled in list(self.model.running.values()):
            self._loop.call_soon_threadsafe(is_cancelled.set)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def standin() -> Iterator[StandinServer]:
    server = StandinServer()
    server._thread.start()
    assert server._is_ready.wait(10)
    try:
        yield server
    finally:
        server.close()


def write(path: Path, *lines: object) -> str:
    """A file of texts and JSON objects, a line each; its path."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


if __name__ == "__main__":
    with standin() as server:
        print(server.url(), server.url("grpc"))
        threading.Event().wait()
