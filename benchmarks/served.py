"""Parts that the benchmarks of serving share: an engine on random weights behind PyTriton, in one process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import BenchmarkFlags, RandomReader, claim_device, model_config
from convert import ConversionFlags
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.flags import add_flags
from engine.request import Request, SamplingParams
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.collectives import Comm
from executor.runner import TorchExecutor, computation_dtype
from gpt import triton_models
from serving.flags import LogFlags, PrometheusFlags
from serving.generation import Generator
from serving.metrics import ServerMetrics
from serving.openai.flags import OpenAIFlags
from serving.startup import FrontEndFlags, make_front_ends
from serving.tokenization import RequestEncoder
from serving.triton.frontend import TritonFlags

NAME = "benchmark"
_CLIENT = Path(__file__).resolve().parent.parent / "client.py"


class WordTokenizer:
    """One token per word; a benchmark needs no more."""

    all_special_ids = ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split() if word.isdigit()]

    def get_vocab(self) -> dict[str, int]:
        return {"0": 0}

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "".join(f"{token_id} " for token_id in token_ids)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that `serve` reads."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="gRPC, metrics and the OpenAI API listen on the three ports after --http-port",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, BenchmarkFlags, "model", ("shape", "threads"))
    add_flags(parser, ConversionFlags, "ranks", ("tp",))
    add_flags(parser, EngineConfig, "engine", ("device",))
    add_flags(parser, TritonFlags, "triton", ("http_port",), http_port=18500)
    return parser


def url(flags: argparse.Namespace, kind: str) -> str:
    """The server's address; kind: http, grpc or openai."""
    scheme, offset = {"http": ("http", 0), "grpc": ("grpc", 1), "openai": ("http", 3)}[kind]
    return f"{scheme}://127.0.0.1:{flags.http_port + offset}"


def serve(flags: argparse.Namespace, measure: Callable[[Engine], Any]) -> tuple[Any, torch.device] | None:
    """Run `measure` in a thread beside the serving engine; returns its result and the device on rank 0, else None."""
    world = World()
    device = claim_device(world, flags.device, flags.threads)
    dtype = computation_dtype("auto", device)
    config = model_config(flags.shape, flags.tp)
    limits = EngineConfig(no_prefix_cache=True)  # rounds repeat their prompts
    parallel = ParallelConfig(flags.tp, 1, world.rank)
    reader = RandomReader(config, parallel.tp_rank, dtype, device)
    executor = TorchExecutor(reader, limits, Comm(world, parallel, device), device, world.local_size)
    executor.prepare()
    watchdog = Watchdog()
    if world.rank > 0:
        follow(world, executor, watchdog, limits.step_timeout_s)
        return None
    engine = make_engine(executor, config, limits, world, watchdog)
    encoder = RequestEncoder(WordTokenizer(), config.end_ids, config.vocab_size, executor.max_seq_len)
    generator = Generator(engine, encoder)
    http, grpc, metrics, openai = range(flags.http_port, flags.http_port + 4)
    front_end_flags = FrontEndFlags(
        TritonFlags("127.0.0.1", http, grpc, metrics), OpenAIFlags(openai), PrometheusFlags(), LogFlags()
    )
    numbers = ServerMetrics(NAME, executor.max_seq_len)
    models = triton_models(NAME, generator)
    front_ends = make_front_ends(generator, models, NAME, NAME, front_end_flags, numbers, verbose=False)
    for front_end in front_ends:
        front_end.start()
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(measure(engine))
        finally:
            engine.stop(0.0)

    thread = threading.Thread(target=work)
    thread.start()
    engine.run()
    thread.join()
    for front_end in front_ends:
        front_end.stop()
    return results[0], device


def bench(flags: argparse.Namespace, kind: str, *more: str) -> dict[str, Any]:
    """Run `client.py --bench` in a process of its own; returns its JSON line. Raises RuntimeError where it fails."""
    command = [sys.executable, str(_CLIENT), "--bench", "--url", url(flags, kind), "--model-name", NAME, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"client.py --bench failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def engine_times(engine: Engine, count: int, input_len: int, output_len: int) -> tuple[float, float]:
    """(ms of an answer, ms per token after the first), medians over requests that begin together; 0 for one token."""
    arrivals: list[list[float]] = [[] for _ in range(count)]
    finished = threading.Semaphore(0)

    def listener(times: list[float]) -> Any:
        def on_update(request: Request) -> None:
            times.append(time.perf_counter())
            if request.is_finished:
                finished.release()

        return on_update

    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 256, input_len).tolist(), SamplingParams(output_len), (), listener(times))
        for times in arrivals
    ]
    started = time.perf_counter()
    engine.submit(*requests)
    for _ in arrivals:
        finished.acquire()
    per_token = [(times[-1] - times[0]) / max(1, output_len - 1) for times in arrivals]
    return 1e3 * float(np.median([times[-1] - started for times in arrivals])), 1e3 * float(np.median(per_token))
