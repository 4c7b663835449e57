"""Ranks that stay: they run one function after another, so that a test does not wait for torch to be imported.

    mpirun -n 4 python tests/multi/pool.py SOCKET

Rank 0 connects to the Unix socket and takes (function, arguments) from it, with function as "module:name". Every rank
calls function(world, *arguments); rank 0 answers with all ranks' results. An exception on any rank ends the job, a
closed connection ends it with code 0. tests.support.ranks has the other end.
"""

from __future__ import annotations

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
    connection: Connection | None = None
    if world.rank == 0:
        client = socket.socket(socket.AF_UNIX)
        client.connect(sys.argv[1])
        connection = Connection(client.detach())
    while (job := _next_job(world, connection)) is not None:
        results = _run(world, *job)
        if connection is not None:
            connection.send(results)


def _next_job(world: World, connection: Connection | None) -> Any:
    """The next job, on every rank; None where there are no more."""
    if connection is None:
        return world.receive()
    try:
        job = connection.recv()
    except EOFError:  # the tests are over, or were killed
        job = None
    world.send(job)
    return job


def _run(world: World, function: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Each rank's result, in rank order."""
    try:
        module, _, name = function.partition(":")
        results = world.gather(getattr(importlib.import_module(module), name)(world, *arguments))
        gc.collect()  # an engine's cycles hold its KV cache
        return results
    except BaseException:
        traceback.print_exc()
        world.abort()
        raise


if __name__ == "__main__":
    main()
