#!/usr/bin/env python3
"""What Triton's way adds to the engine's own time, one request at a time, on random weights.

    python benchmarks/serving.py --shape 124M
    mpirun -n 2 python benchmarks/serving.py --tp 2       # and --threads 1 on one rank, for what waiting costs

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

from benchmarks.common import SHAPES, RandomReader, claim_device, model_config, report
from engine.comm import Comm, World
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.request import Request, SamplingParams, Update
from engine.runner import TorchExecutor, computation_dtype
from engine.startup import make_engine
from engine.watchdog import Watchdog
from gpt import INPUTS, OUTPUTS, GPTModel
from serving.frontend import TritonFlags, TritonFrontend


class WordTokenizer:
    """One token per word; a benchmark needs no more."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        return " ".join(map(str, token_ids))


def main() -> None:
    flags = parse_flags()
    world = World()
    device = claim_device(world, flags.device, flags.threads)
    dtype = computation_dtype("auto", device)
    config = model_config(flags.shape, flags.tp)
    limits = EngineConfig(max_batch_size=8)
    parallel = ParallelConfig(flags.tp, 1, world.rank)
    reader = RandomReader(config, parallel.tp_rank, dtype, device)
    executor = TorchExecutor(reader, limits, Comm(world, parallel, device), device, world.local_size)
    executor.prepare()
    watchdog = Watchdog()
    if world.rank > 0:
        follow(world, executor, watchdog, limits.step_timeout_s)
        return
    engine = make_engine(executor, config, limits, world, watchdog)
    ports = TritonFlags("127.0.0.1", flags.http_port, flags.http_port + 1, flags.http_port + 2)
    frontend = TritonFrontend(ports, verbose=False)
    model = GPTModel(engine.submit, WordTokenizer(), -1, config.vocab_size)
    frontend.start("benchmark", model.infer, INPUTS, OUTPUTS)
    seconds: dict[str, list[float]] = {"engine": [], "http": [], "grpc": []}
    asker = threading.Thread(target=ask, args=(flags, engine, config.vocab_size, seconds))
    asker.start()
    engine.run()
    asker.join()
    frontend.stop()
    show(flags, seconds, device)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="124M")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a rank; 0: its share of the cores")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--http-port", type=int, default=18500, help="gRPC and metrics take the next two")
    return parser.parse_args()


def ask(flags: argparse.Namespace, engine: Engine, vocab_size: int, seconds: dict[str, list[float]]) -> None:
    """Fill `seconds` with each way's times; the first round warms up and is dropped. Stops the engine at the end."""
    from pytriton.client import ModelClient

    try:
        clients = {
            "http": ModelClient(f"http://127.0.0.1:{flags.http_port}", "benchmark"),
            "grpc": ModelClient(f"grpc://127.0.0.1:{flags.http_port + 1}", "benchmark"),
        }
        prompt_ids = np.random.default_rng(0).integers(0, vocab_size, flags.input_len).tolist()
        for _ in range(flags.repeats + 1):
            seconds["engine"].append(time_engine(engine, prompt_ids, flags.output_len))
            for kind, client in clients.items():
                seconds[kind].append(time_client(client, prompt_ids, flags.output_len))
        for client in clients.values():
            client.close()
    finally:
        engine.stop(0.0)


def time_engine(engine: Engine, prompt_ids: list[int], output_len: int) -> float:
    finished = threading.Event()

    def on_update(update: Update) -> None:
        if update.finish_reason is not None:
            finished.set()

    started = time.perf_counter()
    engine.submit(Request(prompt_ids, SamplingParams(output_len), -1, on_update))
    finished.wait()
    return time.perf_counter() - started


def time_client(client: object, prompt_ids: list[int], output_len: int) -> float:
    prompts = np.array([[" ".join(map(str, prompt_ids)).encode()]], dtype=object)
    output_lens = np.array([[output_len]], dtype=np.uint32)
    started = time.perf_counter()
    answer = client.infer_batch(prompts=prompts, request_output_len=output_lens)
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
