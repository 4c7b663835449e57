#!/usr/bin/env python3
"""Precision, memory and time of --int8-mode 1 beside the same model unquantized; one rank.

    python benchmarks/int8.py ft_models/stories/1-gpu --prompts "Once upon a time" "The king was"
    python benchmarks/int8.py 124M

Takes a converted folder or a random model's shape. The unquantized model continues each prompt greedily. Both models
then read these texts, and their logits of each next token are compared: ‖difference‖ / ‖logits‖, and the share of
tokens on which both agree. Each model runs in a process of its own, so that memory is measured alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, BenchmarkFlags, RandomReader, claim_device, model_config, report
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine
from engine.flags import add_flags
from engine.plan import Chunk, NewSequences, Plan
from engine.request import Request, SamplingParams
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.collectives import Comm
from executor.runner import TorchExecutor, computation_dtype
from weights.model_config import ModelConfig
from weights.reader import ShardReader


@dataclass
class Measured:
    """One of the two models."""

    texts: list[list[int]]  # prompt and continuation
    logits: np.ndarray  # [tokens, vocab] fp32, at the position of each continued token, text after text
    weight_mb: float
    token_ms: dict[int, float] = field(default_factory=dict)  # per batch size


def main() -> None:
    flags = parse_flags()
    context = multiprocessing.get_context("spawn")
    found: list[Measured] = []
    for int8_mode in (0, 1):
        with context.Pool(1) as pool:
            found.append(pool.apply(measure, (flags, int8_mode, found[0].texts if found else None)))
    show(flags, *found)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a converted folder for tp 1, or a random model: {', '.join(SHAPES)}")
    parser.add_argument("--prompts", nargs="+", help="texts; without: 8 prompts of 32 random tokens")
    add_flags(parser, EngineConfig, "engine", ("device", "data_type"))
    add_flags(parser, BenchmarkFlags, "load", ("threads", "batches", "output_len"))
    return parser.parse_args()


def measure(flags: argparse.Namespace, int8_mode: int, texts: list[list[int]] | None) -> Measured:
    """Load the model, in int8 or not; generate the texts if None is given; read them, and time steps."""
    world = World()
    device = claim_device(world, flags.device, flags.threads)
    dtype = computation_dtype(flags.data_type, device)
    if flags.model in SHAPES:
        config = model_config(flags.model, 1)
        torch.manual_seed(0)
        reader = RandomReader(config, 0, dtype, device)
    else:
        config = ModelConfig.read(Path(flags.model) / "config.ini")
        reader = ShardReader(Path(flags.model), config, 0, dtype)
    prompts = tokenize(flags, config)
    longest = max(map(len, prompts)) + flags.output_len
    limits = EngineConfig(
        max_batch_size=max(*flags.batches, len(prompts)),
        max_seq_len=longest,
        max_step_tokens=4096,
        int8_mode=int8_mode,
        no_prefix_cache=True,  # rounds repeat their prompts
    )
    before = used_mb(device)
    executor = TorchExecutor(reader, limits, Comm(world, ParallelConfig(), device), device)
    weight_mb = used_mb(device) - before
    executor.prepare()
    engine = make_engine(executor, config, limits, world, Watchdog())
    if texts is None:
        outputs, _ = generate(engine, prompts, flags.output_len)
        texts = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    measured = Measured(texts, np.concatenate([read(executor, text, flags.output_len) for text in texts]), weight_mb)
    for batch in flags.batches:
        batched = [prompts[i % len(prompts)] for i in range(batch)]
        times = [generate(engine, batched, flags.output_len)[1] for _ in range(4)]
        measured.token_ms[batch] = min(times) * 1e3
    return measured


def tokenize(flags: argparse.Namespace, config: ModelConfig) -> list[list[int]]:
    if flags.prompts is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, (8, 32)).tolist()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    return [tokenizer(text)["input_ids"] for text in flags.prompts]


def used_mb(device: torch.device) -> float:
    """Memory in use that no file is behind: a tied fp32 embedding stays mapped and does not count on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("RssAnon"))


def generate(engine: Engine, prompts: list[list[int]], output_len: int) -> tuple[list[list[int]], float]:
    """Greedy continuations, and the median seconds of a step that adds a token to each."""
    requests = [Request(prompt, SamplingParams(output_len), (), lambda request: None) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    times = [time.perf_counter()]
    while engine.step():
        times.append(time.perf_counter())
    return [request.output_ids for request in requests], float(np.median(np.diff(times)[2:-2]))


@torch.inference_mode()
def read(executor: TorchExecutor, text: list[int], output_len: int) -> np.ndarray:
    """[output_len, vocab]: the logits of the text's last tokens, each seeing those before it."""
    blocks = list(range(-(-len(text) // executor.cache.block_size)))
    new = NewSequences([0], text, SamplingParams(1), (), [blocks])
    positions = list(range(len(text) - 1 - output_len, len(text) - 1))
    hidden = executor.hidden(Plan(chunks=[Chunk(0, 0, len(text), [0])], new_sequences=[new]))
    return executor.model.logits(hidden[positions]).cpu().numpy()


def show(flags: argparse.Namespace, plain: Measured, int8: Measured) -> None:
    norms = np.linalg.norm(plain.logits, axis=1)
    errors = np.linalg.norm(int8.logits - plain.logits, axis=1) / norms
    tokens, int8_tokens = plain.logits.argmax(1), int8.logits.argmax(1)
    agreement = float((tokens == int8_tokens).mean())
    rows = np.arange(len(tokens))
    spread = plain.logits[rows, tokens] - plain.logits[rows, int8_tokens]  # the loss of logit where they differ
    device = torch.device("cuda" if torch.cuda.is_available() and flags.device != "cpu" else "cpu")
    dtype = str(computation_dtype(flags.data_type, device)).removeprefix("torch.")
    print(f"{flags.model}: int8_mode 1 beside 0 in {dtype}, {len(tokens)} tokens of {len(plain.texts)} texts")
    print(f"logits' relative error: mean {errors.mean():.2e}, max {errors.max():.2e}")
    loss = f"; where not, its logit is {spread[spread > 0].mean():.3f} lower" if spread.any() else ""
    print(f"the same greedy token: {agreement:.2%}{loss}")
    batches = sorted(plain.token_ms)
    print(f"{'':>6} {'weights MB':>11}" + "".join(f"{f'ms/token, batch {batch}':>20}" for batch in batches))
    for name, model in (("0", plain), ("1", int8)):
        print(f"{name:>6} {model.weight_mb:>11.1f}" + "".join(f"{model.token_ms[batch]:>20.2f}" for batch in batches))
    report(
        device,
        benchmark="int8",
        model=flags.model,
        dtype=dtype,
        tokens=len(tokens),
        error_mean=float(errors.mean()),
        error_max=float(errors.max()),
        greedy_agreement=agreement,
        weight_mb=[plain.weight_mb, int8.weight_mb],
        token_ms=[plain.token_ms, int8.token_ms],
    )


if __name__ == "__main__":
    main()
