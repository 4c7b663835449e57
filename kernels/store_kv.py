"""Writes new tokens' keys and values into the cache, the keys rotated, with one launch. Stateless."""

from __future__ import annotations

import torch

from kernels import dependent_launch, runs_on
from kernels.heads import CosSin, HeadLayout, rotated_heads
from kernels.layer_cache import LayerCache

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import cast_fp8
    from kernels.heads import load_rotated
except ImportError:  # a CPU-only torch comes without it
    triton = None

_BLOCK_ELEMENTS = 2048  # that a program stores at once


def reference(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    kv_locs: torch.Tensor,
    cos_sin: CosSin | None = None,
) -> None:
    """The same in plain torch, on any device."""
    _, key, value = rotated_heads(qkv, layout, cos_sin)
    cache.write(key, value, kv_locs)


def store_kv(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    kv_locs: torch.Tensor,
    cos_sin: CosSin | None = None,
) -> None:
    """`cache.write` of the keys and values of qkv, at kv_locs.

    qkv: [tokens, width] contiguous rows, not yet rotated, in `layout`; cache: contiguous; kv_locs: [tokens] int64;
    cos_sin: of the tokens' positions.
    """
    if not runs_on(qkv.device):
        return reference(qkv, layout, cache, kv_locs, cos_sin)
    keys, values, key_scales, value_scales = cache
    cosines, sines = (keys, keys) if cos_sin is None else cos_sin
    dims = triton.next_power_of_2(layout.head_dim)
    block_heads = min(triton.next_power_of_2(layout.kv_heads), max(1, _BLOCK_ELEMENTS // dims))
    _store_kv[(len(qkv), -(-layout.kv_heads // block_heads))](
        qkv,
        cosines,
        sines,
        keys,
        values,
        keys if key_scales is None else key_scales,
        values if value_scales is None else value_scales,
        kv_locs,
        qkv.stride(0),
        **layout.places(),
        kv_heads=layout.kv_heads,
        rotated_half=0 if cos_sin is None else cosines.shape[-1],
        is_fp8=key_scales is not None,
        head_dim=layout.head_dim,
        dims=dims,
        block_heads=block_heads,
        num_warps=4,
        **dependent_launch.options(qkv.device),
    )


if triton is not None:

    @triton.jit
    def _store_kv(
        qkv,
        cosines,  # [tokens, rotated_half] fp32
        sines,
        keys,
        values,
        key_scales,  # [kv_heads] fp32, of fp8
        value_scales,
        kv_locs,
        row_stride,
        group_stride: tl.constexpr,
        key_base: tl.constexpr,
        value_base: tl.constexpr,
        kv_heads: tl.constexpr,
        rotated_half: tl.constexpr,
        is_fp8: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        block_heads: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """Some KV heads of one token."""
        token = tl.program_id(0).to(tl.int64)
        heads = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
        d = tl.arange(0, dims)[None, :]
        is_element = (heads < kv_heads) & (d < head_dim)
        if pdl:
            start_dependents()
            wait_for_predecessors()
        places = (tl.load(kv_locs + token) * kv_heads + heads) * head_dim + d
        kv_at = qkv + token * row_stride + heads * group_stride * head_dim
        angles = token * rotated_half
        key = kv_at + key_base * head_dim
        k = load_rotated(key, cosines + angles, sines + angles, d, is_element, rotated_half)
        v = tl.load(kv_at + value_base * head_dim + d, mask=is_element, other=0.0)
        if is_fp8:
            is_head = heads < kv_heads
            k = cast_fp8(k, tl.load(key_scales + heads, mask=is_head, other=1.0))
            v = cast_fp8(v, tl.load(value_scales + heads, mask=is_head, other=1.0))
        tl.store(keys + places, k, mask=is_element)
        tl.store(values + places, v, mask=is_element)
