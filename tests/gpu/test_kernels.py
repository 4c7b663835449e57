"""The small kernels of the GPU's forward pass against their references in plain torch, in fp64 where sums matter."""

from __future__ import annotations

import pytest
import torch

from kernels import add_norm, store_kv

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
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 16, 64), (37, 3, 96), (5, 48, 128)])
def test_store_kv(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(tokens, heads, 3, head_dim, device="cuda", generator=generator).to(dtype)
    kv_locs = torch.randperm(200, device="cuda", generator=generator)[:tokens]
    ours, theirs = ([torch.zeros(200, heads, head_dim, dtype=dtype, device="cuda") for _ in range(2)] for _ in range(2))
    store_kv.store_kv(qkv[:, :, 1], qkv[:, :, 2], *ours, kv_locs)
    store_kv.reference(qkv[:, :, 1], qkv[:, :, 2], *theirs, kv_locs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
