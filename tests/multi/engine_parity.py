"""Run under mpirun: greedy and seeded requests through the engine at --tp × --pp; rank 0 prints tokens as JSON.

    mpirun -n 4 python tests/multi/engine_parity.py CONVERTED_FOLDER REQUESTS.json --tp 2 --pp 2

REQUESTS.json: a list of {"prompt_ids": [...], "sampling": {...}}. Submitted a few at a time while others run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from engine.comm import World
from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.request import Request, SamplingParams
from engine.runner import TorchExecutor
from engine.scheduler import Admission, Chunk, Plan
from engine.startup import choose, connect, load, make_engine
from engine.watchdog import Watchdog


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-type", default="fp32")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--lib-path", type=Path, default=Path("none"))
    parser.add_argument("--int8-mode", type=int, default=0)
    parser.add_argument("--logits", type=Path, help="instead of generating, save each prompt's next-token logits here")
    flags = parser.parse_args()
    world = World()
    parallel = ParallelConfig(flags.tp, flags.pp, world.rank)
    limits = EngineConfig(
        engine=flags.engine,
        device=flags.device,
        data_type=flags.data_type,
        int8_mode=flags.int8_mode,
        max_batch_size=5,
        max_step_tokens=24,
        block_size=4,
    )
    model_config = ModelConfig.read(flags.folder / "config.ini")
    choice = choose(limits, model_config, flags.lib_path, world.local_rank)
    executor = load(
        flags.folder, model_config, limits, parallel, world, connect(world, parallel, choice), choice, flags.lib_path
    )
    executor.prepare()
    items = json.loads(flags.requests.read_text())
    if flags.logits is not None:
        save_logits(executor, parallel, [item["prompt_ids"] for item in items], flags.logits)
        return
    if world.rank > 0:
        follow(world, executor, Watchdog(), limits.step_timeout_s)
        return
    requests = [
        Request(item["prompt_ids"], SamplingParams(**item["sampling"]), model_config.end_id, lambda update: None)
        for item in items
    ]
    run(make_engine(executor, model_config, limits, world, Watchdog()), requests)
    print("RESULT", json.dumps([request.output_ids for request in requests]))


def save_logits(executor: TorchExecutor, parallel: ParallelConfig, prompts: list[list[int]], path: Path) -> None:
    """One prompt a step, in two pieces; the last stage's first rank writes [prompts, vocab] fp32."""
    rows = []
    for prompt_ids in prompts:
        blocks = list(range(-(-len(prompt_ids) // executor.cache.block_size)))
        middle = len(prompt_ids) // 2
        pieces = [Chunk(0, 0, middle, False)] if middle else []
        pieces.append(Chunk(0, middle, len(prompt_ids) - middle, True))
        for piece in pieces:
            admissions = [Admission(0, prompt_ids, SamplingParams(1), blocks)] if piece.start == 0 else []
            logits = executor.forward(Plan([piece], admissions))
        if logits is not None:
            rows.append(logits[0].cpu().numpy())
    if parallel.is_last_stage and parallel.tp_rank == 0:
        np.save(path, np.stack(rows))


def run(engine: Engine, requests: list[Request]) -> None:
    """Submit two requests every three steps, so that they join and leave a running batch."""
    todo = list(requests)
    while todo or not all(request.is_finished for request in requests):
        for request in todo[:2]:
            engine.submit(request)
        del todo[:2]
        for _ in range(3):
            engine.step()
    engine.stop(10)
    engine.run()


if __name__ == "__main__":
    main()
