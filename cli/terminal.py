"""Messages on stderr: complaints, and signs of life while the client waits.

It knows the terminal only, no prompts and no server.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_CLEAR_LINE = "\r\033[K"


@contextlib.contextmanager
def sign_of_life(message: str | Callable[[], str]) -> Iterator[None]:
    """While inside, show a message and the elapsed time on stderr: each second on a terminal, else less often."""
    is_over = threading.Event()
    is_terminal = sys.stderr.isatty()
    started = time.monotonic()

    def tick() -> None:
        while not is_over.wait(1.0 if is_terminal else min(max(5.0, (time.monotonic() - started) / 5), 60.0)):
            text = message() if callable(message) else message
            text = f"{text}, {time.monotonic() - started:.0f} s"
            print(
                _CLEAR_LINE + text if is_terminal else text,
                end="" if is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
        if is_terminal:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def complain(sentence: str) -> None:
    """Print a complaint to stderr."""
    print(complaint(sentence), end="", file=sys.stderr)


def complaint(sentence: str) -> str:
    """A complaint as a line, with the script's name."""
    return f"{_CLEAR_LINE if sys.stderr.isatty() else ''}client.py: {sentence}\n"
