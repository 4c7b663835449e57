"""A port that has /metrics and nothing else: for Prometheus where the OpenAI port is off, or needs a key."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_IDLE_TIMEOUT_S = 10.0  # a client that sends nothing is left


class MetricsPort:
    """A serving.startup.FrontEnd without requests. Its threads end with the process."""

    def __init__(self, address: str, port: int, exposition: Callable[[str], tuple[bytes, str]]) -> None:
        """exposition: from a client's Accept header to (body, content type), as ServerMetrics has it."""
        self.address = address
        self.port = port
        self._exposition = exposition
        self._server: ThreadingHTTPServer | None = None

    @property
    def urls(self) -> list[str]:
        """Where Prometheus finds it."""
        host = socket.gethostname() if self.address == "0.0.0.0" else self.address
        return [f"http://{host}:{self.port}/metrics"]

    def start(self) -> None:
        """Listen. Raises RuntimeError where the port cannot be had."""
        try:
            self._server = _Server((self.address, self.port), _handler(self._exposition))
        except OSError as error:
            raise RuntimeError(f"prometheus_port is {self.port}; it cannot be bound ({error})") from None
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def refuse(self) -> None:
        """Nothing to do: the metrics of a drain are worth a look."""

    def stop(self) -> None:
        """Close the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def kill(self) -> None:
        """Nothing to do: it ends with this process."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may keep its connection


def _handler(exposition: Callable[[str], tuple[bytes, str]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _IDLE_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body, content_type = exposition(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: a scrape every few seconds is no news."""

    return Handler
