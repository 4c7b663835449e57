#!/usr/bin/env python3
"""A short request behind ModelClient while 63 long ones run, beside the same request in a stream.

    python benchmarks/crowd.py --shape 8M

63 clients ask for 256 tokens again and again; one asks for 4, by turns through ModelClient (the non-streaming model)
and as a stream. The sequences in each of the engine's steps are counted as it goes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from benchmarks.served import NAME, make_parser, serve, url
from engine.engine import Engine
from engine.flags import add_flags


def main() -> None:
    parser = make_parser(__doc__)
    add_flags(parser, BenchmarkFlags, "load", ("repeats",), repeats=15)
    parser.add_argument("--clients", type=int, default=63, help="clients that send long requests (default: 63)")
    parser.add_argument("--long", type=int, default=256, help="tokens of a long request (default: 256)")
    parser.add_argument("--short", type=int, default=4, help="tokens of the short request (default: 4)")
    flags = parser.parse_args()
    measured = serve(flags, lambda engine: measure(flags, engine))
    if measured is None:
        return
    (seconds, sizes), device = measured
    medians = {kind: float(np.median(values)) for kind, values in seconds.items()}
    for kind, median in medians.items():
        print(f"{kind:>12}: {flags.short} tokens in {median * 1e3:.0f} ms (median of {flags.repeats})")
    ratio = medians["ModelClient"] / medians["stream"]
    print(f"ModelClient / stream: {ratio:.2f}")
    most = sorted(sizes.items(), key=lambda item: -item[1])[:8]
    print("sequences in a step (steps):", ", ".join(f"{size} ({count})" for size, count in sorted(most)))
    report(device, benchmark="crowd", shape=flags.shape, tp=flags.tp, medians_s=medians, ratio=ratio, sizes=dict(sizes))


def measure(flags: argparse.Namespace, engine: Engine) -> tuple[dict[str, list[float]], Counter[int]]:
    sizes = count_sizes(engine)
    context = multiprocessing.get_context("spawn")  # clients are processes of their own, not threads of the engine's
    queue = context.Queue()
    crowd = context.Process(target=ask_for_much, args=(url(flags, "http"), flags.clients, flags.long), daemon=True)
    crowd.start()
    while max(sizes, default=0) < flags.clients:
        time.sleep(0.1)
    sizes.clear()
    client = context.Process(target=ask_for_little, args=(url(flags, "http"), url(flags, "grpc"), flags, queue))
    client.start()
    seconds = queue.get()
    client.join()
    counted = Counter(sizes)
    crowd.kill()
    return seconds, counted


def count_sizes(engine: Engine) -> Counter[int]:
    """Sequences per step → steps, counted from now on."""
    sizes: Counter[int] = Counter()
    execute = engine.executor.execute

    def counting(plan: Any) -> Any:
        sizes[plan.num_sequences] += 1
        return execute(plan)

    engine.executor.execute = counting
    return sizes


def ask_for_much(http: str, num_clients: int, output_len: int) -> None:
    from pytriton.client import ModelClient

    def again_and_again(index: int) -> None:
        with ModelClient(http, NAME) as client:
            while True:
                client.infer_batch(**inputs(index, output_len))

    for index in range(num_clients):
        threading.Thread(target=again_and_again, args=(index,)).start()


def ask_for_little(http: str, grpc: str, flags: argparse.Namespace, queue: Any) -> None:
    from pytriton.client import DecoupledModelClient, ModelClient

    seconds: dict[str, list[float]] = {"ModelClient": [], "stream": []}
    with ModelClient(http, NAME) as whole, DecoupledModelClient(grpc, f"{NAME}_streaming") as stream:
        for _ in range(flags.repeats + 1):  # the first one warms up
            started = time.perf_counter()
            whole.infer_batch(**inputs(0, flags.short))
            seconds["ModelClient"].append(time.perf_counter() - started)
            started = time.perf_counter()
            list(stream.infer_sample(**{name: array[0] for name, array in inputs(0, flags.short).items()}))
            seconds["stream"].append(time.perf_counter() - started)
    queue.put({kind: values[1:] for kind, values in seconds.items()})


def inputs(index: int, output_len: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.arange(index, index + 16, dtype=np.int32)[None],
        "request_output_len": np.array([[output_len]], np.uint32),
        "ignore_eos": np.array([[True]]),
    }


if __name__ == "__main__":
    main()
