"""The MPI world: ranks, the control channel from rank 0 to all, and collectives on numpy arrays.

The only module that imports mpi4py. One thread per rank calls it.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

# Waiting ranks yield their core inside MPI: on a CPU, computing ranks share it.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

from mpi4py import MPI  # noqa: E402 - the import initializes MPI, after the variable above is set

_HEADER_BYTES = 3584  # holds a plan of 512 decode rows; below MPI's eager limit
_LENGTH_BYTES = 8
_MOST_POSTED = 16  # messages that MPI keeps for ranks that are late
_YIELD_S = 0.002  # a waiting rank yields its core for so long, then it sleeps
_SLEEP_SHARE = 0.01  # a sleep lasts this share of the wait so far: the largest relative delay of a message
_LONGEST_SLEEP_S = 0.005  # a poll costs about 50 µs: 1 % of a core
_POST_S = 1.0
_POLL_S = 0.0001


def check_size(size: int, expected: int, command: str) -> None:
    """Raise ValueError if the world has another size than expected; command: the right one, for the message."""
    launcher, num_started = _launched()
    if size == 1 and num_started > 1:
        remedy = "start with srun --mpi=pmix" if launcher == "Slurm" else "take the mpirun of mpi4py's MPI library"
        raise ValueError(f"{num_started} {launcher} tasks, but each is an MPI world of its own: {remedy}")
    if size != expected:
        raise ValueError(f"tp × pp takes {expected} ranks and {size} were started: {command}")


def is_surplus(size: int) -> bool:
    """Whether this process is a world of its own, by mistake, and another one was started before it."""
    number = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("SLURM_PROCID", "0"))
    return size == 1 < _launched()[1] and number != "0"


def _launched() -> tuple[str, int]:
    """The launcher of this process, and how many it started. mpirun's variables come first: it runs inside srun too."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return "mpirun", int(os.environ["OMPI_COMM_WORLD_SIZE"])
    return "Slurm", int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1


class Group:
    """Collectives and messages on contiguous numpy arrays, over some of the world's ranks."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm

    def all_reduce(self, array: np.ndarray) -> None:
        """Sum over the group, in place; fp32, fp64 or an integer type."""
        self._comm.Allreduce(MPI.IN_PLACE, array)

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        """Gather every rank's array [n], in rank order, into out [ranks · n]."""
        self._comm.Allgather(array, out)

    def all_to_all(self, array: np.ndarray, out: np.ndarray) -> None:
        """Give each rank its part of array [ranks · n], in rank order; out: the parts from all ranks, likewise."""
        self._comm.Alltoall(array, out)

    def send(self, array: np.ndarray, rank: int) -> MPI.Request:
        """Start to send the array to one rank of the group, which calls `receive`."""
        return self._comm.Isend(array, dest=rank)

    def receive(self, array: np.ndarray, rank: int) -> MPI.Request:
        """Start to receive into the array, from one rank of the group."""
        return self._comm.Irecv(array, source=rank)

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank."""
        return self._comm.bcast(value, root=0)

    def min(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return self._comm.allreduce(value, op=MPI.MIN)


class World:
    """The MPI world: this process's rank, and the control channel from rank 0 to all."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = node.rank
        self.local_size: int = node.size
        node.Free()
        self.all_ranks = Group(self._comm)
        self._buffer = np.zeros(_HEADER_BYTES, dtype=np.uint8)
        self._posted: deque[MPI.Request] = deque()  # oldest first; each keeps its message

    def split(self, color: int, key: int) -> Group:
        """The group of the ranks with the same color, in order of key; every rank of the world calls this."""
        return Group(self._comm.Split(color=color, key=key))

    def send(self, message: Any) -> None:
        """Rank 0: send a picklable message to all other ranks, which call `receive`, and wait until they have it."""
        self.post(message)
        while self._posted:
            self._wait(self._posted.popleft())

    def post(self, message: Any) -> None:
        """As `send`, but rank 0 does not wait where the message is small: a rank may still compute an earlier plan."""
        if self.size == 1:
            return
        while self._posted and (self._posted[0].Test() or len(self._posted) >= _MOST_POSTED):
            self._wait(self._posted.popleft())
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        header = np.zeros(_HEADER_BYTES, dtype=np.uint8)
        inline = len(payload) <= _HEADER_BYTES - _LENGTH_BYTES
        header[:_LENGTH_BYTES] = np.frombuffer(len(payload).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
        if inline:
            header[_LENGTH_BYTES : _LENGTH_BYTES + len(payload)] = np.frombuffer(payload, np.uint8)
        self._posted.append(self._comm.Ibcast(header, root=0))
        if not inline:  # MPI keeps no copy: while rank 0 waits for a GPU, nobody would send it
            self._wait(self._comm.Ibcast(np.frombuffer(payload, np.uint8), root=0))

    def receive(self, timeout_s: float | None = None) -> Any:
        """Other ranks: wait for rank 0's next message, yielding the core at first, then sleeping up to 5 ms.

        Raises RuntimeError if none comes within `timeout_s`: an idle rank 0 sends heartbeats far more often.
        """
        self._wait(self._comm.Ibcast(self._buffer, root=0), timeout_s)
        length = int.from_bytes(self._buffer[:_LENGTH_BYTES].tobytes(), "little")
        if length <= _HEADER_BYTES - _LENGTH_BYTES:
            payload = self._buffer[_LENGTH_BYTES : _LENGTH_BYTES + length]
        else:
            payload = np.empty(length, np.uint8)
            self._wait(self._comm.Ibcast(payload, root=0), timeout_s)
        return pickle.loads(payload.tobytes())

    def barrier(self, timeout_s: float | None = None) -> None:
        """Wait for all ranks. Raises RuntimeError if one does not come within `timeout_s`."""
        self._wait(self._comm.Ibarrier(), timeout_s)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        self.barrier()  # sleeps while others load; the allgather itself would spin
        return self._comm.allgather(value)

    def agree(self, error: str | None) -> str | None:
        """Return the first error in rank order, on every rank; None if no rank has one."""
        return next((text for text in self.gather(error) if text is not None), None)

    def abort(self) -> None:
        """End every rank of the job now, with exit code 1."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(1)

    def _wait(self, request: MPI.Request, timeout_s: float | None = None) -> None:
        started = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - started
            if timeout_s is not None and waited > timeout_s:
                raise RuntimeError(f"rank {self.rank} on {socket.gethostname()} heard nothing for {timeout_s:.0f} s")
            if waited < _YIELD_S:
                os.sched_yield()
            else:
                time.sleep(min(waited * _SLEEP_SHARE, _LONGEST_SLEEP_S))


class Mail:
    """Messages between ranks of which some may not answer: nothing here waits without a limit.

    It takes no collective, so it can be made where `World` would wait for ever. `tag` tells messages apart.
    """

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        self._posted: list[MPI.Request] = []  # each keeps its message until it is sent

    def post(self, value: Any, rank: int, tag: int) -> None:
        """Send a small picklable value; returns once it is on its way, or after a second."""
        request = self._comm.isend(value, dest=rank, tag=tag)
        self._posted.append(request)
        _poll(request.Test, _POST_S)

    def collect(self, ranks: Iterable[int], tag: int, timeout_s: float) -> dict[int, Any]:
        """A value of each of these ranks; those that do not come in time are absent."""
        found: dict[int, Any] = {}
        missing = set(ranks)

        def look() -> bool:
            for rank in sorted(missing):
                message = self._comm.improbe(source=rank, tag=tag)
                if message is not None:
                    found[rank] = message.recv()
                    missing.remove(rank)
            return not missing

        _poll(look, timeout_s)
        return found

    def exchange(self, array: np.ndarray, out: np.ndarray, rank: int, timeout_s: float) -> bool:
        """Swap arrays with a rank that does the same; whether both arrived in time."""
        requests = [self._comm.Irecv(out, source=rank), self._comm.Isend(array, dest=rank)]
        self._posted += requests
        return _poll(lambda: MPI.Request.Testall(requests), timeout_s)

    def abort(self) -> None:
        """End every rank of the job now, with exit code 1."""
        sys.stdout.flush()
        self._comm.Abort(1)


def _poll(is_done: Callable[[], bool], timeout_s: float) -> bool:
    """Ask until it is done; False where it is not in time. At least once."""
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
