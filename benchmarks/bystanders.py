"""Clients that ask while a server is attacked, and count what they see."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PAUSE_S = 0.25  # between two requests
_TIMEOUT_S = 60.0


@dataclass
class Seen:
    """What one client saw. last_error: when the last request began that got an error, in time.monotonic()."""

    num_right: int = 0
    num_wrong: int = 0
    num_errors: int = 0
    longest_s: float = 0.0  # of a right answer
    last_error: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_right} right, {self.num_wrong} wrong, {self.num_errors} errors, longest {self.longest_s:.2f} s"
        )


class Bystander:
    """Asks again and again in a thread, until `stop`."""

    def __init__(self, ask: Callable[[], str], right: str) -> None:
        """right: the text that `ask` must return each time; it raises OSError or HTTPException for an error."""
        self._ask = ask
        self._right = right
        self._seen = Seen()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> Seen:
        """What it saw since the last call."""
        with self._lock:
            seen, self._seen = self._seen, Seen()
            return seen

    def stop(self) -> None:
        """Ask no more."""
        self._is_over.set()
        self._thread.join(_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_over.wait(_PAUSE_S):
            began = time.monotonic()
            try:
                text = self._ask()
            except (OSError, http.client.HTTPException):
                with self._lock:
                    self._seen.num_errors += 1
                    self._seen.last_error = began
                continue
            with self._lock:
                self._seen.longest_s = max(self._seen.longest_s, time.monotonic() - began)
                if text == self._right:
                    self._seen.num_right += 1
                else:
                    self._seen.num_wrong += 1


def ask_openai(port: int, prompt: str, num_tokens: int) -> str:
    """The text after a prompt, over /v1/completions. Raises OSError or HTTPException."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    return _post(port, "/v1/completions", body)["choices"][0]["text"]


def ask_triton(port: int, model: str, prompt: str, num_tokens: int) -> str:
    """The text after a prompt, over Triton's HTTP port. Raises OSError or HTTPException."""
    body = {"prompts": prompt, "request_output_len": num_tokens, "exclude_input_in_output": True}
    return _post(port, f"/v2/models/{model}/generate", body)["sentences"]


def _post(port: int, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return json.loads(answer.read())
