#!/usr/bin/env python3
"""Microseconds of a sum over the tp group with the residual's add and the norm: through the GPUs' memory, and NCCL's.

    mpirun -n 2 python benchmarks/all_reduce.py --hidden-size 6144

Chains of sums in a CUDA graph, as in a decode step; the two kinds alternate, and the median of their replays counts.
Prints a table on rank 0, then one JSON line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from engine.config import ParallelConfig
from engine.flags import add_flags
from engine.world import World
from executor.collectives import Comm
from executor.layers import Norm

_CHAIN = 40


def main() -> None:
    flags = parse_flags()
    world = World()
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    comm = Comm(world, ParallelConfig(world.size, 1, world.rank), device)
    weight = torch.ones(flags.hidden_size, dtype=torch.bfloat16, device=device)
    norm = Norm(weight, weight, 1e-5, comm)
    rows = [measure(norm, batch, flags, device) for batch in flags.batches]
    comm.close()
    if world.rank == 0:
        print(f"{world.size} ranks, {flags.hidden_size} bf16 a row, microseconds")
        print(f"{'rows':>6} {'KB':>7} {'NCCL':>8} {'memory':>8}")
        for row in rows:
            size = row["rows"] * flags.hidden_size * 2 / 1e3
            memory = f"{row['memory']:>8.1f}" if "memory" in row else f"{'-':>8}"
            print(f"{row['rows']:>6} {size:>7.0f} {row['nccl']:>8.1f} {memory}")
        report(device, benchmark="all_reduce", ranks=world.size, hidden_size=flags.hidden_size, rows=rows)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=6144, help="numbers of a row (default: 6144)")
    add_flags(parser, BenchmarkFlags, "load", ("batches", "repeats"), batches=(1, 8, 32, 128, 256), repeats=20)
    return parser.parse_args()


def measure(norm: Norm, batch: int, flags: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """A row of the table."""
    comm = norm.comm
    residual, addend = (torch.randn(batch, flags.hidden_size, device=device).bfloat16() for _ in range(2))
    graphs = {}
    for kind in ("nccl", "memory"):
        comm._peers = None
        if kind == "memory":
            comm.share_memory(flags.hidden_size, torch.bfloat16)
            if comm.peers_for(addend) is None:
                break
        for _ in range(3):  # compiles, and connects
            norm(residual, addend)
        torch.cuda.synchronize(device)
        graphs[kind] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[kind], capture_error_mode="thread_local"):
            x, total = addend, residual
            for _ in range(_CHAIN):
                total, x = norm(total, x)
    turns = [{kind: _replay(graph) for kind, graph in graphs.items()} for _ in range(flags.repeats + 1)][1:]
    found = {kind: float(np.median([turn[kind] for turn in turns])) / _CHAIN for kind in graphs}
    torch.cuda.synchronize(device)
    for graph in graphs.values():
        graph.reset()
    return {"rows": batch, **found}


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


if __name__ == "__main__":
    main()
