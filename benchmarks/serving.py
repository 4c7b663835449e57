#!/usr/bin/env python3
"""Latency that Triton adds to the engine's own, one request at a time, on random weights.

    python benchmarks/serving.py --shape 124M
    mpirun -n 2 python benchmarks/serving.py --tp 2       # beside --threads 1 on one rank: the cost of waiting

One process runs the engine with PyTriton in front, as server.py does. Requests go alternately straight to the
engine and through HTTP and gRPC (PyTriton's ModelClient), so that all see the same machine; medians are compared.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from benchmarks.served import NAME, make_parser, serve, url
from engine.engine import Engine
from engine.flags import add_flags
from engine.request import Request, SamplingParams


def main() -> None:
    flags = parse_flags()
    measured = serve(flags, lambda engine: ask(flags, engine))
    if measured is not None:
        show(flags, *measured)


def parse_flags() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_flags(parser, BenchmarkFlags, "load", ("input_len", "output_len", "repeats"), repeats=15)
    return parser.parse_args()


def ask(flags: argparse.Namespace, engine: Engine) -> dict[str, list[float]]:
    """Each way's times in seconds; the first round warms up."""
    from pytriton.client import ModelClient

    seconds: dict[str, list[float]] = {"engine": [], "http": [], "grpc": []}
    clients = {kind: ModelClient(url(flags, kind), NAME) for kind in ("http", "grpc")}
    prompt_ids = np.random.default_rng(0).integers(0, engine.executor.model.config.vocab_size, flags.input_len).tolist()
    for _ in range(flags.repeats + 1):
        seconds["engine"].append(time_engine(engine, prompt_ids, flags.output_len))
        for kind, client in clients.items():
            seconds[kind].append(time_client(client, prompt_ids, flags.output_len))
    for client in clients.values():
        client.close()
    return seconds


def time_engine(engine: Engine, prompt_ids: list[int], output_len: int) -> float:
    finished = threading.Event()

    def on_update(request: Request) -> None:
        if request.is_finished:
            finished.set()

    started = time.perf_counter()
    engine.submit(Request(prompt_ids, SamplingParams(output_len), (), on_update))
    finished.wait()
    return time.perf_counter() - started


def time_client(client: object, prompt_ids: list[int], output_len: int) -> float:
    prompts = np.array([[" ".join(map(str, prompt_ids)).encode()]], dtype=object)
    output_lens = np.array([[output_len]], dtype=np.uint32)
    started = time.perf_counter()
    answer = client.infer_batch(prompts=prompts, request_output_len=output_lens, ignore_eos=np.array([[True]]))
    elapsed = time.perf_counter() - started
    assert answer["sequence_length"].item() == len(prompt_ids) + output_len
    return elapsed


def show(flags: argparse.Namespace, seconds: dict[str, list[float]], device: torch.device) -> None:
    medians = {kind: float(np.median(values[1:])) for kind, values in seconds.items()}
    # Differences within each round: the machine's slow drifts fall out.
    added = {kind: float(np.median(np.subtract(seconds[kind][1:], seconds["engine"][1:]))) for kind in ("http", "grpc")}
    print(f"{flags.shape}, tp {flags.tp}, {flags.input_len} in, {flags.output_len} out, one request at a time")
    print(f"{'way':>8} {'median ms':>10} {'added ms':>10} {'added %':>8}")
    for kind, median in medians.items():
        extra = added.get(kind, 0.0)
        print(f"{kind:>8} {median * 1e3:>10.1f} {extra * 1e3:>10.2f} {100 * extra / medians['engine']:>8.2f}")
    report(
        device,
        benchmark="serving",
        shape=flags.shape,
        tp=flags.tp,
        repeats=flags.repeats,
        medians_s=medians,
        added_s=added,
    )


if __name__ == "__main__":
    main()
