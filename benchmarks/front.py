#!/usr/bin/env python3
"""Time that the front ends add to the engine's own: Triton over HTTP and gRPC, and OpenAI, at 1 and 64 clients.

    python benchmarks/front.py --shape 8M

One process runs the engine with both front ends before it, as server.py does. The clients of a round begin together,
in a process of their own, which shares this machine's cores. The engine's own figures are taken in its process. ms of
a whole answer, and ms per token after the first; medians over the clients, then over the rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from benchmarks.served import bench, engine_times, make_parser, serve, url
from engine.engine import Engine
from engine.flags import add_flags

_LOAD = Path(__file__).with_name("load.py")
WAYS = ("engine", "infer", "openai", "http-stream", "grpc-stream", "openai-stream")


def main() -> None:
    parser = make_parser(__doc__)
    add_flags(
        parser,
        BenchmarkFlags,
        "load",
        ("batches", "input_len", "output_len", "repeats"),
        batches=(1, 64),
        input_len=32,
        repeats=5,
    )
    flags = parser.parse_args()
    measured = serve(flags, lambda engine: measure(flags, engine))
    if measured is None:
        return
    rows, device = measured
    print(f"{flags.shape}, tp {flags.tp}, {flags.input_len} in, {flags.output_len} out; ms, median, and what is added")
    print(f"{'clients':>8} {'way':>14} {'answer':>9} {'added':>8} {'token':>9} {'added':>8}")
    for row in rows:
        print(
            f"{row['clients']:>8} {row['way']:>14} {row['answer_ms']:>9.2f} {row['answer_added_ms']:>8.2f}"
            + (f" {row['token_ms']:>9.3f} {row['token_added_ms']:>8.3f}" if row["token_ms"] else "")
        )
    report(device, benchmark="front", shape=flags.shape, tp=flags.tp, rows=rows)


def measure(flags: argparse.Namespace, engine: Engine) -> list[dict[str, Any]]:
    """A row per number of clients (--batches) and way."""
    rows = []
    for clients in flags.batches:
        rounds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(flags.repeats + 1):  # the first one warms up
            for way in WAYS:
                rounds[way].append(once(flags, engine, way, clients))
        medians = {way: np.median(values[1:], axis=0) for way, values in rounds.items()}
        for way, (answer_ms, token_ms) in medians.items():
            added = medians[way] - medians["engine"]
            row = {"clients": clients, "way": way, "answer_ms": float(answer_ms), "answer_added_ms": float(added[0])}
            rows.append({**row, "token_ms": float(token_ms), "token_added_ms": float(added[1])})
    return rows


def once(flags: argparse.Namespace, engine: Engine, way: str, clients: int) -> tuple[float, float]:
    """(ms of an answer, ms per token), medians over the clients; ms per token is 0 where answers come whole."""
    if way == "engine":
        return engine_times(engine, clients, flags.input_len, flags.output_len)
    if way in ("http-stream", "grpc-stream"):
        load = ["--concurrency", str(clients), "--num-requests", str(clients), "--bench-warmup", "1"]
        load += ["--bench-prompt-len", str(flags.input_len), "--bench-output-len", str(flags.output_len)]
        found = bench(flags, way.removesuffix("-stream"), *load)
    else:
        command = [sys.executable, str(_LOAD), "--kind", way, "--concurrency", str(clients)]
        command += ["--url", url(flags, "http" if way == "infer" else "openai"), "--num-requests", str(clients)]
        command += ["--input-len", str(flags.input_len), "--output-len", str(flags.output_len)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    return found["latency_ms"]["p50"], found["tpot_ms"].get("p50", 0.0)


if __name__ == "__main__":
    main()
