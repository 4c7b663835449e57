"""Collectives on tensors over the tp and pp groups: MPI on a CPU; NCCL on GPUs, and their own memory for few rows.

The only module that imports torch.distributed. One thread of each rank calls it. MPI uses shared memory within a node.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.config import ParallelConfig
from engine.world import World
from kernels import runs_on
from kernels.peer_sum import Peers, inbox_shape, peer_sum

# A row waits for the same row of the other ranks. All start their rows in the same order, so each row gets its turn.
_MAX_PEER_ROWS = 256
# With stages: a row that waits has a multiprocessor, and what stages send each other needs some, too.
_MAX_PEER_ROWS_OF_STAGES = 48
_MAX_PEER_BYTES = 4 << 20  # of a sum; NCCL is faster beyond
_FIRST_SUM_S = 30.0  # another rank may compile the kernel meanwhile
_LOG = logging.getLogger("engine")


def _first_line(error: Exception) -> str:
    """Of the message, or the error's kind where there is none: torch's messages have many lines."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class Transfer(NamedTuple):
    """A message on its way. Its tensor stays as it is until it is done."""

    wait: Callable[[], object]  # a GPU's current stream waits, and the host goes on
    is_done: Callable[[], bool]
    tensor: torch.Tensor


class Comm:
    """This rank's tp and pp groups: collectives on tensors of the computation's device.

    A stage never waits for what it sends, so it computes the next step while another stage computes this one.
    """

    def __init__(self, world: World, parallel: ParallelConfig, device: torch.device) -> None:
        self.parallel = parallel
        self._world = world
        self._device = device
        self._peers: Peers | None = None
        self._sent: deque[Transfer] = deque()  # oldest first
        if parallel.world_size == 1:
            self._joined: _MpiGroups | _NcclGroups | None = None
        elif device.type == "cuda":
            self._joined = _NcclGroups(world, parallel, device)
        else:
            self._joined = _MpiGroups(world, parallel)

    @property
    def _groups(self) -> _MpiGroups | _NcclGroups:
        assert self._joined is not None, "a single rank has no one to talk to"
        return self._joined

    def share_memory(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Let few rows of this size be summed through the GPUs' memory, where they reach each other's.

        Every rank calls this. Elsewhere NCCL sums all. Raises RuntimeError where what one GPU writes never comes.
        """
        if self.parallel.tp == 1 or not isinstance(self._joined, _NcclGroups):
            return
        first = self.parallel.rank - self.parallel.tp_rank
        hosts = self._world.gather(socket.gethostname())[first : first + self.parallel.tp]
        is_fit = len(set(hosts)) == 1 and hidden_size * dtype.itemsize % 16 == 0 and runs_on(self._device)
        groups, row_bytes = self._joined, hidden_size * dtype.itemsize
        inbox = self._make(is_fit, lambda: groups.new_inbox(row_bytes, self._device))
        peers = self._make(inbox is not None, lambda: groups.open_inboxes(self.parallel.tp_rank, inbox))
        if peers is not None:
            self._check(peers, torch.ones(1, hidden_size, dtype=dtype, device=self._device))
            self._peers = peers

    def _make(self, is_wanted: bool, make: Callable[[], Any]) -> Any:
        """What `make` gives, if all ranks want it and it works on all; else None. All are done with it then."""
        made = None
        if self.min_over_ranks(is_wanted):
            try:
                made = make()
            except (RuntimeError, ImportError, AttributeError) as error:  # GPUs that cannot, or an old torch
                _LOG.info("the GPUs do not share memory, and NCCL sums all: %s", _first_line(error))
        return made if self.min_over_ranks(made is not None) else None

    def _check(self, peers: Peers, addend: torch.Tensor) -> None:
        """Raise RuntimeError where a first sum does not come, or is wrong."""
        done = torch.cuda.Event()
        peer_sum(addend, peers)
        done.record()
        deadline = time.monotonic() + _FIRST_SUM_S
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {self.parallel.rank} got no sum through the GPUs' memory within {_FIRST_SUM_S:g} s: set "
                    f"--all-reduce nccl"
                )
            time.sleep(1e-4)
        if not bool((addend == peers.num_ranks).all()):
            raise RuntimeError("a sum through the GPUs' memory is wrong: set --all-reduce nccl")

    def peers_for(self, tensor: torch.Tensor) -> Peers | None:
        """How kernels may sum this tensor over the tp group themselves; None: call `all_reduce`."""
        return self._peers if self._peers is not None and self._peers.takes(tensor) else None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the tp group, in place; returns the tensor."""
        peers = self.peers_for(tensor)
        if peers is not None:
            peer_sum(tensor, peers)
        elif self.parallel.tp > 1:
            self._groups.all_reduce(tensor)
        return tensor

    def all_gather_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, local] of each tp rank → [n, tp · local], in rank order."""
        if self.parallel.tp == 1:
            return tensor
        parts = tensor.new_empty((self.parallel.tp, *tensor.shape))  # [tp, n, local]
        self._groups.all_gather(parts, tensor.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """[tp · n, local] of each tp rank → [n, tp · local]: the r-th n rows go to rank r. In rank order."""
        if self.parallel.tp == 1:
            return tensor
        parts = tensor.new_empty((self.parallel.tp, len(tensor) // self.parallel.tp, *tensor.shape[1:]))
        self._groups.all_to_all(parts, tensor.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def send_forward(self, tensor: torch.Tensor) -> None:
        """Start to send the tensor to the same tp rank of the next stage. It must not be changed any more."""
        self._send(tensor.contiguous(), self.parallel.rank + self.parallel.tp)

    def receive_forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Receive into the tensor, from the same tp rank of the previous stage; returns the tensor."""
        self._groups.receive(tensor, self.parallel.rank - self.parallel.tp).wait()
        return tensor

    def return_results(self, values: torch.Tensor) -> None:
        """On the last of several stages: start to send results to the first one. They must not be changed any more."""
        self._send(values, self.parallel.tp_rank)

    def receive_results(self, values: torch.Tensor) -> Transfer:
        """On the first of several stages: start to receive the last one's results into `values`."""
        return self._groups.receive(values, self.parallel.tp_rank + (self.parallel.pp - 1) * self.parallel.tp)

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        while self._sent and self._sent[0].is_done():
            self._sent.popleft()
        self._sent.append(self._groups.send(tensor, rank))

    def min_over_ranks(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return value if self.parallel.world_size == 1 else self._world.all_ranks.min(value)

    def settle(self) -> None:
        """Wait for all that was sent."""
        while self._sent:
            self._sent.popleft().wait()

    def close(self) -> None:
        """Leave the groups; every rank calls this after its last collective."""
        self._peers = None
        if isinstance(self._joined, _NcclGroups):
            self._joined.close()


class _MpiGroups:
    """CPU tensors over MPI. bf16 and fp16 are summed as fp32: MPI adds neither."""

    def __init__(self, world: World, parallel: ParallelConfig) -> None:
        self._world = world.all_ranks
        self._tp = world.split(color=parallel.pp_rank, key=parallel.tp_rank)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            wide = tensor.float()
            self._tp.all_reduce(wide.numpy())
            tensor.copy_(wide)
        else:
            self._tp.all_reduce(tensor.numpy())

    def all_gather(self, parts: torch.Tensor, tensor: torch.Tensor) -> None:
        self._tp.all_gather(_bytes(tensor), _bytes(parts))

    def all_to_all(self, parts: torch.Tensor, tensor: torch.Tensor) -> None:
        self._tp.all_to_all(_bytes(tensor), _bytes(parts))

    def send(self, tensor: torch.Tensor, rank: int) -> Transfer:
        request = self._world.send(_bytes(tensor), rank)
        return Transfer(request.Wait, request.Test, tensor)

    def receive(self, tensor: torch.Tensor, rank: int) -> Transfer:
        request = self._world.receive(_bytes(tensor), rank)
        return Transfer(request.Wait, request.Test, tensor)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


class _NcclGroups:
    """CUDA tensors over NCCL; rank 0 sends the rendezvous' address over MPI."""

    def __init__(self, world: World, parallel: ParallelConfig, device: torch.device) -> None:
        import torch.distributed as dist

        # torch warns on every rank that a group's sends wait for each other. Those of `_pairs` should.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        self._dist = dist
        is_one_node = world.local_size == world.size
        store = None
        if parallel.rank == 0:
            host = "127.0.0.1" if is_one_node else socket.gethostname()  # a name: each node resolves it for itself
            store = dist.TCPStore(host, 0, parallel.world_size, is_master=True, wait_for_workers=False)
            world.all_ranks.broadcast((host, store.port))
        else:
            host, port = world.all_ranks.broadcast(None)
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
        # (source, destination) → a group of the two. NCCL runs a group's operations one after another, so each
        # direction has its own: no message waits for one of another step.
        self._pairs: dict[tuple[int, int], Any] = {}
        for source in range(parallel.world_size) if parallel.pp > 1 else ():
            destination = (source + parallel.tp) % parallel.world_size  # the last stage sends to the first one
            group = dist.new_group(sorted((source, destination)))
            if parallel.rank in (source, destination):
                self._pairs[source, destination] = group
        self._rank = parallel.rank

    def new_inbox(self, row_bytes: int, device: torch.device) -> torch.Tensor:
        """Zeros that other GPUs may be let write to. Raises RuntimeError where there is no such memory."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        assert self._tp is not None
        most = _MAX_PEER_ROWS_OF_STAGES if self._pairs else _MAX_PEER_ROWS
        shape = inbox_shape(self._tp.size(), min(most, _MAX_PEER_BYTES // row_bytes), row_bytes)
        inbox = symmetric_memory.empty(shape, dtype=torch.int64, device=device).zero_()
        torch.cuda.synchronize(device)
        return inbox

    def open_inboxes(self, rank: int, inbox: torch.Tensor) -> Peers:
        """Let the tp group's GPUs write to each other's inboxes. Raises RuntimeError where they cannot."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        assert self._tp is not None
        memory = symmetric_memory.rendezvous(inbox, self._tp)
        addresses = torch.tensor(memory.buffer_ptrs, dtype=torch.int64, device=inbox.device)
        return Peers(rank, addresses, inbox, torch.zeros(inbox.shape[1], dtype=torch.int32, device=inbox.device))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._dist.all_reduce(tensor, group=self._tp)

    def all_gather(self, parts: torch.Tensor, tensor: torch.Tensor) -> None:
        self._dist.all_gather_into_tensor(parts.view(-1, *parts.shape[2:]), tensor, group=self._tp)

    def all_to_all(self, parts: torch.Tensor, tensor: torch.Tensor) -> None:
        self._dist.all_to_all_single(parts.view(tensor.shape), tensor, group=self._tp)

    def send(self, tensor: torch.Tensor, rank: int) -> Transfer:
        work = self._dist.isend(tensor, rank, group=self._pairs[self._rank, rank])
        assert work is not None, "this rank is one of the two"
        return Transfer(work.wait, work.is_completed, tensor)

    def receive(self, tensor: torch.Tensor, rank: int) -> Transfer:
        work = self._dist.irecv(tensor, rank, group=self._pairs[rank, self._rank])
        assert work is not None, "this rank is one of the two"
        return Transfer(work.wait, work.is_completed, tensor)

    def close(self) -> None:
        self._dist.destroy_process_group()


class TorchPairs:
    """All-reduces of two ranks at a time, to measure them (engine.check): NCCL's on GPUs, or gloo's on CPUs.

    Each pair has a communicator of its own. One rank and its partner may fail while the others go on.
    """

    num_bytes = 64 << 20

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        tell: Callable[[Any], Any],
        backend: str = "nccl",
        timeout_s: float = 10.0,
    ) -> None:
        """On every rank. hosts: the ranks'; tell: gives rank 0's value to all ranks; timeout_s: of each pair."""
        import torch.distributed as dist

        self.kind = {"nccl": "NCCL"}.get(backend, backend)
        self._dist = dist
        self._rank = rank
        self._size = len(hosts)
        self._backend = backend
        self._timeout_s = timeout_s  # the first all-reduce makes the communicator
        # Where torch's own limit ends first, NCCL's watchdog ends the process, and nobody is told.
        self._torch_timeout = timedelta(seconds=4 * timeout_s)
        is_gpu = backend == "nccl"
        self._device = torch.device("cuda", hosts[:rank].count(hosts[rank])) if is_gpu else torch.device("cpu")
        self._store: dist.TCPStore | None = None
        self._host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
        if rank == 0:
            self._store = dist.TCPStore(self._host, 0, self._size, is_master=True, wait_for_workers=False)
        self._port = tell(None if self._store is None else self._store.port)
        self._is_joined = False

    def seconds(self, rank: int) -> float:
        """The fastest of five, after one that makes the connection. Raises RuntimeError for none within the limit."""
        found: list[float | Exception] = []

        def measure() -> None:
            try:
                found.append(self._measure(rank))
            except Exception as error:  # torch's own, and of the store
                found.append(error)

        thread = threading.Thread(target=measure, daemon=True)  # NCCL itself would wait for ever
        thread.start()
        thread.join(self._timeout_s)
        remedy = f"look at {self._backend.upper()}_SOCKET_IFNAME"
        if self._backend == "nccl":
            remedy += " and at what NCCL_DEBUG=INFO prints"
        if not found:
            raise RuntimeError(f"no answer over {self.kind} within {self._timeout_s:g} s: {remedy}")
        if isinstance(found[0], Exception):
            raise RuntimeError(f"{self.kind} fails ({_first_line(found[0])}): {remedy}")
        return found[0]

    def _measure(self, rank: int) -> float:
        dist, timeout = self._dist, self._torch_timeout
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        if not self._is_joined:
            store = self._store or dist.TCPStore(self._host, self._port, self._size, is_master=False, timeout=timeout)
            dist.init_process_group(self._backend, store=store, rank=self._rank, world_size=self._size, timeout=timeout)
            self._is_joined = True
        group = dist.new_group(sorted((self._rank, rank)), timeout=timeout, use_local_synchronization=True)
        tensor = torch.ones(self.num_bytes // 4, device=self._device)
        best = float("inf")
        for _ in range(6):
            started = time.monotonic()
            dist.all_reduce(tensor, group=group)
            float(tensor[0])  # a GPU's launch returns at once
            best = min(best, time.monotonic() - started)
        return best

    def close(self) -> None:
        """Leave the groups."""
        if self._is_joined:
            self._dist.destroy_process_group()
