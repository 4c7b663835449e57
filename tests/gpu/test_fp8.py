"""The fp8 kernels on a GPU against their references, and the engine with fp8 weights and cache; -s prints figures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.plan import Chunk, NewSequences, Plan
from engine.request import SamplingParams
from executor.attention import alibi_slopes
from executor.quantization import quantize
from kernels import decode_attention, fp8_decode_attention, linear, prompt_attention, quantize_rows, store_kv, widen
from kernels.activation import ACTIVATIONS
from kernels.decode_attention import DecodeMetadata, make_workspace
from kernels.dependent_launch import has_dependent_launch
from kernels.fp8 import has_fp8, to_fp8
from kernels.heads import HeadLayout
from kernels.layer_cache import LayerCache
from kernels.prompt_attention import PromptMetadata, make_tiles
from tests.support.engines import finish, make_engine, prompts, request
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits

NUM_GPUS = torch.cuda.device_count()
HAS_FP8 = NUM_GPUS > 0 and has_fp8(torch.device("cuda", 0))
pytestmark = pytest.mark.skipif(not HAS_FP8, reason="no GPU with fp8 here")
FORMATS = ("--quantization", "fp8", "--kv-cache-dtype", "fp8")
HEADS = [
    (16, 16, 64, 0),
    (6, 2, 96, 0),
    (8, 1, 128, 64),
    (48, 48, 128, 0),
    (2, 2, 8, 2),
    (12, 4, 80, 10),
    (6, 6, 80, 32),
    (4, 4, 256, 0),
]


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def share_of_other_bytes(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((as_bytes(ours) != as_bytes(theirs)).float().mean())


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def row_errors(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(ours - exact, axis=1) / np.linalg.norm(exact, axis=1)


def random_cache(num_locs: int, kv_heads: int, head_dim: int) -> LayerCache:
    scales = [2.0 ** torch.randint(-8, -5, (kv_heads,), device="cuda") for _ in range(2)]
    parts = [torch.randn(num_locs, kv_heads, head_dim, device="cuda") for _ in range(2)]
    return LayerCache(*(to_fp8(part, scale[:, None]) for part, scale in zip(parts, scales, strict=True)), *scales)


def copy(cache: LayerCache) -> LayerCache:
    return LayerCache(*(part.clone() for part in cache))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "num_in"), [(1, 64), (33, 4096), (300, 24576), (7, 1000), (3, 53248)])
def test_quantized_rows_are_the_references(rows: int, num_in: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_in)
    for activation in ACTIVATIONS:
        x = torch.randn(rows, num_in * (2 if activation == "swiglu" else 1), device="cuda").to(dtype)
        x[-1] = 0
        if rows > 2 and dtype != torch.float16:
            x[0] *= 1e-37  # a scale whose inverse is beyond fp32
        values, scales = quantize_rows.quantize_rows(x, activation)
        expected, expected_scales = quantize_rows.reference(x, activation)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-5 if activation != "none" else 1e-6, atol=0)
        # A kernel's division, or exponential, may be off by a last bit.
        assert values.shape == (rows, num_in) and share_of_other_bytes(values, expected) < 1e-3, activation
        assert not as_bytes(values)[-1].any()


def test_nan_stays() -> None:
    """A sequence whose numbers are broken must not get finite ones."""
    x = torch.randn(3, 2 * 3 * 16, device="cuda").bfloat16()
    x[1, [7, 40, 90]] = float("nan")  # of a query, a key and a value
    assert torch.equal(quantize_rows.quantize_rows(x)[0].float().isnan(), x.isnan())
    cache, layout = random_cache(3, 2, 16), HeadLayout(2, 2, 16, False)
    store_kv.store_kv(x, layout, cache, torch.arange(3, device="cuda"))
    for part, expected in zip(cache[:2], layout.split(x)[1:], strict=True):
        assert torch.equal(part.float().isnan(), expected.isnan()) and part.float().isnan().any()


def test_widened_weights_are_the_references() -> None:
    weight = torch.randn(33, 5000, device="cuda")
    scales = weight.abs().amax(1) / 448
    values = to_fp8(weight, scales[:, None])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(widen.widen(values, scales, dtype), widen.reference(values, scales, dtype))


def test_quantizing_on_a_gpu_gives_the_same_numbers() -> None:
    weight = torch.randn(512, 300)
    here, there = (quantize(w, w.abs().amax(0), "fp8") for w in (weight, weight.cuda()))
    assert torch.equal(as_bytes(here.values), as_bytes(there.values.cpu()))
    assert torch.equal(here.scales, there.scales.cpu())


@pytest.mark.parametrize(
    ("num_in", "num_out"), [(64, 192), (4096, 1024), (1008, 48), (8192, 2048), (6144, 18432), (24576, 6144)]
)
def test_many_rows_multiply_fp8_with_fp8(num_in: int, num_out: int) -> None:
    """Beside the product of x as it is rounded; one row beside that of x itself (tests/gpu/test_linear.py)."""
    torch.manual_seed(num_in)
    weight = torch.randn(num_out, num_in, device="cuda")
    scales = weight.abs().amax(1) / 448
    values, scales = to_fp8(weight, scales[:, None]), scales * num_in**-0.5
    exact_weight = (values.double() * scales[:, None].double()).t()
    bias = torch.randn(num_out, device="cuda").bfloat16()
    workspace = linear.make_workspace(weight.device)
    few = (2, 8, 16, 17, 32) if has_dependent_launch(weight.device) else ()
    for rows in (*few, 33, 48, 64, 100, 256, 513):
        x = torch.randn(rows, num_in, device="cuda").bfloat16()
        x[0] *= 1000  # each row has a scale of its own
        rounded, row_scales = quantize_rows.reference(x)
        for b in (bias, None):
            ours = linear.linear(x, values, b, workspace, scales=scales)
            exact = (rounded.double() * row_scales.double()) @ exact_weight + (0 if b is None else b.double())
            errors = torch.linalg.vector_norm(ours.double() - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
            assert ours.dtype == torch.bfloat16 and errors.max() < 8e-3 and not workspace.any(), rows
            assert torch.equal(ours, linear.linear(x, values, b, workspace, scales=scales)), rows
        for activation in ("gelu_tanh", "swiglu"):
            raw = torch.randn(rows, num_in * (2 if activation == "swiglu" else 1), device="cuda").bfloat16()
            assert linear.rounds_rows(rows, values, raw.dtype)
            rounded, row_scales = quantize_rows.quantize_rows(raw, activation)  # an exponential's last bit may differ
            ours = linear.linear(raw, values, bias, workspace, scales=scales, input_activation=activation)
            exact = (rounded.double() * row_scales.double()) @ exact_weight + bias.double()
            errors = torch.linalg.vector_norm(ours.double() - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
            assert errors.max() < 8e-3, (rows, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "half"), HEADS)
@pytest.mark.parametrize(("window", "is_stored"), [(0, False), (70, False), (0, True), (70, True)])
@pytest.mark.parametrize("lens", [[1], [2000], [1, 2, 31, 32, 33, 700, 1500], [77] * 40], ids=str)
def test_decode_attention(
    lens: list[int],
    window: int,
    is_stored: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    dtype: torch.dtype,
) -> None:
    """is_stored: as in a step with drafts, where all keys and values are stored first."""
    torch.manual_seed(0)
    rows = len(lens)
    layout = HeadLayout(heads, kv_heads, head_dim, kv_heads != heads)
    cache = random_cache(rows * 2000, kv_heads, head_dim)
    table = torch.randperm(rows * 2000, device="cuda").int().view(rows, 2000)
    positions = torch.tensor(lens, device="cuda") - 1
    slots = torch.arange(rows, device="cuda")
    kv_locs = table[slots, positions].long() if is_stored else None
    decodes = DecodeMetadata(table, slots, positions, make_workspace(rows, heads, table.device), kv_locs)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    angles = torch.randn(rows, 1, half, device="cuda")
    cos_sin = (angles.cos(), angles.sin()) if half else None
    slopes = alibi_slopes(heads).cuda() if heads == 6 else None
    kept, expected_cache = copy(cache), copy(cache)
    for _ in range(2):  # the workspace is zeros again
        ours = decode_attention.decode_attention(qkv, layout, kept, decodes, slopes, cos_sin, window)
    expected = decode_attention.reference(qkv, layout, expected_cache, decodes, slopes, cos_sin, window)
    for part, theirs in zip(kept[:2], expected_cache[:2], strict=True):
        assert share_of_other_bytes(part, theirs) < 1e-4  # a rotated key may be off by a last bit
    # What is compared reads the kernel's own numbers: no rounding to the other side counts.
    expected = _expected(qkv, layout, kept, decodes, slopes, cos_sin, window)
    assert relative_error(ours, expected) < {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


def _expected(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    decodes: DecodeMetadata,
    slopes: torch.Tensor | None,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    window: int,
) -> torch.Tensor:
    """Attention over a cache that has the new tokens already."""
    tiles = [(row, 1, row, int(position)) for row, position in enumerate(decodes.positions)]
    prompts = PromptMetadata(decodes.table, torch.tensor(tiles, device="cuda"))
    return prompt_attention.reference(qkv, layout, cache, prompts, slopes, cos_sin, window)


def test_queries_that_fp16_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones, and broken ones: only their own rows are broken. The kernel for fp8 is taken."""
    torch.manual_seed(0)
    heads, head_dim, rows = 3, 64, 4
    layout, cache = HeadLayout(heads, heads, head_dim, False), random_cache(400, heads, head_dim)
    table, positions = torch.arange(400, device="cuda").int().view(rows, 100), torch.tensor([99, 40, 70, 0]).cuda()
    slots, workspace = torch.arange(rows).cuda(), make_workspace(rows, heads, table.device)
    qkv = torch.randn(rows, 3 * heads * head_dim, device="cuda").bfloat16()
    qkv[0, : heads * head_dim] *= 1e6
    qkv[1, 7] = float("nan")
    qkv[2, head_dim + 5] = float("inf")
    launched = []
    launch = fp8_decode_attention.fp8_launch
    monkeypatch.setattr(decode_attention, "fp8_launch", lambda layout: launched.append(layout) or launch(layout))
    decodes = DecodeMetadata(table, slots, positions, workspace)
    ours = decode_attention.decode_attention(qkv, layout, cache, decodes)
    assert len(launched) == 1
    _only_the_broken_are_broken(ours, decode_attention.reference(qkv, layout, cache, decodes), head_dim)
    # The same rows as one piece of a prompt, a tile.
    prompts = PromptMetadata(table, torch.tensor(make_tiles([(0, 90, rows)])).cuda())
    store_kv.store_kv(qkv, layout, cache, table[0, 90 : 90 + rows].long())
    ours = prompt_attention.prompt_attention(qkv, layout, cache, prompts)
    _only_the_broken_are_broken(ours, prompt_attention.reference(qkv.float(), layout, cache, prompts), head_dim)


def _only_the_broken_are_broken(ours: torch.Tensor, expected: torch.Tensor, head_dim: int) -> None:
    is_broken = torch.zeros_like(expected, dtype=torch.bool)
    is_broken[1, :head_dim] = True
    is_broken[2, head_dim : 2 * head_dim] = True
    assert torch.equal(ours.isnan(), is_broken) and torch.equal(expected.isnan(), is_broken)
    assert relative_error(ours[~is_broken], expected[~is_broken]) < 1.2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "half"), HEADS)
@pytest.mark.parametrize("window", [0, 70])
def test_store_and_prompt_attention(
    window: int, heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pieces = [(3, 0, 70), (0, 5, 1), (1, 0, 1), (2, 40, 100), (4, 1300, 3), (6, 2000, 64)]
    rows = sum(length for *_, length in pieces)
    layout = HeadLayout(heads, kv_heads, head_dim, heads != kv_heads)
    cache = random_cache(7 * 2100, kv_heads, head_dim)
    table = torch.randperm(7 * 2100, device="cuda").view(7, 2100).int()
    qkv = 3 * torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)  # some saturate
    angles = torch.randn(rows, 1, half, device="cuda")
    cos_sin = (angles.cos(), angles.sin()) if half else None
    slopes = torch.rand(heads, device="cuda") if heads == 6 else None
    kv_locs = torch.cat([table[slot, start : start + length] for slot, start, length in pieces]).long()
    expected_cache = copy(cache)
    store_kv.store_kv(qkv, layout, cache, kv_locs, cos_sin)
    store_kv.reference(qkv, layout, expected_cache, kv_locs, cos_sin)
    for part, theirs in zip(cache[:2], expected_cache[:2], strict=True):
        assert share_of_other_bytes(part, theirs) < 1e-4
        assert not part.float().isnan().any()
    prompts = PromptMetadata(table, torch.tensor(make_tiles(pieces, 50)).cuda())
    arguments = layout, cache, prompts, slopes, cos_sin, window
    ours = prompt_attention.prompt_attention(qkv, *arguments)
    expected = prompt_attention.reference(qkv.float(), *arguments)
    assert relative_error(ours, expected) < {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert torch.equal(ours, prompt_attention.prompt_attention(qkv, *arguments))


# --- the engine ---


@pytest.mark.parametrize("tp", [1, 2])
def test_engine_in_fp8(tp: int, converted: Callable[[int], Path]) -> None:
    """The kernels beside fp32 on a CPU, the same fp8 weights in both; fp32 gives nearly its tokens.

    fp16 rounds no activations of so few rows, nor does a CPU. bf16 does, and a CPU that does is 4 to 9 % off, too.
    From plain fp32, each row in fp16 is as far as the formats alone take it on a CPU, up to 11 %.
    """
    if tp > NUM_GPUS:
        pytest.skip(f"{tp} GPUs needed, {NUM_GPUS} here")
    plain, on_cpu = (run_logits(converted(1), prompts(6), 1, 1, *formats) for formats in ((), FORMATS))
    of_formats = row_errors(on_cpu, plain)
    for data_type, limits in (("fp16", (2e-2, of_formats + 1e-2)), ("bf16", (1.5e-1, 2e-1))):
        ours = run_logits(converted(tp), prompts(6), tp, 1, "--device", "cuda", "--data-type", data_type, *FORMATS)
        for expected, limit in zip((on_cpu, plain), limits, strict=True):
            errors = row_errors(ours, expected)
            print("logit error", data_type, errors)
            assert (errors < limit).all(), data_type
    items = greedy_items(prompts(6), 16)
    for formats, least in ((FORMATS[:2], 6), (FORMATS, 4)):  # a cache's numbers may fall to a rounding's other side
        expected_tokens = first_outputs(run_engine(converted(1), items, 1, 1, *formats))
        flags = ("--device", "cuda", "--data-type", "fp32", *formats)
        tokens = first_outputs(run_engine(converted(tp), items, tp, 1, *flags))
        assert sum(map(list.__eq__, tokens, expected_tokens)) >= least, formats


def test_graphs_give_the_tokens_of_single_launches(
    converted: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """200 steps of 48 sequences, a graph's size: above the rows from which activations are rounded."""
    settings = dict(device="cuda", data_type="bf16", quantization="fp8", kv_cache_dtype="fp8", max_batch_size=48)
    outputs = []
    with caplog.at_level(logging.INFO, logger="engine"):
        for enforce_eager in (False, True):
            engine = make_engine(converted(1), enforce_eager=enforce_eager, **settings)
            sampling = SamplingParams(200, min_length=200)
            outputs.append(finish(engine, [request(ids, sampling) for ids in prompts(48, longest=20)]))
            engine.executor.close()
    same = sum(map(list.__eq__, *outputs))
    print("the same tokens:", same, "of 48")
    assert same >= 40  # a graph of prompts has more rows, and their sums another order
    assert "fp8 weights: relative error of the logits" in caplog.text
    assert "fp8 key-value cache: relative error of the logits" in caplog.text


def test_replays_give_the_same_logits_every_time(converted: Callable[[int], Path]) -> None:
    engine = make_engine(
        converted(1), device="cuda", data_type="bf16", quantization="fp8", kv_cache_dtype="fp8", max_batch_size=4
    )
    executor, text = engine.executor, prompts(1, longest=60)[0] + prompts(2, longest=60)[1]
    blocks = list(range(-(-len(text) // executor.cache.block_size)))
    new = [NewSequences([0], text, SamplingParams(1), (), [blocks])]
    first = None
    with torch.inference_mode():
        for _ in range(200):
            hidden = executor.hidden(Plan(chunks=[Chunk(0, 0, len(text), [0])], new_sequences=new))
            logits = executor.model.logits(hidden[-1:])
            first = logits.clone() if first is None else first
            assert torch.equal(first, logits)
    executor.close()
