"""The norm of each head of the queries and of the keys, in place, with one launch. Stateless."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import dependent_launch, runs_on
from kernels.heads import HeadLayout

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
except ImportError:  # a CPU-only torch comes without it
    triton = None

_BLOCK_ELEMENTS = 1024  # that a program normalizes at once


class HeadNorms(NamedTuple):
    """Scales and biases, [head_dim] each, the same for all heads: RMSNorm without biases, LayerNorm with them."""

    query: torch.Tensor
    key: torch.Tensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    eps: float


def reference(qkv: torch.Tensor, layout: HeadLayout, norms: HeadNorms) -> torch.Tensor:
    """The same in plain torch, on any device."""
    query, key = layout.query_and_key(qkv)
    for heads, weight, bias in ((query, norms.query, norms.query_bias), (key, norms.key, norms.key_bias)):
        if bias is None:
            heads.copy_(F.rms_norm(heads, weight.shape, weight, norms.eps))
        else:
            heads.copy_(F.layer_norm(heads, weight.shape, weight, bias, norms.eps))
    return qkv


def head_norm(qkv: torch.Tensor, layout: HeadLayout, norms: HeadNorms) -> torch.Tensor:
    """Normalizes the queries and keys in `qkv` over each head, and returns it. Sums are in fp32.

    qkv: [tokens, width] contiguous rows, not yet rotated, in `layout`, of the norms' dtype.
    """
    if not runs_on(qkv.device):
        return reference(qkv, layout, norms)
    dims = triton.next_power_of_2(layout.head_dim)
    num_heads = layout.heads + layout.kv_heads
    block_heads = min(triton.next_power_of_2(num_heads), max(1, _BLOCK_ELEMENTS // dims))
    places = layout.places()
    has_bias = norms.query_bias is not None
    _head_norm[(len(qkv), -(-num_heads // block_heads))](
        qkv,
        norms.query,
        norms.key,
        norms.query_bias if has_bias else norms.query,
        norms.key_bias if has_bias else norms.key,
        norms.eps,
        qkv.stride(0),
        group_stride=places["group_stride"],
        key_base=places["key_base"],
        heads=layout.heads,
        num_heads=num_heads,
        group=layout.group,
        has_bias=has_bias,
        head_dim=layout.head_dim,
        dims=dims,
        block_heads=block_heads,
        num_warps=4,
        **dependent_launch.options(qkv.device),
    )
    return qkv


if triton is not None:

    @triton.jit
    def _head_norm(
        qkv,
        query_weight,
        key_weight,
        query_bias,
        key_bias,
        eps,
        row_stride,
        group_stride: tl.constexpr,
        key_base: tl.constexpr,
        heads: tl.constexpr,
        num_heads: tl.constexpr,
        group: tl.constexpr,
        has_bias: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        block_heads: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """Some heads of one token: the queries are numbered first, then the keys."""
        number = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
        d = tl.arange(0, dims)[None, :]
        is_element = (number < num_heads) & (d < head_dim)
        is_query = number < heads
        query_place = (number // group) * group_stride + number % group
        place = tl.where(is_query, query_place, (number - heads) * group_stride + key_base)
        at = qkv + tl.program_id(0).to(tl.int64) * row_stride + place * head_dim + d
        if pdl:
            start_dependents()
        weight = tl.load(query_weight + d, mask=is_element & is_query, other=0.0).to(tl.float32)
        weight += tl.load(key_weight + d, mask=is_element & (number >= heads), other=0.0).to(tl.float32)
        if pdl:
            wait_for_predecessors()
        x = tl.load(at, mask=is_element, other=0.0).to(tl.float32)
        if has_bias:
            x = tl.where(is_element, x - tl.sum(x, 1)[:, None] / head_dim, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 1)[:, None] / head_dim + eps) * weight
        if has_bias:
            x += tl.load(query_bias + d, mask=is_element & is_query, other=0.0).to(tl.float32)
            x += tl.load(key_bias + d, mask=is_element & (number >= heads), other=0.0).to(tl.float32)
        tl.store(at, x.to(qkv.dtype.element_ty), mask=is_element)
