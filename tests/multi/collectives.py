"""On ranks: the tp and pp groups' operations on CPU tensors, and the choice of tokens over a tp group."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from engine.config import ParallelConfig
from engine.world import World
from executor import layers
from executor.collectives import Comm
from executor.layers import LMHead
from executor.matmul import PlainMatmul


def check(world: World) -> None:
    """On 4 ranks, at tp 2 × pp 2. Raises AssertionError on a rank with a wrong result."""
    parallel = ParallelConfig(2, 2, world.rank)
    comm = Comm(world, parallel, torch.device("cpu"))
    first_of_stage = 2 * parallel.pp_rank
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        value = torch.full((3, 5), world.rank + 1, dtype=dtype)
        assert comm.all_reduce(value).eq(2 * first_of_stage + 3).all() and value.dtype == dtype
        part = torch.tensor([[0, 1], [2, 3]], dtype=dtype) + 10 * parallel.tp_rank  # [n 2, local 2]
        assert comm.all_gather_last(part).tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]]
        parts = torch.arange(8).view(4, 2).to(dtype) + 10 * parallel.tp_rank  # [tp 2 · n 2, local 2]
        expected = torch.tensor([[0, 1, 10, 11], [2, 3, 12, 13]]) + 4 * parallel.tp_rank
        assert comm.all_to_all(parts).tolist() == expected.tolist()
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


def choose(world: World, weight: np.ndarray, inputs: list[np.ndarray], few_rows: int) -> list[tuple[Any, ...]]:
    """At tp = all ranks: each row's largest logit, as a choice of (token, logit).

    weight: [vocab, hidden]; inputs: hidden states [rows, hidden] each. Returns for each input the choice [2, rows], the
    logits of the rows in reverse order, and how many numbers the choice gathered.
    """
    comm = Comm(world, ParallelConfig(world.size, 1, world.rank), torch.device("cpu"))
    vocab_local = -(-len(weight) // world.size)
    own = torch.from_numpy(weight)[world.rank * vocab_local :][:vocab_local]
    padded = F.pad(own, (0, 0, 0, vocab_local - len(own)))
    head = LMHead(PlainMatmul(padded.t()), None, len(weight), comm)
    gather, sizes = comm.all_gather_last, []

    def recording(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * world.size)
        return gather(tensor)

    def choose_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        assert logits.is_contiguous() and len(logits) == rows.stop - rows.start > 0
        return torch.stack(logits.double().max(1)[::-1])

    found = []
    with patch.object(layers, "FEW_ROWS", few_rows), patch.object(comm, "all_gather_last", recording):
        for hidden in map(torch.from_numpy, inputs):
            logits = head(hidden)
            sizes.clear()
            chosen, num_gathered = head.choose(logits, choose_rows), sum(sizes)
            found.append((chosen.numpy(), head.gather(logits.flip(0)).numpy(), num_gathered))
    return found
