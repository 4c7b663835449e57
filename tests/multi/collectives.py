"""On 4 ranks: the tp and pp groups' operations on CPU tensors at tp 2 × pp 2."""

from __future__ import annotations

import torch

from engine.config import ParallelConfig
from engine.world import World
from executor.collectives import Comm


def check(world: World) -> None:
    """Raises AssertionError on a rank with a wrong result."""
    parallel = ParallelConfig(2, 2, world.rank)
    comm = Comm(world, parallel, torch.device("cpu"))
    first_of_stage = 2 * parallel.pp_rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        value = torch.full((3, 5), world.rank + 1, dtype=dtype)
        assert comm.all_reduce(value).eq(2 * first_of_stage + 3).all() and value.dtype == dtype
        part = torch.tensor([[0, 1], [2, 3]], dtype=dtype) + 10 * parallel.tp_rank  # [n 2, local 2]
        assert comm.all_gather_last(part).tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]]
        if parallel.is_first_stage:
            comm.send_forward(torch.full((4, 3), 7 + parallel.tp_rank, dtype=dtype).t())  # not contiguous
        else:
            assert comm.receive_forward(torch.empty(3, 4, dtype=dtype)).eq(7 + parallel.tp_rank).all()
    if parallel.is_last_stage:
        comm.return_results(torch.tensor([5, 6]))
    else:
        tokens = torch.zeros(2, dtype=torch.int64)
        comm.receive_results(tokens).wait()
        assert tokens.tolist() == [5, 6]
    check_that_no_stage_waits(comm)
    assert comm.min_over_ranks(10 - world.rank) == 7


def check_that_no_stage_waits(comm: Comm) -> None:
    """Several messages of a MiB, far more than MPI keeps for a rank that is late, go out before any comes in."""
    sent = [torch.full((1 << 17,), float(number), dtype=torch.float64) for number in range(3)]
    found = [torch.empty_like(tensor) for tensor in sent]
    if comm.parallel.is_first_stage:
        for tensor in sent:
            comm.send_forward(tensor)
        transfers = [comm.receive_results(tensor) for tensor in found]
        for transfer in transfers:
            transfer.wait()
    else:
        for tensor in sent:
            comm.return_results(tensor)
        for tensor in found:
            comm.receive_forward(tensor)
    comm.settle()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, sent, strict=True))
