#!/usr/bin/env python3
"""Output tokens per second of a mix of requests that come at once, at the engine's interface, per kind of sampling.

    python benchmarks/throughput.py --shapes 1.3B 6.7B --sampling greedy top_p top_k penalties
    python benchmarks/throughput.py --shapes 20B --sampling greedy --quantization fp8 --kv-cache-dtype fp8

The mix: 256 requests with prompts of 16 to 512 random tokens and outputs of 16 to 256, uniform, no early stop. The last
column is the ratio to the first kind. One round before the measured ones warms up.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags, report
from benchmarks.shapes import ENGINE_FLAGS, for_each_shape, format_name, run_to_end
from engine.config import EngineConfig
from engine.engine import Engine
from engine.flags import add_flags
from engine.request import Request, SamplingParams
from server import ModelFlags
from weights.model_config import ModelConfig

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "penalties": {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
}
_MAX_SEQ_LEN = 1024


def main() -> None:
    flags = parse_flags()
    for_each_shape(flags, flags.requests, _MAX_SEQ_LEN, partial(measure, flags), partial(show, flags))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampling", nargs="+", choices=list(SAMPLING), default=list(SAMPLING), help="kinds to time")
    add_flags(parser, ModelFlags, "ranks", ("tp", "pp"))
    add_flags(parser, EngineConfig, "engine", ENGINE_FLAGS)
    add_flags(parser, BenchmarkFlags, "load", ("shapes", "threads", "requests", "repeats"), repeats=1)
    return parser.parse_args()


def mix(count: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each request, always the same."""
    rng = random.Random(0)
    return [(rng.randint(16, 512), rng.randint(16, 256)) for _ in range(count)]


def measure(
    flags: argparse.Namespace, engine: Engine, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Output tokens per second of each kind of sampling, the best of the repeats."""
    lengths = mix(flags.requests)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, prompt_len).tolist() for prompt_len, _ in lengths]
    return {kind: _rate(engine, prompts, lengths, kind, flags.repeats) for kind in flags.sampling}


def _rate(
    engine: Engine, prompts: Sequence[list[int]], lengths: Sequence[tuple[int, int]], kind: str, repeats: int
) -> float:
    seconds = []
    for _ in range(repeats + 1):
        requests = []
        for seed, (ids, (_, output_len)) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(output_len, random_seed=seed, **SAMPLING[kind])
            requests.append(Request(ids, params, (), lambda request: None))
        started = time.perf_counter()
        run_to_end(engine, requests)
        seconds.append(time.perf_counter() - started)
    return sum(output_len for _, output_len in lengths) / min(seconds[1:])


def show(
    flags: argparse.Namespace, shape: str, rates: dict[str, float], device: torch.device, dtype: torch.dtype
) -> None:
    name = format_name(flags, dtype)
    print(f"{shape} {name} tp {flags.tp} pp {flags.pp}, {flags.requests} requests")
    first = next(iter(rates.values()))
    for kind, rate in rates.items():
        print(f"{kind:>10} {rate:>9.0f} tokens/s {rate / first:>6.2f}")
    report(device, benchmark="throughput", shape=shape, dtype=name, tp=flags.tp, pp=flags.pp, rates=rates)


if __name__ == "__main__":
    main()
