"""A patch of PyTriton: requests run side by side, a client that leaves cancels its own, errors are one sentence.

Stock PyTriton 0.7.0 lets one batch at a time through a callable: Triton's `execute` blocks until the callable has
answered, and so a short request waits for every long one before it. It tells the callable nothing of a client that
has gone, and sends whole tracebacks to one that has not. The patch has two sides:

- In Triton's Python stub: a subclass of the proxy's model, appended to its text on the way to Triton. Each request
  is a coroutine of its own, of a decoupled model or not, and answers through Triton's response sender.
- In this process: each request is a task of its own already; the stub's message about a client that has gone
  cancels it, so that asyncio.CancelledError is raised where the callable awaits.

It fits the exact text of the files that it builds on. Where that differs it does nothing, says so, and stock
behaviour stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytriton
import pytriton.models.model as stock
from pytriton.proxy.communication import PyTritonResponseFlags

_LOG = logging.getLogger("serving")
_VERSION = "0.7.0"
_FILES = ("proxy/model.py", "proxy/communication.py", "proxy/inference.py", "models/model.py")
_DIGEST = "04f0c6f001da19af4394f30c1a7c0eabf759a12dae3ba7de2c49b26d2557572d"  # sha256 of the files in that order
_CANCEL = b"cancel "  # before a request's id, of four bytes: the client of that request has gone

_STUB = (
    f"\n\nimport time\n\n_CANCEL = {_CANCEL!r}"
    + '''
_POLL = -1  # instead of a message's flags: time to ask whether the client is still there
_POLL_S = 0.1
_MAX_POLLS = 1000  # a second, of all requests together: each costs Triton and the stub about 60 µs
_CODES = {"BadRequest": "INVALID_ARG", "ServerBusy": "UNAVAILABLE"}  # HTTP 400 and 503; all else is INTERNAL, 500
_FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL, which pb_utils lacks while this text is imported


def _error_response(text):
    """The last line of an exception's text, which is its sentence: the traceback above is not the client's."""
    sentence = text.strip().rpartition("\\n")[2]
    code = getattr(pb_utils.TritonError, _CODES.get(sentence.partition(": ")[0], "INTERNAL"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence, code))


def _end_with_parent(parent):
    """To ask a sender of a tritonserver that has died waits for ever, and so would this process."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


class TritonPythonModel(TritonPythonModel):
    """Each request runs and answers on its own, whatever others take, and ends when its client leaves."""

    def initialize(self, args):
        super().initialize(args)
        self._server = self._requests_server._server
        self._server._handle_responses_fn = self._answer
        self._stock_wrap_request = self._requests_server._wrap_request
        self._requests_server._wrap_request = self._wrap_request
        self._poll_task = None
        self._poll_s = _POLL_S
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def execute(self, triton_requests):
        self._server.wait_till_running()
        for request in triton_requests:
            coroutine = self._start(request, request.get_response_sender())
            asyncio.run_coroutine_threadsafe(coroutine, self._server.server_loop)

    async def _start(self, request, sender):
        self._poll_task = self._poll_task or asyncio.create_task(self._poll())
        self._id_counter += 1  # four bytes last for as long as any request does
        requests_id = (self._id_counter % 2**32).to_bytes(4, "big")
        self._requests[requests_id] = (request, sender)
        try:
            await self._requests_server._send_requests(requests_id, [request])
        except Exception as error:
            if requests_id not in self._server._responses_queues:  # else the answer is on its way
                del self._requests[requests_id]
                sender.send(_error_response(str(error)), _FINAL)

    def _wrap_request(self, *args):
        """An empty list of strings is as good as none, and PyTriton's serializer fails on it."""
        request = self._stock_wrap_request(*args)
        request.data = {name: array for name, array in request.data.items() if array.size or array.dtype != object}
        return request

    async def _poll(self):
        """Wake every request that has nothing else to do: one timer costs less than one for each."""
        while True:
            queues = list(self._server._responses_queues.values())
            self._poll_s = max(_POLL_S, len(queues) / _MAX_POLLS)
            await asyncio.sleep(self._poll_s)
            for queue in queues:
                if queue.empty():
                    queue.put_nowait((_POLL, b""))

    async def _answer(self, scope, responses_queue, responses_future):
        """Pass a request's responses on to Triton, the final flag last whatever happens.

        Only here is the sender asked whether its client has gone: to ask during or after the final flag ends Triton.
        The callable is told again and again, for it may not have begun when it is told first.
        """
        requests_id = scope["requests_id"]
        request, sender = self._requests[requests_id]
        loop = asyncio.get_running_loop()
        polled = loop.time()
        response = None if self._decoupled_model else _error_response("there is no answer")
        try:
            while True:
                flags, payload = await responses_queue.get()
                if flags == _POLL or loop.time() - polled > self._poll_s:
                    polled = loop.time()
                    if sender.is_cancelled():
                        await self._server._socket.send_multipart([_CANCEL + requests_id, b""])
                if flags == _POLL:
                    continue
                if flags & PyTritonResponseFlags.ERROR:
                    response = _error_response(payload.decode("utf-8"))
                elif payload:
                    response = self._response(request, payload)
                    if self._decoupled_model:
                        sender.send(response, 0)
                        response = None
                if flags & PyTritonResponseFlags.EOS:
                    break
        except Exception as error:
            response = _error_response(str(error))
        finally:
            del self._requests[requests_id]
            sender.send(response, _FINAL)

    def _response(self, request, payload):
        try:
            responses = self._serializer_deserializer.deserialize_responses(payload)
            return _wrap_response(responses[0], request.requested_output_names(), self._model_outputs)
        finally:
            self._serializer_deserializer.free_responses_resources(payload)
'''
)


class CancellableHandler(stock.InferenceHandler):
    """Runs the callable; leaves in the request's scope how to cancel it, and ends a cancelled one quietly."""

    async def _handle_requests(self, scope: dict[str, Any], requests: list[Any]) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        scope["cancel"] = lambda: loop.call_soon_threadsafe(task.cancel)
        send = self._requests_responses_connector.send
        try:
            async for responses in self._model_callable(requests):
                self._validator.validate_responses(requests, responses)
                send(scope, PyTritonResponseFlags(0), responses)
            send(scope, PyTritonResponseFlags.EOS, None)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                error = RuntimeError("the request was cancelled")  # for clients of a server that stops
            elif error.__traceback__ is not None:  # one without a traceback is the client's affair
                _LOG.warning("a request failed", exc_info=error)
            send(scope, PyTritonResponseFlags.ERROR | PyTritonResponseFlags.EOS, error)


class CancellableConnector(stock.RequestsResponsesConnector):
    """Takes the stub's messages: a request to run, or word that a request's client has gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scopes: dict[bytes, dict[str, Any]] = {}

    async def handle_requests(
        self, scope: dict[str, Any], requests_payload: bytes, send: Callable[..., Awaitable[None]]
    ) -> None:
        requests_id = scope["requests_id"]
        if requests_id.startswith(_CANCEL):
            running = self._scopes.get(requests_id.removeprefix(_CANCEL), {})
            cancel = running.pop("cancel", None)  # absent until the task runs: the stub repeats its message
            if cancel is not None:
                cancel()
            return
        self._scopes[requests_id] = scope
        try:
            await super().handle_requests(scope, requests_payload, send)
        finally:
            del self._scopes[requests_id]


def digest(folder: Path) -> str:
    """Of the text that the patch builds on, in an installed PyTriton's folder."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _FILES)).hexdigest()


def install() -> bool:
    """Let every model bound from now on use the patched proxy; returns whether the patch fits."""
    if stock.InferenceHandler is CancellableHandler:
        return True
    if digest(Path(pytriton.__file__).parent) != _DIGEST:
        _LOG.warning(
            "PyTriton %s is not the %s that the patch fits: requests run one batch at a time, none is cancelled",
            importlib.metadata.version("nvidia-pytriton"),
            _VERSION,
        )
        return False
    original = stock.Model.get_proxy_model_files

    def get_proxy_model_files(self: stock.Model) -> dict[str, bytes]:
        files = original(self)
        files[f"file:{self.model_version}/model.py"] += _STUB.encode()
        return files

    stock.Model.get_proxy_model_files = get_proxy_model_files
    stock.InferenceHandler = CancellableHandler
    stock.RequestsResponsesConnector = CancellableConnector
    return True
