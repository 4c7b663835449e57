"""Rank 0's engine around a prepared executor, with the scheduler that fits it."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.engine import Engine, Executor, Scheduling
from engine.scheduler import Scheduler
from engine.speculation import Speculation
from engine.static import StaticScheduler
from engine.watchdog import Watchdog
from engine.world import World
from weights.model_config import ModelConfig


def make_engine(
    executor: Executor, model_config: ModelConfig, engine_config: EngineConfig, world: World, watchdog: Watchdog
) -> Engine:
    """The engine of rank 0; the executor is prepared. One without KV blocks runs whole static batches."""
    scheduler: Scheduling
    if executor.num_blocks:
        scheduler = paged = Scheduler(
            engine_config.max_batch_size,
            executor.max_seq_len,
            executor.max_step_tokens,
            engine_config.block_size,
            executor.num_blocks,
            not engine_config.no_prefix_cache,
            executor.max_mixed_tokens,
            executor.num_stages,
        )
        if engine_config.speculative == "ngram":
            most = min(executor.max_draft_rows, paged.max_mixed_tokens)
            paged.speculation = Speculation(engine_config.speculative_tokens, most)
    else:
        scheduler = StaticScheduler(engine_config.max_batch_size, executor.max_seq_len, model_config.end_id)
    return Engine(scheduler, executor, world, watchdog, engine_config.step_timeout_s, engine_config.max_queue_size)
