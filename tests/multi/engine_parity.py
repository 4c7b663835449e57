"""On every rank: requests through the engine at --tp × --pp, or the next token's logits; tests.support.ranks calls it.

The items are those of tests.support.traffic. They are submitted at random times while others run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from engine import cohorts
from engine.config import EngineConfig, ParallelConfig
from engine.engine import follow
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor import layers
from executor.layers import LMHead
from executor.startup import WeightFolder, connect, load, pick_backend
from tests.support.engines import step_logits
from tests.support.soak import Counts, run
from tests.support.stand_in_graphs import Replays, stand_in_graphs
from tests.support.traffic import VOCAB_SIZE, make_request, results, run_alone, run_crowd, vocabulary
from weights.model_config import ModelConfig

cohorts.FEW = 4  # the crowds here are small
_FEW_ROWS = layers.FEW_ROWS


def generate(world: World, items: list[dict[str, Any]], *argv: str) -> list[dict[str, Any]] | None:
    """traffic.results of each item, on rank 0."""
    flags, limits, model_config, executor = _load(world, argv)
    if world.rank > 0:
        _follow(world, executor, limits)
        return None
    words = vocabulary(max(VOCAB_SIZE, model_config.vocab_size))
    requests = [make_request({"end_id": model_config.end_id, **item}, words) for item in items]
    engine = make_engine(executor, model_config, limits, world, Watchdog())
    (run_alone if flags.alone else run_crowd)(engine, requests)
    engine.stop(10)
    engine.run()
    executor.close()
    if flags.engine == "torch":
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return [results(request) for request in requests]


def soak(world: World, items: list[dict[str, Any]], *argv: str) -> tuple[list[dict[str, Any]], Counts] | None:
    """tests.support.soak.run of the items, on rank 0."""
    _, limits, model_config, executor = _load(world, argv)
    if world.rank > 0:
        _follow(world, executor, limits)
        return None
    engine = make_engine(executor, model_config, limits, world, Watchdog())
    found = run(engine, items)
    engine.stop(10)
    engine.run()
    executor.close()
    return found


def generate_in_graphs(world: World, items: list[dict[str, Any]], *argv: str) -> tuple[Any, Replays]:
    """`generate`'s results (None on other ranks) through stand-ins of CUDA graphs, and the rank's replays."""
    with stand_in_graphs() as replayed:
        return generate(world, items, *argv), replayed


def generate_and_record(world: World, items: list[dict[str, Any]], *argv: str) -> tuple[Any, list[int]]:
    """`generate`'s results, and of how many rows each step was that LMHead.choose chose for."""
    choose, rows = LMHead.choose, []

    def recording(head: LMHead, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(logits))
        return choose(head, logits, *rest)

    with patch.object(LMHead, "choose", recording):
        return generate(world, items, *argv), rows


def generate_and_count(world: World, items: list[dict[str, Any]], *argv: str) -> tuple[Any, int]:
    """`generate`'s results, and how many CUDA graphs the rank has replayed."""
    replay, count = torch.cuda.CUDAGraph.replay, 0

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal count
        count += 1
        replay(graph)

    with patch.object(torch.cuda.CUDAGraph, "replay", counted):
        return generate(world, items, *argv), count


def logits(world: World, prompts: list[list[int]], *argv: str) -> np.ndarray | None:
    """[prompts, vocab] fp32, on the first rank of the last stage."""
    flags, _, _, executor = _load(world, argv)
    rows = step_logits(executor, prompts)
    executor.close()  # what it sent last may be on its way
    parallel = ParallelConfig(flags.tp, flags.pp, world.rank)
    return np.stack(rows) if parallel.is_last_stage and parallel.tp_rank == 0 else None


def _follow(world: World, executor: Any, limits: EngineConfig) -> None:
    follow(world, executor, Watchdog(), limits.step_timeout_s)
    executor.close()


def _load(world: World, argv: tuple[str, ...]) -> tuple[argparse.Namespace, EngineConfig, ModelConfig, Any]:
    """Flags, limits, the model's config and the prepared executor."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-type", default="fp32")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--lib-path", type=Path, default=Path("none"))
    parser.add_argument("--int8-mode", type=int, default=0)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--alone", action="store_true", help="one request after the other instead")
    parser.add_argument("--max-batch-size", type=int, default=5)
    parser.add_argument("--speculative", default="none")
    parser.add_argument("--num-ahead", type=int, default=0, help="of the executor, if more than its own")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--num-blocks", type=int, default=0)
    parser.add_argument("--few-rows", type=int, default=_FEW_ROWS, help="for which each rank chooses all tokens")
    flags = parser.parse_args(argv)
    layers.FEW_ROWS = flags.few_rows
    parallel = ParallelConfig(flags.tp, flags.pp, world.rank)
    limits = EngineConfig(
        engine=flags.engine,
        device=flags.device,
        data_type=flags.data_type,
        int8_mode=flags.int8_mode,
        quantization=flags.quantization,
        kv_cache_dtype=flags.kv_cache_dtype,
        max_batch_size=flags.max_batch_size,
        speculative=flags.speculative,
        enforce_eager=flags.enforce_eager,
        max_step_tokens=max(24, flags.max_batch_size),
        block_size=4,
    )
    weights = WeightFolder.read(flags.folder)
    model_config = weights.config
    backend = pick_backend(limits, model_config, flags.lib_path, world.local_rank, flags.pp)
    executor = load(weights, limits, parallel, world, connect(world, parallel, backend), backend)
    executor.prepare()
    executor.num_ahead = max(executor.num_ahead, flags.num_ahead)
    executor.num_blocks = flags.num_blocks or executor.num_blocks
    return flags, limits, model_config, executor
