"""The int8 kernels on a GPU against plain torch, and the engine that uses them; figures are printed with -s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from executor.quantization import quantize
from kernels import linear, widen
from tests.support.engines import prompts
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here")
# [in, out] of the four matrices at hidden 4096 (6.7B) and 6144 (20B)
DECODE_SHAPES = [(h, f * h) if f > 0 else (-f * h, h) for h in (4096, 6144) for f in (3, 1, 4, -4)]


def random_int8(num_in: int, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-128, 128, (num_out, num_in), dtype=torch.int8, device="cuda")
    return weight, torch.rand(num_out, device="cuda") / 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widened_weights_are_the_references(dtype: torch.dtype) -> None:
    for num_in, num_out in ((64, 48), (5000, 33)):
        weight, scales = random_int8(num_in, num_out)
        assert torch.equal(widen.widen(weight, scales, dtype), widen.reference(weight, scales, dtype))


def test_quantizing_on_a_gpu_gives_the_same_numbers() -> None:
    weight = torch.randn(512, 300)
    here, there = (quantize(w, w.abs().amax(0), "int8") for w in (weight, weight.cuda()))
    assert torch.equal(here.values, there.values.cpu()) and torch.equal(here.scales, there.scales.cpu())


@pytest.mark.parametrize("tp", [1, 2])
def test_engine_in_int8(tp: int, converted: Callable[[int], Path]) -> None:
    """bf16 through the kernels beside fp32 on a CPU, the same int8 weights in both; fp32 gives the CPU's tokens."""
    if tp > NUM_GPUS:
        pytest.skip(f"{tp} GPUs needed, {NUM_GPUS} here")
    on_cpu = run_logits(converted(1), prompts(6), 1, 1, "--int8-mode", "1")
    flags = ("--device", "cuda", "--int8-mode", "1")
    ours = run_logits(converted(tp), prompts(6), tp, 1, *flags, "--data-type", "bf16")
    errors = np.linalg.norm(ours - on_cpu, axis=1) / np.linalg.norm(on_cpu, axis=1)
    print("logit error", errors.max())
    assert errors.max() < 3e-2
    items = greedy_items(prompts(6), 16)
    expected = first_outputs(run_engine(converted(1), items, 1, 1, "--int8-mode", "1"))
    assert first_outputs(run_engine(converted(tp), items, tp, 1, *flags, "--data-type", "fp32")) == expected


def replayed_us(run: Callable[[], object], calls: int) -> float:
    """Microseconds of one call, in a CUDA graph of them."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return min(times)


def test_figures() -> None:
    """Times beside cuBLAS in bf16, over weights that no cache holds; decode must gain by int8."""
    print(f"\n{'rows':>5} {'in × out':>14} {'int8 µs':>9} {'TB/s':>6} {'bf16 µs':>9} {'ratio':>6}")
    for rows in (1, 8, 32, 64, 256, 512):
        for num_in, num_out in DECODE_SHAPES:
            copies = max(2, -(-200_000_000 // (num_in * num_out)))
            weights = [random_int8(num_in, num_out)[0] for _ in range(copies)]
            wides = [weight.bfloat16() for weight in weights]
            scales = torch.rand(num_out, device="cuda")
            bias = torch.zeros(num_out, device="cuda", dtype=torch.bfloat16)
            workspace = linear.make_workspace(bias.device)
            x = torch.randn(rows, num_in, device="cuda", dtype=torch.bfloat16)
            ours, theirs = (
                replayed_us(lambda run=run: run(), copies)
                for run in (
                    lambda: [linear.linear(x, w, bias, workspace, scales=scales) for w in weights],  # noqa: B023
                    lambda: [torch.nn.functional.linear(x, w, bias) for w in wides],  # noqa: B023
                )
            )
            rate = num_in * num_out / ours / 1e6
            shape = f"{num_in}×{num_out}"
            print(f"{rows:>5} {shape:>14} {ours:>9.1f} {rate:>6.2f} {theirs:>9.1f} {theirs / ours:>6.2f}")
            if rows <= 8 and num_out > num_in:
                assert theirs / ours > 1.2
