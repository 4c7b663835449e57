"""On the GPUs of one tp group: sums through the GPUs' memory, bit by bit beside the same sums made on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import torch

from engine.config import ParallelConfig
from engine.world import World
from executor.collectives import Comm
from kernels import peer_sum
from kernels.peer_sum import Peers

HIDDEN = 1536
ROWS = (1, 3, 256, 17, 64, 2, 1)


def check(world: World, two_shot_bytes: int) -> str:
    """Raises AssertionError on a rank with a wrong result. Returns the GPU's name."""
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    with patch.object(peer_sum, "_TWO_SHOT_BYTES", two_shot_bytes):  # these ranks have other tests to run
        _check(world, device)
    return torch.cuda.get_device_name(device)


def _check(world: World, device: torch.device) -> None:
    comm = Comm(world, ParallelConfig(world.size, 1, world.rank), device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        comm.share_memory(HIDDEN, dtype)
        peers = comm.peers_for(torch.empty(1, HIDDEN, dtype=dtype, device=device))
        assert peers is not None and comm.peers_for(torch.empty(257, HIDDEN, dtype=dtype, device=device)) is None
        _check_sums(peers, dtype, device)
        _check_graph(peers, dtype, device)
    comm.close()


def _addends(peers: Peers, dtype: torch.dtype, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """All ranks' rows, the same on each of them."""
    generator = torch.Generator(device).manual_seed(0)
    for rows in ROWS * 5:
        yield [torch.randn(rows, HIDDEN, generator=generator, device=device).to(dtype) for _ in range(peers.num_ranks)]


def _check_sums(peers: Peers, dtype: torch.dtype, device: torch.device) -> None:
    weight, bias = torch.randn(2, HIDDEN, device=device).to(dtype)
    for addends in _addends(peers, dtype, device):
        residual = addends[0].flip(0)
        own = addends[peers.rank]
        for b in (bias, None):
            total, normed = peer_sum.peer_sum_add_norm(own, peers, residual, weight, b, 1e-5)
            expected, expected_norm = peer_sum.reference(addends, residual, weight, b, 1e-5)
            assert torch.equal(total, expected) and expected_norm is not None
            torch.testing.assert_close(normed, expected_norm, rtol=2e-2, atol=2e-2)
        assert torch.equal(peer_sum.peer_sum(own.clone(), peers), peer_sum.reference(addends)[0])


def _check_graph(peers: Peers, dtype: torch.dtype, device: torch.device) -> None:
    """Chains of an odd number of sums, of several sizes in turns, replayed while ranks are out of step."""
    static = {rows: torch.zeros(rows, HIDDEN, dtype=dtype, device=device) for rows in (1, 5, 200)}
    graphs = {}
    for rows, x in static.items():
        graphs[rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[rows], capture_error_mode="thread_local"):
            for _ in range(3):
                peer_sum.peer_sum(x, peers)
                x.mul_(0.5)
    generator = torch.Generator(device).manual_seed(1)
    for turn in range(200):
        rows = (1, 5, 200)[turn % 3]
        addends = [torch.randn(rows, HIDDEN, generator=generator, device=device).to(dtype) for _ in range(8)]
        addends = addends[: peers.num_ranks]
        static[rows].copy_(addends[peers.rank])
        if turn % 7 == peers.rank:
            torch.cuda._sleep(200_000)
        graphs[rows].replay()
        expected = addends
        for _ in range(3):
            expected = [peer_sum.reference(expected)[0] * 0.5] * peers.num_ranks
        assert torch.equal(static[rows], expected[0]), (turn, rows)
    torch.cuda.synchronize(device)
    for graph in graphs.values():
        graph.reset()
