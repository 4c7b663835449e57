"""Run under mpirun: the control channel's messages, waits and limits. Every rank exits 0 where all is well.

With --silent, rank 0 falls silent at the end, and the others must end the job with code 1.

mpirun -n 3 python tests/multi/control_channel.py
"""

from __future__ import annotations

import resource
import sys
import time

from engine.world import World


def main() -> None:
    world = World()
    messages = [{"small": 1}, "x" * 4087, "y" * 4200, list(range(500_000)), None]  # around the header, and beyond
    for message in messages:
        if world.rank == 0:
            world.send(message)
        else:
            assert world.receive() == message
    assert world.gather(world.rank**2) == [rank**2 for rank in range(world.size)]
    assert world.agree("late" if world.rank == 1 else None) == "late"
    assert world.agree(None) is None
    check_post_does_not_wait(world)
    check_waiting_is_cheap(world)
    if "--silent" in sys.argv:
        check_timeout(world)


def check_post_does_not_wait(world: World) -> None:
    """Rank 0 goes on while the others do not listen yet."""
    messages = [bytes([number]) * 3500 for number in range(12)]
    world.barrier()
    if world.rank == 0:
        started = time.monotonic()
        for message in messages:
            world.post(message)
        assert time.monotonic() - started < 1
        world.send("last")
        assert time.monotonic() - started > 1.5
    else:
        time.sleep(2)
        for message in [*messages, "last"]:
            assert world.receive() == message


def check_waiting_is_cheap(world: World) -> None:
    """Two seconds without a message cost a waiting rank less than a tenth of a core."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    if world.rank == 0:
        time.sleep(2)
        world.send("awake")
    else:
        assert world.receive() == "awake"
        after = resource.getrusage(resource.RUSAGE_SELF)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 0.2, seconds


def check_timeout(world: World) -> None:
    """Rank 0 says nothing: the others notice, and one of them ends the job."""
    if world.rank == 0:
        time.sleep(60)
    try:
        world.receive(timeout_s=0.2)
    except RuntimeError as error:
        print(error, flush=True)
        world.abort()


if __name__ == "__main__":
    main()
