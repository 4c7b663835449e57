"""y = x · (W · scale)ᵀ + b with W in int8: weights are read as bytes and widened in registers.

Made for the few rows of a decode step, whose time is the time to read the weights. Stateless; it does not depend on
the quantization scheme.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import int8_widen, runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

_SPLIT_COUNTERS = 4096  # output tiles that may be split; a launch has fewer
_FEW_ROWS = 256  # beyond, on an H200, widening the weights and cuBLAS are quicker


def make_workspace(device: torch.device) -> torch.Tensor:
    """The split-k workspace of one linear: a count of finished splits per output tile, int32.

    It is zeros before a call, and the call leaves it zeros.
    """
    return torch.zeros(_SPLIT_COUNTERS, dtype=torch.int32, device=device)


def reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain torch, on any device: by widening the weights, in x's dtype."""
    return F.linear(x, int8_widen.reference(weight, scales, x.dtype), bias)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """x [rows, in] bf16 or fp16, weight [out, in] int8, scales [out] fp32, bias [out] as x → [rows, out] as x.

    workspace: of `make_workspace`, on x's device; two calls at once must not share one. Raises ValueError where shapes
    or dtypes do not fit. Sums are in fp32 and their order is fixed. Without Triton
    or a GPU, or with another dtype, it calls the reference.
    """
    _check(x, weight, scales, bias)
    if not runs_on(x.device) or x.dtype not in (torch.bfloat16, torch.float16):
        return reference(x, weight, scales, bias)
    if not 0 < len(x) <= _FEW_ROWS:
        return F.linear(x, int8_widen.int8_widen(weight, scales, x.dtype), bias)
    return launch(x.contiguous(), weight, scales, bias, workspace, plan(len(x), *weight.shape))


def _check(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)} and weight {list(weight.shape)}; they must be [rows, in] and [out, in]")
    if weight.dtype != torch.int8 or not weight.is_contiguous():
        raise ValueError(f"weight is {weight.dtype} with strides {weight.stride()}; it must be int8 and contiguous")
    if scales.shape != weight.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}; they must be fp32 [{weight.shape[0]}]")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; it must be {x.dtype} [{weight.shape[0]}]")


class TilePlan(NamedTuple):
    """How a launch cuts its work into programs."""

    block_m: int  # rows of a tile
    block_n: int  # outs of a tile
    block_k: int  # ins that a program reads at once
    splits: int  # of the in axis
    warps: int
    stages: int  # of the pipeline


def plan(rows: int, num_out: int, num_in: int) -> TilePlan:
    """The plan for x [rows, num_in] and weight [num_out, num_in], as measured on an H200.

    `wanted` programs keep its 132 multiprocessors busy; with fewer tiles the in axis is split.
    """
    if rows <= 16:
        block_m, block_n, block_k, warps, stages, wanted = 16, 32, 256, 2, 3, 512
    elif rows <= 32:
        block_m, block_n, block_k, warps, stages, wanted = 32, 64, 128, 2, 3, 512
    elif rows <= 64:
        block_m, block_n, block_k, warps, stages, wanted = 64, 64, 128, 4, 3, 256
    elif rows <= 128:
        block_m, block_n, block_k, warps, stages, wanted = 128, 64, 128, 4, 3, 256
    else:
        block_m, block_n, block_k, warps, stages, wanted = 128, 128, 64, 8, 4, 256
    tiles = -(-num_out // block_n) * -(-rows // block_m)
    splits = min(round(wanted / tiles), num_in // (2 * block_k)) if tiles <= _SPLIT_COUNTERS else 1
    return TilePlan(block_m, block_n, block_k, max(1, splits), warps, stages)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
    tiles: TilePlan,
) -> torch.Tensor:
    """`int8_linear` without checks, with the caller's plan."""
    block_m, block_n, block_k, splits, warps, stages = tiles
    (rows, num_in), num_out = x.shape, len(weight)
    out = torch.empty(rows, num_out, dtype=x.dtype, device=x.device)
    partials = torch.empty(splits, rows, num_out, dtype=torch.float32, device=x.device) if splits > 1 else out
    _kernel[(-(-num_out // block_n), splits, -(-rows // block_m))](
        x,
        weight,
        scales,
        out if bias is None else bias,
        out,
        partials,
        workspace,
        rows,
        num_out,
        num_in,
        -(-num_in // (splits * block_k)) * block_k,
        bias is not None,
        num_in % block_k == 0,
        splits > 1,
        block_m,
        block_n,
        block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out


if triton is not None:

    @triton.jit
    def _kernel(
        x,
        weight,
        scales,
        bias,
        out,
        partials,  # [splits, rows, num_out] fp32
        workspace,
        rows,
        num_out,
        num_in,
        split_len,
        has_bias: tl.constexpr,
        is_even: tl.constexpr,
        is_split: tl.constexpr,
        block_m: tl.constexpr,
        block_n: tl.constexpr,
        block_k: tl.constexpr,
    ):
        """A tile of yᵀ = W · xᵀ: with W on the left, its bytes are widened on their way into the matrix units.

        The programs of a tile's splits store partial sums; the last to finish adds them, always in the same order.
        """
        outs = tl.program_id(0) * block_n + tl.arange(0, block_n)
        ms = tl.program_id(2) * block_m + tl.arange(0, block_m)
        split = tl.program_id(1)
        first = split * split_len
        sums = tl.zeros((block_n, block_m), dtype=tl.float32)
        for k in range(first, min(first + split_len, num_in), block_k):
            ks = k + tl.arange(0, block_k)
            is_weight, is_x = outs[:, None] < num_out, ms[None, :] < rows
            if not is_even:
                is_weight = is_weight & (ks[None, :] < num_in)
                is_x = is_x & (ks[:, None] < num_in)
            w = tl.load(weight + outs[:, None].to(tl.int64) * num_in + ks[None, :], mask=is_weight, other=0)
            xs = tl.load(x + ms[None, :] * num_in + ks[:, None], mask=is_x, other=0.0)
            sums = tl.dot(w.to(xs.dtype), xs, sums)
        places = ms[None, :] * num_out + outs[:, None]
        is_place = (ms[None, :] < rows) & (outs[:, None] < num_out)
        is_last = True
        if is_split:
            num_splits = tl.num_programs(1)
            counter = workspace + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
            tl.store(partials + split * rows * num_out + places, sums, mask=is_place)
            tl.debug_barrier()  # all of the program's sums are there before it counts
            is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1
            if is_last:
                sums = tl.zeros((block_n, block_m), dtype=tl.float32)
                for s in range(num_splits):
                    sums += tl.load(
                        partials + s * rows * num_out + places, mask=is_place, other=0.0, cache_modifier=".cg"
                    )
                tl.store(counter, 0)
        if is_last:
            sums *= tl.load(scales + outs, mask=outs < num_out, other=0.0)[:, None]
            if has_bias:
                sums += tl.load(bias + outs, mask=outs < num_out, other=0.0).to(tl.float32)[:, None]
            tl.store(out + places, sums.to(out.dtype.element_ty), mask=is_place)
