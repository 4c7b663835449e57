"""Requests to the server over HTTP or gRPC: tensors out, arrays back, retries, cancellation.

This file owns Triton's two protocols and their errors. It knows no files or exit codes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from cli.parameters import PARAMETERS, Prompt
from cli.terminal import complain

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between the tries of one request
_STOP_TIMEOUT_S = 1.0
_LOADING_S = 10.0  # Triton may be ready for so long before the server has given it the model


def make_inputs(prompt: Prompt) -> dict[str, np.ndarray]:
    """A request's tensors, without the batch dimension."""
    # surrogateescape: bytes of the command line that are not UTF-8 are sent unchanged; the server refuses them
    inputs = {}
    if "prompt" in prompt.content:
        inputs["prompts"] = np.array([prompt.content["prompt"].encode("utf-8", "surrogateescape")], dtype=object)
    if "input_ids" in prompt.content:
        inputs["input_ids"] = np.array(prompt.content["input_ids"], dtype=np.int32)
    if "messages" in prompt.content:
        inputs["messages"] = np.array([json.dumps(prompt.content["messages"]).encode()], dtype=object)
    for parameter in PARAMETERS:
        value = prompt.parameters.get(parameter.name)
        if value is not None and value != []:  # a tensor without elements hangs Triton's Python backend
            values = [
                v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v
                for v in (value if parameter.is_list else [value])
            ]
            inputs[parameter.tensor] = np.array(values, dtype=parameter.dtype)
    return inputs


class Failure(Exception):
    """The server's refusal, or an error of the connection, in one sentence."""


class Busy(Failure):
    """The server's queue is full; another try may succeed."""


class Gone(Failure):
    """The connection broke, or there is none; another try may succeed."""


OnResponse = Callable[[dict[str, Any]], None]


class HttpConnection:
    """Triton's HTTP protocol: binary tensors, and server-sent events for streams."""

    def __init__(self, url: str) -> None:
        import aiohttp
        from tritonclient.http import InferInput
        from tritonclient.http.aio import InferenceServerClient

        self.url = url
        self.input_class = InferInput
        self.broken = (aiohttp.ClientError, OSError)
        # No limits: one on connections would keep a `stop` waiting behind the requests that it is to stop.
        self.client = InferenceServerClient(url.removeprefix("http://"), conn_limit=0, conn_timeout=None)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    def arrays(self, result: Any) -> dict[str, np.ndarray]:
        """The outputs of tritonclient's result, by name."""
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    async def stream(self, model: str, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        """Send; call `on_response` with the arrays of each response. Raises the libraries' own exceptions."""
        body = {name: [as_text(value) for value in array.tolist()] for name, array in inputs.items()}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
        num_alternatives = int(inputs["num_log_probs"][0]) if "num_log_probs" in inputs else 1
        async with self._session.post(f"{self.url}/v2/models/{model}/generate_stream", data=data) as answer:
            if answer.status != 200:
                text = (await answer.text(errors="replace")).removeprefix("data: ")
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    text = json.loads(text)["error"]
                raise InferenceServerException(text or answer.reason, str(answer.status))
            rest = b""
            async for chunk in answer.content.iter_any():
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    response = json.loads(event.removeprefix(b"data: "))
                    if "error" in response:
                        raise InferenceServerException(response["error"])
                    on_response(_arrays(response, num_alternatives))

    async def close(self) -> None:
        await self._session.close()
        await self.client.close()


class GrpcConnection:
    """Triton's gRPC protocol; the same methods as HttpConnection."""

    def __init__(self, url: str) -> None:
        import grpc
        from tritonclient.grpc import InferInput
        from tritonclient.grpc.aio import InferenceServerClient

        self.url = url
        self.input_class = InferInput
        self.broken = (grpc.RpcError,)
        options = {
            "grpc.max_send_message_length": -1,
            "grpc.max_receive_message_length": -1,
            "grpc.initial_reconnect_backoff_ms": 200,  # gRPC's own would wait for up to two minutes
            "grpc.max_reconnect_backoff_ms": 1000,
        }
        self.client = InferenceServerClient(url.removeprefix("grpc://"), channel_args=list(options.items()))

    def arrays(self, result: Any) -> dict[str, np.ndarray]:
        """The outputs of tritonclient's result, by name."""
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    async def stream(self, model: str, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        """As HttpConnection's."""

        async def request() -> Any:
            yield {"model_name": model, "inputs": _tensors(self.input_class, inputs)}

        answer = self.client.stream_infer(request())
        try:
            async for result, error in answer:
                if error:
                    raise error
                on_response(self.arrays(result))
        finally:
            answer.cancel()

    async def close(self) -> None:
        await self.client.close()


def _tensors(input_class: type, inputs: dict[str, np.ndarray]) -> list[Any]:
    made = [(a, input_class(name, a.shape, np_to_triton_dtype(a.dtype))) for name, a in inputs.items()]
    return [tensor.set_data_from_numpy(array) for array, tensor in made]


def as_text(value: Any) -> Any:
    """An element of an array; bytes become a string."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _id(request_id: str) -> dict[str, np.ndarray]:
    return {"request_id": np.array([request_id.encode()], dtype=object)}


def _arrays(response: dict[str, Any], num_alternatives: int) -> dict[str, np.ndarray]:
    """The arrays of a server-sent event, in their shapes: Triton sends flat lists, and scalars for single elements."""
    arrays = {name: np.atleast_1d(value) for name, value in response.items() if not name.startswith("model_")}
    num_sequences = len(arrays["sentences"])
    shapes: dict[str, tuple[int, ...]] = {"output_ids": (num_sequences, -1), "output_log_probs": (num_sequences, -1)}
    shapes |= dict.fromkeys(("top_token_ids", "top_log_probs"), (num_sequences, -1, num_alternatives))
    return {name: array.reshape(shapes.get(name, (-1,))) for name, array in arrays.items() if array.size}


@contextlib.contextmanager
def _failures(connection: HttpConnection | GrpcConnection) -> Iterator[None]:
    """Turn the libraries' exceptions into Failure, Busy and Gone."""
    try:
        yield
    except InferenceServerException as error:
        text, status = error.message(), str(error.status())
    except connection.broken as error:
        call: Any = error if hasattr(error, "details") else None  # gRPC's error is the call, too
        text = call.details() if call else f"{type(error).__name__}: {error}"
        status = str(call.code()) if call else "UNAVAILABLE"
    except ValueError as error:  # the server is not Triton
        text, status = f"the answer cannot be read ({type(error).__name__}: {error})", ""
    else:
        return
    if status == "503" or "ServerBusy: " in text:
        raise Busy(_sentence(text))
    if "UNAVAILABLE" in status:
        raise Gone(f"the connection to {connection.url} broke ({_sentence(text)})")
    raise Failure(_sentence(text))


def _sentence(text: str) -> str:
    """The server's own sentence, without the libraries' prefixes."""
    text = " ".join(text.split())
    text = re.sub(r"^.*?Message: ", "", text)
    text = re.sub(r"^\[request id: \S*\] ", "", text)
    return re.sub(r"^(BadRequest|ServerBusy|InternalError): ", "", text)


class Transport:
    """Sends requests, each with an id of its own; repeats failed ones; cancels the running ones."""

    def __init__(self, connection: HttpConnection | GrpcConnection, flags: argparse.Namespace) -> None:
        self.connection = connection
        self.flags = flags
        self.is_streaming = flags.stream or flags.bench
        self.model = flags.model_name + ("_streaming" if self.is_streaming else "")
        self.running: dict[str, None] = {}  # ids
        self.is_stopping = False
        self._is_gone = False
        key = (flags.api_key or os.environ.get("SERVER_API_KEY", "")).strip()  # as the server reads it
        self._stop_parameters = {"api_key": key} if key else None

    async def is_ready(self) -> bool:
        """Wait for the model; False if it is not ready within --init-timeout-s.

        Tells the user once that the server is ready without it.
        """
        started = time.monotonic()
        deadline = started + self.flags.init_timeout_s
        is_told = False
        while True:
            left = max(deadline - time.monotonic(), 0.1)
            if await self._answers_yes(self.connection.client.is_model_ready(self.model), left):
                return True
            if time.monotonic() > deadline:
                return False
            if not is_told and time.monotonic() - started > _LOADING_S:
                is_told = await self._answers_yes(self.connection.client.is_server_ready(), left)
                if is_told:
                    complain(
                        f"the server at {self.connection.url} is ready, but has no model {self.model} so far; the "
                        "server's line `ready: model …` has the --model-name"
                    )
            await asyncio.sleep(0.2)

    async def _answers_yes(self, question: Awaitable[bool], limit_s: float) -> bool:
        with contextlib.suppress(Failure, asyncio.TimeoutError), _failures(self.connection):
            return await asyncio.wait_for(question, limit_s)
        return False

    async def send(self, inputs: dict[str, np.ndarray], on_response: OnResponse) -> list[dict[str, np.ndarray]]:
        """Send a request, up to --retries more times; returns its responses. Raises Failure.

        on_response: called with each response as it comes.
        """
        responses: list[dict[str, np.ndarray]] = []

        def take(response: dict[str, np.ndarray]) -> None:
            responses.append(response)
            on_response(response)

        for tries in range(1, self.flags.retries + 2):
            try:
                await self.attempt(inputs, take)
                self._is_gone = False
                return responses
            except (Busy, Gone) as error:
                is_gone = isinstance(error, Gone)
                # A server that stayed away for all tries of one prompt gets one try for each further prompt.
                if responses or self.is_stopping or tries > self.flags.retries or (is_gone and self._is_gone):
                    self._is_gone = is_gone and not responses
                    raise
            pause = min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")

    async def attempt(self, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        """Send a request once. Raises Failure."""
        request_id = uuid.uuid4().hex
        inputs = {**inputs, **_id(request_id)}
        self.running[request_id] = None
        try:
            await asyncio.wait_for(self._transfer(inputs, on_response), self.flags.inference_timeout_s)
        except asyncio.TimeoutError:
            await self._stop(request_id)
            raise Failure(f"no answer within {self.flags.inference_timeout_s:g} s") from None
        finally:
            del self.running[request_id]

    async def _transfer(self, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        names: set[str] = set()

        def take(response: dict[str, np.ndarray]) -> None:
            names.update(response)
            on_response(response)

        with _failures(self.connection):
            if self.is_streaming:
                await self.connection.stream(self.model, inputs, take)
            else:
                take(await self._infer(inputs))
        if "finish_reason" not in names:  # a proxy may end a stream that was cut as if it were whole
            raise Gone(f"the connection to {self.connection.url} broke (the answer has no end)")

    async def _infer(
        self, inputs: dict[str, np.ndarray], parameters: dict[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        """One request to the model that does not stream; its arrays have a batch dimension."""
        tensors = _tensors(self.connection.input_class, {name: array[None] for name, array in inputs.items()})
        result = await self.connection.client.infer(self.flags.model_name, tensors, parameters=parameters)
        return {name: array[0] for name, array in self.connection.arrays(result).items()}

    async def _stop(self, request_id: str) -> None:
        inputs = {**_id(request_id), "stop": np.array([True])}
        with contextlib.suppress(Failure, asyncio.TimeoutError), _failures(self.connection):
            await asyncio.wait_for(self._infer(inputs, self._stop_parameters), _STOP_TIMEOUT_S)

    async def stop_all(self) -> None:
        """Cancel the running requests on the server; waits for it up to a second."""
        self.is_stopping = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop_running(), _STOP_TIMEOUT_S)

    async def _stop_running(self) -> None:
        """Repeated, because a request may not have arrived yet."""
        while self.running:
            await asyncio.gather(*map(self._stop, list(self.running)), asyncio.sleep(0.2))
