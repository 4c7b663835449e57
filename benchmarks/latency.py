#!/usr/bin/env python3
"""Decode and prompt latency of the torch engine on random weights, per shape and batch.

    python benchmarks/latency.py --shapes 124M --batches 1 8 --compare-hf
    mpirun -n 2 python benchmarks/latency.py --shapes 20B --batches 1 --tp 2

Reports the time to the first token, the time per output token after it, the share of the measured bandwidth
(--bandwidth-gbs: the time of one read of the weights, divided by the step's), and Hugging Face generate's figures for
the same shape and threads, measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, BenchmarkFlags, RandomReader, claim_device, model_config, report, weight_bytes
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine, follow
from engine.flags import add_flags
from engine.request import Request, SamplingParams
from engine.startup import make_engine
from engine.watchdog import Watchdog
from engine.world import World
from executor.collectives import Comm
from executor.runner import TorchExecutor, computation_dtype
from server import ModelFlags
from weights.model_config import ModelConfig

_TIMEOUT_S = 600.0


def main() -> None:
    flags = parse_flags()
    world = World()
    device = claim_device(world, flags.device, flags.threads)
    dtype = computation_dtype(flags.data_type, device)
    comm = Comm(world, ParallelConfig(flags.tp, flags.pp, world.rank), device)
    watchdog = Watchdog()
    for shape in flags.shapes:
        rows = measure_shape(flags, shape, world, comm, device, dtype, watchdog)
        if world.rank == 0:
            show(flags, shape, rows, device, dtype)
    comm.close()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["124M"], help="models (default: 124M)")
    add_flags(parser, ModelFlags, "ranks", ("tp", "pp"))
    add_flags(parser, EngineConfig, "engine", ("device", "data_type"))
    add_flags(parser, BenchmarkFlags, "load", ("threads", "batches", "input_len", "output_len", "repeats"))
    parser.add_argument("--bandwidth-gbs", type=float, default=0.0, help="the memory's measured read bandwidth")
    parser.add_argument("--compare-hf", action="store_true", help="also time Hugging Face generate (one rank)")
    return parser.parse_args()


def measure_shape(
    flags: argparse.Namespace,
    shape: str,
    world: World,
    comm: Comm,
    device: torch.device,
    dtype: torch.dtype,
    watchdog: Watchdog,
) -> list[dict[str, float]]:
    """Time every batch size of one shape; rank 0 gets the rows, the others an empty list."""
    config = model_config(shape, flags.tp)
    reader = RandomReader(config, comm.parallel.tp_rank, dtype, device)
    limits = EngineConfig(
        max_batch_size=max(flags.batches), max_seq_len=flags.input_len + flags.output_len, step_timeout_s=_TIMEOUT_S
    )
    executor = TorchExecutor(reader, limits, comm, device, world.local_size)
    executor.prepare()
    if world.rank > 0:
        follow(world, executor, watchdog, _TIMEOUT_S)
        executor.close()
        return []
    rows = []
    hf_model = _hf_model(config, dtype, device) if flags.compare_hf else None
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (max(flags.batches), flags.input_len))
    engine = make_engine(executor, config, limits, world, watchdog)
    for batch in flags.batches:
        ours, theirs = [], []
        for _ in range(flags.repeats + 1):  # alternating, the first round warms both up
            ours.append(_time_engine(engine, prompts[:batch], flags.output_len))
            if hf_model is not None:
                theirs.append(_time_hf(hf_model, prompts[:batch], flags.output_len))
        first, total = np.median(ours[1:], axis=0)
        row = {"batch": batch, "first_token_ms": first * 1e3, "total_s": total}
        row["token_ms"] = (total - first) / (flags.output_len - 1) * 1e3
        row["tokens_per_s"] = batch * flags.output_len / total
        if theirs:
            row["hf_total_s"] = float(np.median(theirs[1:]))
            row["hf_tokens_per_s"] = batch * flags.output_len / row["hf_total_s"]
        rows.append(row)
    engine.stop(0.0)
    engine.run()
    executor.close()
    return rows


def _time_engine(engine: Engine, prompts: np.ndarray, output_len: int) -> tuple[float, float]:
    """Seconds to every request's first token, and to the last."""
    first_tokens: list[float] = []
    sampling = SamplingParams(output_len)

    def on_update(request: Request) -> None:
        if len(request.output_ids) == 1:
            first_tokens.append(time.perf_counter())

    requests = [Request(ids.tolist(), sampling, (), on_update) for ids in prompts]
    started = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while not all(request.is_finished for request in requests):
        engine.step()
    while engine.step():  # what was launched ahead
        pass
    return max(first_tokens) - started, time.perf_counter() - started


def _hf_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    hf_config = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_pos_seq_len,
        n_embd=config.hidden_size,
        n_layer=config.num_layer,
        n_head=config.head_num,
        bos_token_id=config.start_id,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(hf_config).to(dtype).to(device).eval()


@torch.inference_mode()
def _time_hf(model: torch.nn.Module, prompts: np.ndarray, output_len: int) -> float:
    input_ids = torch.as_tensor(prompts, device=model.device)
    mask = torch.ones_like(input_ids)
    started = time.perf_counter()
    out = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=output_len, min_new_tokens=output_len, do_sample=False
    )
    out.cpu()
    assert out.shape[1] == prompts.shape[1] + output_len
    return time.perf_counter() - started


def show(
    flags: argparse.Namespace, shape: str, rows: list[dict[str, float]], device: torch.device, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    print(f"{shape} {name} tp {flags.tp} pp {flags.pp}, {flags.input_len} in, {flags.output_len} out, greedy")
    print(f"{'batch':>6} {'first ms':>9} {'token ms':>9} {'tok/s':>9} {'HF tok/s':>9} {'ratio':>6} {'floor':>6}")
    config = model_config(shape, flags.tp)
    for row in rows:
        if flags.bandwidth_gbs:
            floor_ms = weight_bytes(config, dtype) / flags.tp / flags.bandwidth_gbs / 1e6
            row["share_of_bandwidth"] = floor_ms / row["token_ms"]
        if "hf_tokens_per_s" in row:
            row["ratio_to_hf"] = row["tokens_per_s"] / row["hf_tokens_per_s"]
        cells = (row.get("hf_tokens_per_s"), row.get("ratio_to_hf"), row.get("share_of_bandwidth"))
        optional = [f"{'-' if v is None else format(v, '.2f'):>{w}}" for v, w in zip(cells, (9, 6, 6), strict=True)]
        times = f"{row['first_token_ms']:>9.2f} {row['token_ms']:>9.3f} {row['tokens_per_s']:>9.1f}"
        print(f"{row['batch']:>6} {times} {' '.join(optional)}")
    threads = torch.get_num_threads() if device.type == "cpu" else None
    report(
        device,
        benchmark="latency",
        shape=shape,
        dtype=name,
        tp=flags.tp,
        pp=flags.pp,
        input_len=flags.input_len,
        output_len=flags.output_len,
        threads=threads,
        cores=os.cpu_count(),
        rows=rows,
    )


if __name__ == "__main__":
    main()
