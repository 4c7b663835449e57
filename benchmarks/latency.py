#!/usr/bin/env python3
"""Decode and prompt latency of the torch engine on random weights, per shape and batch.

    python benchmarks/latency.py --shapes 124M --batches 1 8 --compare hf ctranslate2
    python benchmarks/latency.py --shapes 6.7B 20B --batches 1 8 --quantization fp8 --kv-cache-dtype fp8
    mpirun -n 2 python benchmarks/latency.py --shapes 20B --batches 1 --tp 2

Reports the time to the first token, the time per output token after it, on a GPU with --pp 1 the ratio of that to the
time of the step's graph on the device (host), the share of the measured bandwidth (--bandwidth-gbs: the time of one
read of the weights, divided by the step's), and the tokens per second of other engines (--compare; ctranslate2 needs
the package of that name) with the same shape, threads and weight format, whose rounds alternate with ours.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, model_config, report, weight_bytes
from benchmarks.peers import PEERS
from benchmarks.shapes import ENGINE_FLAGS, for_each_shape, format_name, run_to_end, weight_format
from engine.config import EngineConfig
from engine.engine import Engine
from engine.flags import add_flags
from engine.request import Request, SamplingParams
from server import ModelFlags
from weights.model_config import ModelConfig


def main() -> None:
    flags = parse_flags()
    max_seq_len = flags.input_len + flags.output_len
    for_each_shape(flags, max(flags.batches), max_seq_len, partial(measure, flags), partial(show, flags))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, ModelFlags, "ranks", ("tp", "pp"))
    add_flags(parser, EngineConfig, "engine", ENGINE_FLAGS)
    add_flags(parser, BenchmarkFlags, "load", ("shapes", "threads", "batches", "input_len", "output_len", "repeats"))
    parser.add_argument("--bandwidth-gbs", type=float, default=0.0, help="the memory's measured read bandwidth")
    parser.add_argument("--compare", nargs="+", choices=tuple(PEERS), default=(), help="peers to time, too (one rank)")
    return parser.parse_args()


def measure(
    flags: argparse.Namespace, engine: Engine, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> list[dict[str, float]]:
    """A row for every batch size of one shape."""
    rows = []
    is_int8 = weight_format(flags) in ("int8", "w8a8")
    peers = {name: PEERS[name](config, device, dtype, is_int8) for name in flags.compare}
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (max(flags.batches), flags.input_len))
    for batch in flags.batches:
        ours: list[tuple[float, float]] = []
        theirs: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(flags.repeats + 1):  # alternating, the first round warms both up
            ours.append(_time_engine(engine, prompts[:batch], flags.output_len))
            for name, generate in peers.items():
                started = time.perf_counter()
                generate(prompts[:batch], flags.output_len)
                theirs[name].append(time.perf_counter() - started)
        first, total = np.median(ours[1:], axis=0)
        row = {"batch": batch, "first_token_ms": first * 1e3, "total_s": total}
        row["token_ms"] = (total - first) / (flags.output_len - 1) * 1e3
        row["tokens_per_s"] = batch * flags.output_len / total
        if device.type == "cuda" and flags.pp == 1:  # a stage's graph is a part of the step
            with timed_replays() as replays:
                _time_engine(engine, prompts[:batch], flags.output_len)
            row["device_ms"] = float(np.median([start.elapsed_time(end) for start, end in replays]))
            row["host_ratio"] = row["token_ms"] / row["device_ms"]
        for name, seconds in theirs.items():
            row[f"{name}_tokens_per_s"] = batch * flags.output_len / float(np.median(seconds[1:]))
        rows.append(row)
    return rows


def _time_engine(engine: Engine, prompts: np.ndarray, output_len: int) -> tuple[float, float]:
    """Seconds to every request's first token, and to the last."""
    first_tokens: list[float] = []
    sampling = SamplingParams(output_len)

    def on_update(request: Request) -> None:
        if len(request.output_ids) == 1:
            first_tokens.append(time.perf_counter())

    requests = [Request(ids.tolist(), sampling, (), on_update) for ids in prompts]
    started = time.perf_counter()
    run_to_end(engine, requests)
    return max(first_tokens) - started, time.perf_counter() - started


@contextlib.contextmanager
def timed_replays() -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Events before and after each replay of a CUDA graph meanwhile. Most are of decode steps."""
    replay = torch.cuda.CUDAGraph.replay
    replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay(graph)
        end.record()
        replays.append((start, end))

    torch.cuda.CUDAGraph.replay = timed
    try:
        yield replays
    finally:
        torch.cuda.CUDAGraph.replay = replay


def show(
    flags: argparse.Namespace, shape: str, rows: list[dict[str, float]], device: torch.device, dtype: torch.dtype
) -> None:
    name = format_name(flags, dtype)
    print(f"{shape} {name} tp {flags.tp} pp {flags.pp}, {flags.input_len} in, {flags.output_len} out, greedy")
    peers = "".join(f"{f'{peer} tok/s':>18} {'ratio':>6}" for peer in flags.compare)
    print(f"{'batch':>6} {'first ms':>9} {'token ms':>9} {'tok/s':>9} {'host':>6} {'floor':>6}{peers}")
    config = model_config(shape, flags.tp)
    for row in rows:
        floor = "-"
        if flags.bandwidth_gbs:
            floor_ms = weight_bytes(config, dtype, weight_format(flags)) / flags.tp / flags.bandwidth_gbs / 1e6
            row["share_of_bandwidth"] = floor_ms / row["token_ms"]
            floor = f"{row['share_of_bandwidth']:.2f}"
        times = f"{row['first_token_ms']:>9.2f} {row['token_ms']:>9.3f} {row['tokens_per_s']:>9.1f}"
        host = f"{row['host_ratio']:.3f}" if "host_ratio" in row else "-"
        cells = ""
        for peer in flags.compare:
            row[f"ratio_to_{peer}"] = row["tokens_per_s"] / row[f"{peer}_tokens_per_s"]
            cells += f"{row[f'{peer}_tokens_per_s']:>18.1f} {row[f'ratio_to_{peer}']:>6.2f}"
        print(f"{row['batch']:>6} {times} {host:>6} {floor:>6}{cells}")
    threads = torch.get_num_threads() if device.type == "cpu" else None
    report(
        device,
        benchmark="latency",
        shape=shape,
        dtype=name,
        tp=flags.tp,
        pp=flags.pp,
        input_len=flags.input_len,
        output_len=flags.output_len,
        threads=threads,
        cores=os.cpu_count(),
        rows=rows,
    )


if __name__ == "__main__":
    main()
