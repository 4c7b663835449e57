"""The small kernels of the GPU's forward pass against their references in plain torch, in fp64 where sums matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import add_norm, embed, head_norm, prompt_attention, store_kv
from kernels.heads import HeadLayout
from kernels.layer_cache import LayerCache
from kernels.prompt_attention import PromptMetadata, make_tiles

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("has_bias", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1024), (7, 6144), (300, 96), (2, 12288)])
def test_add_norm(rows: int, hidden: int, dtype: torch.dtype, has_delta: bool, has_bias: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x, delta = (torch.randn(rows, hidden, device="cuda", generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(hidden, device="cuda", generator=generator).to(dtype) for _ in range(2))
    arguments = (x + 3, delta if has_delta else None, weight, bias if has_bias else None)
    total, normed = add_norm.add_norm(*arguments, 1e-5)
    expected_total = add_norm.reference(*arguments, 1e-5)[0]
    assert torch.equal(total, expected_total)
    wide = [total.double(), None, weight.double(), bias.double() if has_bias else None]
    expected = add_norm.reference(*wide, 1e-5)[1]
    assert ((normed - expected).norm() / expected.norm()).item() < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("half", [0, 16])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"), [(1, 16, 16, 64), (37, 6, 3, 96), (5, 48, 48, 128)]
)
def test_store_kv(tokens: int, heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    layout = HeadLayout(heads, kv_heads, head_dim, heads != kv_heads)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda", generator=generator).to(dtype)
    kv_locs = torch.randperm(200, device="cuda", generator=generator)[:tokens]
    angles = torch.randn(tokens, 1, half, device="cuda", generator=generator)
    cos_sin = (angles.cos(), angles.sin()) if half else None
    shape = (200, kv_heads, head_dim)
    ours, theirs = ([torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(2)] for _ in range(2))
    store_kv.store_kv(qkv, layout, LayerCache(*ours), kv_locs, cos_sin)
    store_kv.reference(qkv, layout, LayerCache(*theirs), kv_locs, cos_sin)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], rtol=LIMITS[dtype], atol=LIMITS[dtype])
    assert half or torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("has_bias", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"), [(1, 16, 16, 64), (37, 6, 3, 80), (300, 40, 8, 128), (5, 5, 1, 256)]
)
def test_head_norm(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    layout = HeadLayout(heads, kv_heads, head_dim, heads != kv_heads)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda", generator=generator).to(dtype)
    scales = [torch.randn(head_dim, device="cuda", generator=generator).to(dtype) for _ in range(2)]
    biases = [torch.randn(head_dim, device="cuda", generator=generator).to(dtype) for _ in range(2)]
    norms = head_norm.HeadNorms(*scales, *(biases if has_bias else (None, None)), 1e-6)
    ours = head_norm.head_norm(qkv.clone(), layout, norms)
    wide = head_norm.HeadNorms(*(part.double() if isinstance(part, torch.Tensor) else part for part in norms))
    expected = head_norm.reference(qkv.double(), layout, wide)
    assert ((ours - expected).norm() / expected.norm()).item() < LIMITS[dtype]
    assert torch.equal(layout.split(ours)[2], layout.split(qkv)[2])  # values stay


PIECES = [
    [(3, 0, 1)],
    [(2, 0, 128)],
    [(3, 0, 70), (0, 5, 1), (1, 0, 1), (2, 40, 100), (4, 1300, 3), (6, 2000, 64)],
    [(slot, 100 + slot, 1) for slot in range(7)],
]
LAYOUTS = [
    (16, 16, 64, False, 0),
    (6, 2, 96, True, 0),
    (8, 1, 128, False, 64),
    (2, 2, 8, False, 2),
    (12, 4, 80, False, 10),
    (4, 4, 256, False, 32),
]
LEAST_SHARED_MEMORY = 99 << 10  # bytes that a program may have on GPUs of compute capability 8.6, 8.9 and 12.0


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "has_slopes", "half", "window"),
    [(*layout, 0) for layout in LAYOUTS] + [(*layout, window) for layout in LAYOUTS[:2] for window in (1, 70, 1024)],
)
@pytest.mark.parametrize("pieces", PIECES, ids=len)
def test_prompt_attention(
    pieces: list[tuple[int, int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    has_slopes: bool,
    half: int,
    window: int,
    dtype: torch.dtype,
) -> None:
    """First pieces, later ones and single tokens, beside the reference in fp64; tiles of padding change nothing."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = sum(length for *_, length in pieces)
    layout = HeadLayout(heads, kv_heads, head_dim, heads != kv_heads)
    table = torch.randperm(7 * 2100, device="cuda", generator=generator).view(7, 2100).int()
    shape = (7 * 2100, kv_heads, head_dim)
    keys, values = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda", generator=generator).to(dtype)
    angles = torch.randn(rows, 1, half, device="cuda", generator=generator)
    cos_sin = (angles.cos(), angles.sin()) if half else None
    slopes = torch.rand(heads, device="cuda", generator=generator) if has_slopes else None
    prompts = PromptMetadata(table, torch.tensor(make_tiles(pieces, 50)).cuda())
    cache, wide_cache = LayerCache(keys, values), LayerCache(*wide(keys, values))
    ours = prompt_attention.prompt_attention(qkv, layout, cache, prompts, slopes, cos_sin, window)
    expected = prompt_attention.reference(*wide(qkv), layout, wide_cache, prompts, slopes, cos_sin, window)
    error = ((ours - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    again = prompt_attention.prompt_attention(qkv, layout, cache, prompts, slopes, cos_sin, window)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("head_dim", [64, 128, 160, 256])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_prompt_attention_fits_every_gpus_shared_memory(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that does not fit is refused when it is launched: no server of such a model would start."""
    kernel = prompt_attention._prompt_attention
    shared: list[int] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: shared.append(kernel[grid](*args, **options).metadata.shared)

    monkeypatch.setattr(prompt_attention, "_prompt_attention", Recorder())
    qkv = torch.zeros(5, 3 * 2 * head_dim, dtype=dtype, device="cuda")
    cache = LayerCache(*torch.zeros(2, 8, 2, head_dim, dtype=dtype, device="cuda"))
    prompts = PromptMetadata(torch.arange(8, device="cuda").int()[None], torch.tensor(make_tiles([(0, 0, 5)])).cuda())
    prompt_attention.prompt_attention(qkv, HeadLayout(2, 2, head_dim, False), cache, prompts)
    assert 0 < shared[0] <= LEAST_SHARED_MEMORY


def wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1024), (37, 96), (300, 6144)])
def test_embed(tokens: int, hidden: int, has_positions: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    rows, position_rows = (torch.randn(n, hidden, device="cuda", generator=generator).to(dtype) for n in (5003, 70))
    token_ids = torch.randint(0, 5003, (9, 64), device="cuda", generator=generator)
    slots, positions = (torch.randint(0, n, (tokens,), device="cuda", generator=generator) for n in (9, 64))
    arguments = (token_ids, slots, positions, rows, position_rows if has_positions else None)
    assert torch.equal(embed.embed(*arguments), embed.reference(*arguments))
