"""x + delta and its LayerNorm or RMSNorm in one pass, where torch takes two kernels.

What it must not know: what is added, and where in the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None


def reference(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, on any device."""
    if delta is not None:
        x = x + delta
    if bias is None:
        return x, F.rms_norm(x, weight.shape, weight, eps)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its norm over the last axis): LayerNorm with a bias, RMSNorm without.

    x, delta: [rows, hidden]; weight, bias: [hidden], all of one dtype. Sums are in fp32; the norm is that of the sum
    as it is stored.
    """
    if not runs_on(x.device):
        return reference(x, delta, weight, bias, eps)
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    _kernel[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        weight if bias is None else bias,
        total,
        normed,
        eps,
        delta is not None,
        bias is not None,
        hidden,
        block,
        num_warps=max(4, min(16, block // 512)),
    )
    return total, normed


if triton is not None:

    @triton.jit
    def _kernel(
        x,
        delta,
        weight,
        bias,
        total,
        normed,
        eps,
        has_delta: tl.constexpr,
        has_bias: tl.constexpr,
        hidden: tl.constexpr,
        block: tl.constexpr,
    ):
        """One row."""
        offsets = tl.arange(0, block)
        is_element = offsets < hidden
        places = tl.program_id(0).to(tl.int64) * hidden + offsets
        w = tl.load(weight + offsets, mask=is_element, other=0.0).to(tl.float32)
        values = tl.load(x + places, mask=is_element, other=0.0).to(tl.float32)
        if has_delta:
            values += tl.load(delta + places, mask=is_element, other=0.0).to(tl.float32)
            stored = values.to(total.dtype.element_ty)
            tl.store(total + places, stored, mask=is_element)
            values = stored.to(tl.float32)
        if has_bias:
            values = tl.where(is_element, values - tl.sum(values, 0) / hidden, 0.0)
        variance = tl.sum(values * values, 0) / hidden
        values = values * tl.rsqrt(variance + eps) * w
        if has_bias:
            values += tl.load(bias + offsets, mask=is_element, other=0.0).to(tl.float32)
        tl.store(normed + places, values.to(normed.dtype.element_ty), mask=is_element)
