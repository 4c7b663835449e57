"""Engines of random models, one shape after another, on one rank or several; and requests run to their end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from benchmarks.common import RandomReader, claim_device, model_config
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.request import Request
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.collectives import Comm
from executor.runner import TorchExecutor, computation_dtype
from weights.model_config import ModelConfig

# Fields of EngineConfig.
ENGINE_FLAGS = ("device", "data_type", "quantization", "int8_mode", "kv_cache_dtype", "max_mixed_tokens", "all_reduce")
_TIMEOUT_S = 600.0
_T = TypeVar("_T")


def for_each_shape(
    flags: argparse.Namespace,
    max_batch_size: int,
    max_seq_len: int,
    measure: Callable[[Engine, ModelConfig, torch.device, torch.dtype], _T],
    show: Callable[[str, _T, torch.device, torch.dtype], None],
) -> None:
    """Make each shape's engine on all ranks. On rank 0 measure it, end it, and show what was measured.

    flags: shapes, device, threads, tp, pp, and those of ENGINE_FLAGS.
    """
    world = World()
    device = claim_device(world, flags.device, flags.threads)
    dtype = computation_dtype(flags.data_type, device)
    comm = Comm(world, ParallelConfig(flags.tp, flags.pp, world.rank), device)
    watchdog = Watchdog()
    limits = EngineConfig(
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        step_timeout_s=_TIMEOUT_S,
        no_prefix_cache=True,  # rounds have the same prompts
        **{name: getattr(flags, name) for name in ENGINE_FLAGS},
    )
    for shape in flags.shapes:
        config = model_config(shape, flags.tp, max(1024, max_seq_len))
        reader = RandomReader(config, comm.parallel.tp_rank, dtype, device)
        executor = TorchExecutor(reader, limits, comm, device, world.local_size)
        executor.prepare()
        if world.rank > 0:
            follow(world, executor, watchdog, _TIMEOUT_S)
        else:
            engine = make_engine(executor, config, limits, world, watchdog)
            measured = measure(engine, config, device, dtype)
            engine.stop(0.0)
            engine.run()
            del engine
            show(shape, measured, device, dtype)
        executor.close()
        del executor  # its memory is the next one's
    comm.close()


def weight_format(flags: argparse.Namespace) -> str:
    """none, int8, fp8 or w8a8."""
    return EngineConfig(quantization=flags.quantization, int8_mode=flags.int8_mode).weight_format


def format_name(flags: argparse.Namespace, dtype: torch.dtype) -> str:
    """The number format of the weights, and that of the cache where it is another."""
    weights = weight_format(flags)
    name = str(dtype).removeprefix("torch.") if weights == "none" else weights
    return name if flags.kv_cache_dtype == "auto" else f"{name}, {flags.kv_cache_dtype} cache"


def run_to_end(engine: Engine, requests: Sequence[Request]) -> None:
    """Submit the requests, and step until all are finished and nothing is launched ahead."""
    for request in requests:
        engine.submit(request)
    while not all(request.is_finished for request in requests):
        engine.step()
    while engine.step():  # what was launched ahead
        pass
