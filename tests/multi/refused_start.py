"""On every rank: server.py's main with a command line that must be refused. tests/e2e/test_refusals.py calls it."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
from unittest import mock

from engine.world import World


def run(world: World, *flags: str) -> tuple[int, str]:
    """This rank's exit code, and what it has written to stdout and stderr."""
    import server  # here, for the ranks that stay to start without it

    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        with (
            mock.patch.object(sys, "argv", ["server.py", *flags]),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            code = server.main()
    finally:
        logging.basicConfig(stream=sys.stderr, force=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, output.getvalue()
