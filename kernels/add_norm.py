"""residual + hidden and the LayerNorm or RMSNorm of the sum, fused; torch needs two kernels. Stateless."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import dependent_launch, runs_on

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
except ImportError:  # a CPU-only torch comes without it
    triton = None


def reference(
    residual: torch.Tensor, hidden: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, on any device."""
    if hidden is not None:
        residual = residual + hidden
    if bias is None:
        return residual, F.rms_norm(residual, weight.shape, weight, eps)
    return residual, F.layer_norm(residual, weight.shape, weight, bias, eps)


def add_norm(
    residual: torch.Tensor, hidden: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + hidden, its norm over the last axis): LayerNorm with a bias, RMSNorm without.

    residual, hidden: [rows, hidden_size]; weight, bias: [hidden_size], all of one dtype. Without hidden nothing is
    added. Sums are in fp32. The norm is computed from the sum as it is stored.
    """
    if not runs_on(residual.device):
        return reference(residual, hidden, weight, bias, eps)
    rows, hidden_size = residual.shape
    normed = torch.empty_like(residual)
    total = residual if hidden is None else torch.empty_like(residual)
    block = triton.next_power_of_2(hidden_size)
    _add_norm[(rows,)](
        residual,
        residual if hidden is None else hidden,
        weight,
        weight if bias is None else bias,
        total,
        normed,
        eps,
        hidden is not None,
        bias is not None,
        hidden_size,
        block,
        num_warps=max(4, min(16, block // 512)),
        **dependent_launch.options(residual.device),
    )
    return total, normed


if triton is not None:

    @triton.jit
    def normalize(values, w, b, is_element, eps, has_bias: tl.constexpr, hidden_size: tl.constexpr):
        """The norm of a row, fp32, 0 beyond its elements; b counts with has_bias only."""
        if has_bias:
            values = tl.where(is_element, values - tl.sum(values, 0) / hidden_size, 0.0)
        variance = tl.sum(values * values, 0) / hidden_size
        values = values * tl.rsqrt(variance + eps) * w
        return values + b if has_bias else values

    @triton.jit
    def _add_norm(
        residual,  # [rows, hidden_size]
        hidden,  # as residual
        weight,
        bias,
        total,
        normed,
        eps,
        has_hidden: tl.constexpr,
        has_bias: tl.constexpr,
        hidden_size: tl.constexpr,
        block: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One row."""
        offsets = tl.arange(0, block)
        is_element = offsets < hidden_size
        places = tl.program_id(0).to(tl.int64) * hidden_size + offsets
        if pdl:
            start_dependents()
        w = tl.load(weight + offsets, mask=is_element, other=0.0).to(tl.float32)
        b = w
        if has_bias:
            b = tl.load(bias + offsets, mask=is_element, other=0.0).to(tl.float32)
        if pdl:
            wait_for_predecessors()
        values = tl.load(residual + places, mask=is_element, other=0.0).to(tl.float32)
        if has_hidden:
            values += tl.load(hidden + places, mask=is_element, other=0.0).to(tl.float32)
            stored = values.to(total.dtype.element_ty)
            tl.store(total + places, stored, mask=is_element)
            values = stored.to(tl.float32)
        y = normalize(values, w, b, is_element, eps, has_bias, hidden_size)
        tl.store(normed + places, y.to(normed.dtype.element_ty), mask=is_element)
