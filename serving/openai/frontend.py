"""The OpenAI API's server in rank 0: a thread with an event loop of its own, beside Triton."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from serving.generation import Generator
from serving.openai.app import Endpoints
from serving.openai.flags import OpenAIFlags
from serving.openai.model import ServedModel

_BACKLOG = 1024  # connections that wait to be accepted
_LINGER_S = 2.0  # to read the rest of a body that was refused, so that its client sees the answer
_LAST_WRITES_S = 10.0  # for answers that are ready when the server stops


class OpenAIFrontend:
    """Serves the API from `start` to `stop`. All methods may be called from any thread."""

    def __init__(
        self,
        flags: OpenAIFlags,
        address: str,
        generator: Generator,
        model: ServedModel,
        exposition: Callable[[str], tuple[bytes, str]],
    ) -> None:
        self.flags = flags
        self.address = address
        self._is_ready = False
        self._endpoints = Endpoints(
            generator,
            model,
            lambda: self._is_ready,
            exposition,
            api_key=flags.key,
            max_request_bytes=flags.max_request_bytes,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai", daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def urls(self) -> list[str]:
        """Where clients find it."""
        host = socket.gethostname() if self.address == "0.0.0.0" else self.address
        return [f"{'https' if self.flags.ssl_certfile else 'http'}://{host}:{self.flags.openai_port}/v1"]

    def start(self) -> None:
        """Listen. Raises RuntimeError where the port cannot be had."""
        _allow_many_connections()
        # aiohttp logs a traceback for bytes that are no HTTP and for clients that go away: anyone could fill the log.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        self._thread.start()
        try:
            self._call(self._listen())
        except OSError as error:
            raise RuntimeError(f"openai_port is {self.flags.openai_port}; it cannot be bound ({error})") from None
        self._is_ready = True

    def refuse(self) -> None:
        """Turn /health off and refuse new requests; those that run go on."""
        self._is_ready = False

    def stop(self) -> None:
        """Send what is ready, then close the port."""
        self.refuse()
        if self._runner is not None:
            self._call(self._runner.cleanup())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def kill(self) -> None:
        """Nothing to do: it ends with this process."""

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self) -> None:
        # A client that goes away cancels its handler, and with it its request.
        self._runner = web.AppRunner(
            self._endpoints.application(),
            handler_cancellation=True,
            access_log=None,
            lingering_time=_LINGER_S,
            shutdown_timeout=_LAST_WRITES_S,
        )
        await self._runner.setup()
        tls = self.flags.make_tls_context()
        site = web.TCPSite(self._runner, self.address, self.flags.openai_port, ssl_context=tls, backlog=_BACKLOG)
        await site.start()


def _allow_many_connections() -> None:
    """Raise the limit of open files as far as it goes: each connection is one, and 1024 is a usual limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
