"""Parts that the benchmarks of serving share: an engine on random weights behind PyTriton, in one process."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BenchmarkFlags, RandomReader, claim_device, model_config
from convert import ConversionFlags
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.flags import add_flags
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.collectives import Comm
from executor.runner import TorchExecutor, computation_dtype
from gpt import INPUTS, OUTPUTS, GPTModel
from serving.generation import Generator
from serving.tokenization import RequestEncoder
from serving.triton.frontend import TritonFlags, TritonFrontend, TritonModel

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
        epilog="gRPC and metrics listen on the two ports after --http-port",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, BenchmarkFlags, "model", ("shape", "threads"))
    add_flags(parser, ConversionFlags, "ranks", ("tp",))
    add_flags(parser, EngineConfig, "engine", ("device",))
    add_flags(parser, TritonFlags, "triton", ("http_port",), http_port=18500)
    return parser


def url(flags: argparse.Namespace, kind: str) -> str:
    """The server's address; kind: http or grpc."""
    return f"{kind}://127.0.0.1:{flags.http_port + (kind == 'grpc')}"


def serve(flags: argparse.Namespace, measure: Callable[[Engine], Any]) -> tuple[Any, torch.device] | None:
    """Run `measure` in a thread beside the serving engine; returns its result and the device on rank 0, else None."""
    world = World()
    device = claim_device(world, flags.device, flags.threads)
    dtype = computation_dtype("auto", device)
    config = model_config(flags.shape, flags.tp)
    limits = EngineConfig()
    parallel = ParallelConfig(flags.tp, 1, world.rank)
    reader = RandomReader(config, parallel.tp_rank, dtype, device)
    executor = TorchExecutor(reader, limits, Comm(world, parallel, device), device, world.local_size)
    executor.prepare()
    watchdog = Watchdog()
    if world.rank > 0:
        follow(world, executor, watchdog, limits.step_timeout_s)
        return None
    engine = make_engine(executor, config, limits, world, watchdog)
    frontend = TritonFrontend(
        TritonFlags("127.0.0.1", flags.http_port, flags.http_port + 1, flags.http_port + 2), verbose=False
    )
    encoder = RequestEncoder(WordTokenizer(), config.end_ids, config.vocab_size, executor.max_seq_len)
    model = GPTModel(Generator(engine, encoder))
    frontend.start(
        [
            TritonModel(NAME, model.infer, INPUTS, OUTPUTS),
            TritonModel(f"{NAME}_streaming", model.stream, INPUTS, OUTPUTS, decoupled=True),
        ]
    )
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
    frontend.stop()
    return results[0], device


def bench(flags: argparse.Namespace, kind: str, *more: str) -> dict[str, Any]:
    """Run `client.py --bench` in a process of its own; returns its JSON line. Raises RuntimeError where it fails."""
    command = [sys.executable, str(_CLIENT), "--bench", "--url", url(flags, kind), "--model-name", NAME, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"client.py --bench failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
