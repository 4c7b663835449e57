"""Run under mpirun: requests through the engine at --tp × --pp; rank 0 writes the results as JSON.

    mpirun -n 4 python tests/multi/engine_parity.py CONVERTED_FOLDER REQUESTS.json --tp 2 --pp 2 --outputs OUTPUTS.json

REQUESTS.json: a list of items as tests.support.traffic has them. Submitted at random times while others run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from engine.config import EngineConfig, ParallelConfig
from engine.engine import follow
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.startup import WeightFolder, connect, load, pick_backend
from tests.support.engines import save_logits
from tests.support.traffic import VOCAB_SIZE, make_request, results, run_alone, run_crowd, vocabulary


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
    parser.add_argument(
        "--outputs", type=Path, help="save all that tests.support.traffic.results has of each request here"
    )
    parser.add_argument("--alone", action="store_true", help="one request after the other instead")
    parser.add_argument("--max-batch-size", type=int, default=5)
    parser.add_argument("--logits", type=Path, help="instead of generating, save each prompt's next-token logits here")
    flags = parser.parse_args()
    world = World()
    parallel = ParallelConfig(flags.tp, flags.pp, world.rank)
    limits = EngineConfig(
        engine=flags.engine,
        device=flags.device,
        data_type=flags.data_type,
        int8_mode=flags.int8_mode,
        max_batch_size=flags.max_batch_size,
        max_step_tokens=max(24, flags.max_batch_size),
        block_size=4,
    )
    weights = WeightFolder.read(flags.folder)
    model_config = weights.config
    backend = pick_backend(limits, model_config, flags.lib_path, world.local_rank, flags.pp)
    executor = load(weights, limits, parallel, world, connect(world, parallel, backend), backend)
    executor.prepare()
    items = json.loads(flags.requests.read_text())
    if flags.logits is not None:
        save_logits(executor, parallel, [item["prompt_ids"] for item in items], flags.logits)
        return
    if world.rank > 0:
        follow(world, executor, Watchdog(), limits.step_timeout_s)
        return
    words = vocabulary(max(VOCAB_SIZE, model_config.vocab_size))
    requests = [make_request({"end_id": model_config.end_id, **item}, words) for item in items]
    engine = make_engine(executor, model_config, limits, world, Watchdog())
    (run_alone if flags.alone else run_crowd)(engine, requests)
    engine.stop(10)
    engine.run()
    if flags.engine == "torch":
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    if flags.outputs is not None:
        flags.outputs.write_text(json.dumps([results(request) for request in requests]))


if __name__ == "__main__":
    main()
