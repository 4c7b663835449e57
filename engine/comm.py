"""Ranks and what passes between them: the control channel (MPI) and the tp and pp groups (MPI or NCCL).

The only module that imports mpi4py or torch.distributed. Everything here is called from one thread per rank.
On a CPU the groups use MPI, whose ranks on one node talk through shared memory; on GPUs they use NCCL.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from typing import Any

import numpy as np
import torch

# Ranks that wait inside MPI give their core away: on a CPU they share it with ranks that compute.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

from mpi4py import MPI  # noqa: E402 - initializes MPI, which reads the variable above

from engine.config import ParallelConfig  # noqa: E402

_HEADER_BYTES = 3584  # a plan of some hundred decode chunks fits, below the size that MPI sends without waiting
_LENGTH_BYTES = 8
_YIELD_S = 0.002  # how long a waiting rank only yields its core before it starts to sleep
_SLEEP_SHARE = 0.01  # a sleep lasts this share of the wait so far, so it delays what comes by no more
_LONGEST_SLEEP_S = 0.005  # a look costs about 50 µs: 1 % of a core


class World:
    """The MPI world: who this process is, and the control channel from rank 0 to all."""

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = node.rank
        self.local_size: int = node.size
        node.Free()
        self._buffer = np.zeros(_HEADER_BYTES, dtype=np.uint8)

    def check_size(self, expected: int, command: str) -> None:
        """Raise ValueError, with the command that would be right, where the world has another size."""
        if self.size == expected:
            return
        tasks = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1
        if self.size == 1 and tasks == expected:
            raise ValueError(f"{tasks} Slurm tasks, but each is an MPI world of its own: start with srun --mpi=pmix")
        raise ValueError(f"tp × pp takes {expected} ranks and {self.size} were started: {command}")

    def send(self, message: Any) -> None:
        """Rank 0: send a picklable message to all other ranks, which wait in `receive`."""
        if self.size == 1:
            return
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        inline = len(payload) <= _HEADER_BYTES - _LENGTH_BYTES
        self._buffer[:_LENGTH_BYTES] = np.frombuffer(len(payload).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
        if inline:
            self._buffer[_LENGTH_BYTES : _LENGTH_BYTES + len(payload)] = np.frombuffer(payload, np.uint8)
        self._wait(self._comm.Ibcast(self._buffer, root=0))
        if not inline:
            self._wait(self._comm.Ibcast(np.frombuffer(payload, np.uint8), root=0))

    def receive(self, timeout_s: float | None = None) -> Any:
        """Other ranks: wait for rank 0's next message, yielding at first, then sleeping up to 5 ms a time.

        Raises RuntimeError where none comes within `timeout_s`: rank 0 sends a sign of life far more often.
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
        """Meet all ranks; raises RuntimeError where one does not come within `timeout_s`."""
        self._wait(self._comm.Ibarrier(), timeout_s)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        self.barrier()  # sleeps while others load; the allgather itself would spin
        return self._comm.allgather(value)

    def agree(self, error: str | None) -> str | None:
        """The first error that any rank reports, on every rank; None where all went well."""
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


class Comm:
    """This rank's tp and pp groups: collectives on tensors of the computation's device."""

    def __init__(self, world: World, parallel: ParallelConfig, device: torch.device) -> None:
        self.parallel = parallel
        if parallel.world_size == 1:
            self._backend: _MpiBackend | _NcclBackend | None = None
        elif device.type == "cuda":
            self._backend = _NcclBackend(parallel, device, is_one_node=world.local_size == world.size)
        else:
            self._backend = _MpiBackend(parallel)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the tp group, in place; returns the tensor."""
        if self.parallel.tp > 1:
            self._backend.all_reduce(tensor)
        return tensor

    def all_gather_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, local] of each tp rank → [n, tp · local], in rank order."""
        if self.parallel.tp == 1:
            return tensor
        parts = tensor.new_empty((self.parallel.tp, *tensor.shape))  # [tp, n, local]
        self._backend.all_gather(parts, tensor.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def send_forward(self, tensor: torch.Tensor) -> None:
        """To the same tp rank of the next stage."""
        self._backend.send(tensor.contiguous(), self.parallel.rank + self.parallel.tp)

    def receive_forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the same tp rank of the stage before, into the tensor; returns it."""
        self._backend.receive(tensor, self.parallel.rank - self.parallel.tp)
        return tensor

    def return_results(self, values: torch.Tensor) -> torch.Tensor:
        """The last stage's results, also on the first stage (the stages between have no use for them)."""
        parallel = self.parallel
        if parallel.pp > 1 and parallel.is_last_stage:
            self._backend.send(values, parallel.tp_rank)
        elif parallel.pp > 1 and parallel.is_first_stage:
            self._backend.receive(values, parallel.tp_rank + (parallel.pp - 1) * parallel.tp)
        return values

    def min_over_ranks(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return value if self.parallel.world_size == 1 else MPI.COMM_WORLD.allreduce(value, op=MPI.MIN)

    def close(self) -> None:
        """Leave the groups; every rank does, once nothing more is computed."""
        if isinstance(self._backend, _NcclBackend):
            self._backend.close()


class _MpiBackend:
    """CPU tensors over MPI. bf16 travels as fp32, which MPI can add; fp16 likewise."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self._world = MPI.COMM_WORLD
        self._tp = self._world.Split(color=parallel.pp_rank, key=parallel.tp_rank)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            wide = tensor.float()
            self._tp.Allreduce(MPI.IN_PLACE, wide.numpy())
            tensor.copy_(wide)
        else:
            self._tp.Allreduce(MPI.IN_PLACE, tensor.numpy())

    def all_gather(self, parts: torch.Tensor, tensor: torch.Tensor) -> None:
        self._tp.Allgather(_bytes(tensor), _bytes(parts))

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        self._world.Send(_bytes(tensor), dest=rank)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        self._world.Recv(_bytes(tensor), source=rank)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


class _NcclBackend:
    """CUDA tensors over NCCL; MPI tells every rank where the rendezvous is."""

    def __init__(self, parallel: ParallelConfig, device: torch.device, is_one_node: bool) -> None:
        import torch.distributed as dist

        self._dist = dist
        world = MPI.COMM_WORLD
        store = None
        if parallel.rank == 0:
            host = "127.0.0.1" if is_one_node else socket.gethostname()  # a name: each node resolves it for itself
            store = dist.TCPStore(host, 0, parallel.world_size, is_master=True, wait_for_workers=False)
            world.bcast((host, store.port), root=0)
        else:
            host, port = world.bcast(None, root=0)
            store = dist.TCPStore(host, port, parallel.world_size, is_master=False)
        dist.init_process_group(
            "nccl", store=store, rank=parallel.rank, world_size=parallel.world_size, device_id=device
        )
        self._tp = None
        for stage in range(parallel.pp):  # every rank must take part in making every group
            ranks = list(range(stage * parallel.tp, (stage + 1) * parallel.tp))
            group = dist.new_group(ranks)
            if stage == parallel.pp_rank:
                self._tp = group

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._dist.all_reduce(tensor, group=self._tp)

    def all_gather(self, parts: torch.Tensor, tensor: torch.Tensor) -> None:
        self._dist.all_gather_into_tensor(parts.view(-1, *parts.shape[2:]), tensor, group=self._tp)

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        self._dist.send(tensor, rank)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        self._dist.recv(tensor, rank)

    def close(self) -> None:
        self._dist.destroy_process_group()
