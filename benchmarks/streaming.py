#!/usr/bin/env python3
"""Time per token of streams through HTTP and gRPC beside the engine's own, at 1 and at 64 streams.

    python benchmarks/streaming.py --shape 124M

All streams of a round begin together. The engine's own figure is taken in its process, from the tokens' arrival; the
others by client.py --bench in a process of its own, which shares this machine's cores with the server.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from benchmarks.served import bench, make_parser, serve
from engine.engine import Engine
from engine.flags import add_flags
from engine.request import Request, SamplingParams


def main() -> None:
    parser = make_parser(__doc__)
    add_flags(parser, BenchmarkFlags, "load", ("input_len", "output_len", "repeats"), input_len=32)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64], help="streams at once (default: 1 64)")
    flags = parser.parse_args()
    measured = serve(flags, lambda engine: measure(flags, engine))
    if measured is None:
        return
    rows, device = measured
    print(f"{flags.shape}, tp {flags.tp}, {flags.input_len} in, {flags.output_len} out; ms per token, median")
    print(f"{'streams':>8} {'engine':>9} {'http':>9} {'grpc':>9} {'http/engine':>12} {'grpc/engine':>12}")
    for row in rows:
        engine, *ways = (row[kind] * 1e3 for kind in ("engine", "http", "grpc"))
        shares = " ".join(f"{way / engine:>12.2f}" for way in ways)
        print(f"{row['streams']:>8} {engine:>9.2f} {ways[0]:>9.2f} {ways[1]:>9.2f} {shares}")
    report(device, benchmark="streaming", shape=flags.shape, tp=flags.tp, rows=rows)


def measure(flags: argparse.Namespace, engine: Engine) -> list[dict[str, Any]]:
    rows = []
    for streams in flags.streams:
        load = ["--concurrency", str(streams), "--num-requests", str(streams), "--bench-warmup", "0"]
        load += ["--bench-prompt-len", str(flags.input_len), "--bench-output-len", str(flags.output_len)]
        rounds: dict[str, list[float]] = {"engine": [], "http": [], "grpc": []}
        for _ in range(flags.repeats + 1):  # the first one warms up
            rounds["engine"].append(time_per_token(engine, streams, flags.input_len, flags.output_len))
            for kind in ("http", "grpc"):
                rounds[kind].append(bench(flags, kind, *load)["tpot_ms"]["p50"] / 1e3)
        medians = {kind: float(np.median(values[1:])) for kind, values in rounds.items()}
        rows.append({"streams": streams, **medians})
    return rows


def time_per_token(engine: Engine, streams: int, input_len: int, output_len: int) -> float:
    """Median over the streams of (last token - first token) / (tokens - 1), in seconds."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]
    finished = threading.Semaphore(0)

    def listener(times: list[float]) -> Any:
        def on_update(request: Request) -> None:
            times.append(time.perf_counter())
            if request.is_finished:
                finished.release()

        return on_update

    rng = np.random.default_rng(0)
    engine.submit(
        *(
            Request(rng.integers(0, 256, input_len).tolist(), SamplingParams(output_len), (), listener(times))
            for times in arrivals
        )
    )
    for _ in arrivals:
        finished.acquire()
    return float(np.median([(times[-1] - times[0]) / (output_len - 1) for times in arrivals]))


if __name__ == "__main__":
    main()
