"""Ranks that stay: they run one function after another, so that a test does not wait for torch to be imported.

    mpirun -n 4 python tests/multi/pool.py SOCKET

Each rank connects to the Unix socket, sends its number, and takes (function, arguments) from there, with function as
"module:name". It calls function(world, *arguments) and sends the result. An exception on any rank ends the job, closed
connections end it with code 0. tests.support.ranks has the other end. A rank that waits costs nothing, as it does not
wait in MPI.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from engine.world import World


def main() -> None:
    world = World()
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    connection = Connection(client.detach())
    connection.send(world.rank)
    with contextlib.suppress(EOFError, ConnectionError):  # the tests are over, or were killed
        while True:
            connection.send(_run(world, *connection.recv()))


def _run(world: World, function: str, arguments: tuple[Any, ...]) -> Any:
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(world, *arguments)
        gc.collect()  # an engine's cycles hold its KV cache
        return result
    except BaseException:
        traceback.print_exc()
        world.abort()
        raise


if __name__ == "__main__":
    main()
