"""Kernels compiled in threads, before they are launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import embed, store_kv
from kernels.compile_ahead import AsyncCompileMode, compile_ahead
from kernels.heads import HeadLayout
from kernels.layer_cache import LayerCache

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(AsyncCompileMode is None, reason="Triton before 3.4"),
]
DEVICE = torch.device("cuda", 0)


def test_kernels_are_compiled_once_and_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they were compiled before or not."""
    import triton

    compiled: list[str] = []

    def count(**known: Any) -> None:
        compiled.append(known["fn"].name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", count)
    layout = HeadLayout(3, 3, 40, False)  # of no model
    qkv = torch.randn(5, 9 * 40, device="cuda")
    kv_locs = torch.arange(5, device="cuda")
    keys, values = torch.zeros(2, 8, 3, 40, device="cuda")
    cache = LayerCache(keys, values)
    with compile_ahead(DEVICE):
        store_kv.store_kv(qkv, layout, cache, kv_locs, None)
    assert len(compiled) == 1
    with compile_ahead(DEVICE):
        store_kv.store_kv(qkv, layout, cache, kv_locs, None)
    assert not keys.any() and not values.any()
    store_kv.store_kv(qkv, layout, cache, kv_locs, None)
    assert len(compiled) == 1
    expected = torch.zeros(2, 8, 3, 40, device="cuda")
    store_kv.reference(qkv, layout, LayerCache(*expected), kv_locs, None)
    assert torch.equal(torch.stack([keys, values]), expected)


def test_kernels_are_launched_again_after_an_error() -> None:
    token_ids, slots = torch.zeros(1, 4, dtype=torch.int64, device="cuda"), torch.zeros(2, dtype=torch.int64).cuda()
    positions, rows = torch.tensor([0, 1]).cuda(), torch.ones(3, 8).cuda()
    with pytest.raises(ZeroDivisionError), compile_ahead(DEVICE):
        embed.embed(token_ids, slots, positions, rows, None)
        raise ZeroDivisionError
    assert torch.equal(embed.embed(token_ids, slots, positions, rows, None), torch.ones(2, 8).cuda())
