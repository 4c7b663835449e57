#!/usr/bin/env python3
"""Speculation by prompt lookup at batch 1: tokens per second with and without it, and how many drafts were right.

    python benchmarks/speculation.py
    python benchmarks/speculation.py 1.3B --device cuda --data-type bf16

Four texts, each greedy but the last one:

- repeat: the prompt has a passage, and the beginning of the same passage; a random model has no such text;
- loop: a bias leaves one token, so that each draft is right: the most that drafts can give;
- six: a bias leaves six tokens; of a random model's drafts, most are wrong: what they cost;
- random: a prompt of random tokens, and each next one drawn from all tokens: what the search for drafts costs.

Rounds with and without speculation alternate, and the best of each counts: other programs can only slow one down.
"same tokens" may be no in bf16. A step of several rows adds up in another order than a step of one, and the logits of a
random model are flat, so the two best ones may change places. In fp32 it is yes.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, BenchmarkFlags, RandomReader, claim_device, model_config, report
from benchmarks.shapes import run_to_end
from convert import convert
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine
from engine.flags import add_flags
from engine.metrics import Progress
from engine.request import Request, SamplingParams
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.collectives import Comm
from executor.runner import TorchExecutor, computation_dtype
from weights.model_config import ModelConfig
from weights.reader import ShardReader

_PASSAGE = (
    "Once upon a time there was a king who had three daughters, and the youngest was so beautiful that the sun itself, "
    "which has seen so much, was astonished whenever it shone in her face. Close by the castle lay a great forest, and "
    "under an old lime tree in the forest was a well."
)


@dataclass(frozen=True)
class Text:
    """A prompt and how it goes on."""

    prompt_ids: list[int]
    sampling: SamplingParams


class DraftCounter:
    """An Observer that adds up drafts."""

    def __init__(self) -> None:
        self.num_drafted = self.num_accepted = 0

    def count_plan(self, num_tokens: int) -> None:
        """Not counted."""

    def count_progress(self, progress: Progress) -> None:
        """As engine.metrics.Observer has it."""
        self.num_drafted += progress.num_drafted
        self.num_accepted += progress.num_accepted

    def count_finished(self, request: Request) -> None:
        """Not counted."""


def main() -> None:
    flags = parse_flags()
    device = claim_device(World(), flags.device, flags.threads)
    dtype = computation_dtype(flags.data_type, device)
    with tempfile.TemporaryDirectory() as folder:
        if flags.model in SHAPES:
            torch.manual_seed(0)
            config = model_config(flags.model, 1)
            reader: Any = RandomReader(config, 0, dtype, device)
        else:
            converted = convert(Path(flags.model), Path(folder), 1, "auto")
            config = ModelConfig.read(converted / "config.ini")
            reader = ShardReader(converted, config, 0, dtype)
        limits = EngineConfig(
            max_batch_size=8,
            speculative="ngram",
            speculative_tokens=flags.speculative_tokens,
            step_timeout_s=600,
            no_prefix_cache=True,  # rounds have the same prompts
        )
        executor = TorchExecutor(reader, limits, Comm(World(), ParallelConfig(), device), device)
        executor.prepare()
        engine = make_engine(executor, config, limits, World(), Watchdog())
        rows = [measure(engine, name, text, flags.repeats) for name, text in texts(flags, config).items()]
        executor.close()
    show(flags, rows)
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    report(device, benchmark="speculation", model=flags.model, dtype=name, threads=threads, rows=rows)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stories = Path(__file__).resolve().parent.parent / "models/stories"
    parser.add_argument(
        "model",
        nargs="?",
        default=str(stories),
        help=f"a checkpoint with a tokenizer, or a random model: {', '.join(SHAPES)}",
    )
    add_flags(parser, EngineConfig, "engine", ("device", "data_type", "speculative_tokens"))
    add_flags(parser, BenchmarkFlags, "load", ("threads", "output_len", "repeats"), output_len=200)
    return parser.parse_args()


def texts(flags: argparse.Namespace, config: ModelConfig) -> dict[str, Text]:
    """By name; a random model has none to repeat."""
    rng = np.random.default_rng(0)
    random_ids = rng.integers(0, config.vocab_size, 128).tolist()
    bias = tuple((token_id, 100.0) for token_id in random_ids[:6])
    found = {
        "loop": Text(random_ids, SamplingParams(flags.output_len, logit_bias=bias[:1])),
        "six": Text(random_ids, SamplingParams(flags.output_len, logit_bias=bias)),
        "random": Text(random_ids, SamplingParams(flags.output_len, top_p=1.0, random_seed=1)),
    }
    if flags.model not in SHAPES:
        from transformers import AutoTokenizer

        prompt = f"{_PASSAGE} {_PASSAGE[:60]}"
        ids = AutoTokenizer.from_pretrained(flags.model)(prompt)["input_ids"]
        found = {"repeat": Text(ids, SamplingParams(flags.output_len)), **found}
    return found


def measure(engine: Engine, name: str, text: Text, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    speculation = engine.scheduler.speculation  # type: ignore[attr-defined]
    engine.observer = counter = DraftCounter()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    outputs = set()
    for _ in range(repeats + 1):  # the first round warms both up
        for is_on in seconds:
            engine.scheduler.speculation = speculation if is_on else None  # type: ignore[attr-defined]
            request = Request(text.prompt_ids, text.sampling)
            run_to_end(engine, [request])
            seconds[is_on].append(request.times.last_token - request.times.first_token)
            outputs.add(tuple(request.output_ids))
    engine.scheduler.speculation = speculation  # type: ignore[attr-defined]
    plain, drafted = ((text.sampling.max_new_tokens - 1) / min(seconds[is_on][1:]) for is_on in (False, True))
    rounds = repeats + 1
    return {
        "text": name,
        "plain_tokens_per_s": plain,
        "speculative_tokens_per_s": drafted,
        "ratio": drafted / plain,
        "drafted": counter.num_drafted / rounds,
        "accepted": counter.num_accepted / rounds,
        "is_equal": len(outputs) == 1,
    }


def show(flags: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(f"{flags.model}, batch 1, {flags.output_len} tokens, at most {flags.speculative_tokens} drafts a step")
    print(
        f"{'text':8} {'plain tok/s':>12} {'ngram tok/s':>12} {'ratio':>6} {'drafted':>8} {'accepted':>9}  same tokens"
    )
    for row in rows:
        rates = f"{row['plain_tokens_per_s']:>12.1f} {row['speculative_tokens_per_s']:>12.1f} {row['ratio']:>6.2f}"
        is_equal = "yes" if row["is_equal"] else "no"
        print(f"{row['text']:8} {rates} {row['drafted']:>8.0f} {row['accepted']:>9.0f}  {is_equal}")


if __name__ == "__main__":
    main()
