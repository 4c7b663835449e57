"""A patch of PyTriton: requests run side by side, a client that leaves cancels its own, errors are one sentence.

Stock PyTriton 0.7.0 lets one batch at a time through a callable: Triton's `execute` blocks until the callable has
answered, and so a short request waits for every long one before it. It does not tell the callable that a client has
gone, and it sends whole tracebacks to a client that has not. The patch has two sides:

- In Triton's Python stub: stub_model.py, a subclass of the proxy's model, appended to its text on the way to Triton.
  Each request is a coroutine of its own, of a decoupled model or not, and answers through Triton's response sender.
- In this process: each request is a task of its own already. The stub's message that a client has gone cancels the
  task, so that asyncio.CancelledError is raised where the callable awaits.

The patch fits the exact text of the files that it builds on. Where that differs it does nothing, logs one line, and
stock behaviour stays.
"""

from __future__ import annotations

import asyncio
import ctypes
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
_LARGE = 16 << 20  # bytes of a request's message after which free memory goes back to the system
_CANCEL = b"cancel "  # before a request's id, of four bytes: the client of that request has gone

# Appended to the text of proxy/model.py, which has the names that it uses.
_STUB = "\n\n" + Path(__file__).with_name("stub_model.py").read_text(encoding="utf-8")


class CancellableHandler(stock.InferenceHandler):
    """Runs the callable for one request. `cancel` in the request's scope cancels it; that is logged nowhere."""

    async def _handle_requests(self, scope: dict[str, Any], requests: list[Any]) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
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
    """Takes the stub's messages: a request to run, or that a request's client has gone."""

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
            if len(requests_payload) >= _LARGE:  # later: the callable's thread may still hold the arrays
                asyncio.get_running_loop().call_later(1.0, _give_memory_back)


def _give_memory_back() -> None:
    """Let glibc return the pages that it keeps: hundreds of MB after a request of many long strings."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def digest(folder: Path) -> str:
    """The sha256 of the files that the patch builds on, in an installed PyTriton's folder."""
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
    original = stock.Model.generate_model

    def generate_model(self: stock.Model, model_repository: Path) -> None:
        original(self, model_repository)
        with (model_repository / self.model_name / str(self.model_version) / "model.py").open("a") as file:
            file.write(_STUB)

    stock.Model.generate_model = generate_model
    stock.InferenceHandler = CancellableHandler
    stock.RequestsResponsesConnector = CancellableConnector
    return True
