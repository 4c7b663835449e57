"""y = act(x · Wᵀ + b) for the few rows of a decode step; W in x's dtype, or in int8 or fp8 with a scale per output.

The time of such a product is the time to read W. cuBLAS reads a small W at 11 to 60 % of the memory's rate, these
kernels at 56 to 109 % of 4.3 TB/s (one row, H200). Stateless.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import byte_row, dependent_launch, runs_on, widen
from kernels.activation import ACTIVATIONS
from kernels.fp8 import FP8
from kernels.linear_plans import SPLIT_COUNTERS, TilePlan, plan, plan_fp8_rows
from kernels.quantize_rows import quantize_rows

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.linear_parts import finish, load_tile
except ImportError:  # a CPU-only torch comes without it
    triton = None

_CUBLAS_GELU = {"gelu_tanh": True, "relu": False}  # activations at a product's end: whether it is GELU
_HAS_WIDE_RESULTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)  # mm's out_dtype


def make_workspace(device: torch.device) -> torch.Tensor:
    """The split-k workspace of one linear: a count of finished splits per output tile, int32.

    It is zeros before a call, and the call leaves it zeros.
    """
    return torch.zeros(SPLIT_COUNTERS, dtype=torch.int32, device=device)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    input_activation: str = "none",
) -> torch.Tensor:
    """The same in plain torch, on any device; weights with scales are widened to x's dtype first, x is not rounded."""
    wide = weight if scales is None else widen.reference(weight, scales, x.dtype)
    y = ACTIVATIONS[activation](F.linear(ACTIVATIONS[input_activation](x), wide, bias))
    return y if out is None else out.copy_(y)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
    activation: str = "none",
    scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    input_activation: str = "none",
) -> torch.Tensor:
    """act(x · Wᵀ + b): x [rows, in], weight [out, in] of x's dtype, int8 or fp8, bias [out] as x → [rows, out] as x.

    activation: a name of ACTIVATIONS; swiglu returns [rows, out / 2]. scales: [out] fp32, of int8 or fp8 weights. out:
    where the result goes, [rows, out] fp32 or as x. input_activation: another one, of x before the product; with swiglu
    x is [rows, 2 · in]. workspace: of `make_workspace`, on x's device; two calls at once must not share one. Raises
    ValueError where shapes or dtypes do not fit. Sums are in fp32, but for those of fp8 with fp8, and their order is
    fixed. Without Triton or a GPU, for fp32 and for many rows it calls the reference.

    Rounding of weights with scales. Several rows of bf16 with fp8 weights (`rounds_rows`): x is rounded to fp8 too,
    with a scale per row, so that the product runs at fp8's rate. Else few rows (`plan`): none; the integers or fp8
    numbers are multiplied, and the scale multiplies the sum. In all other cases, and where cuBLAS lacks fp8 with fp8: a
    weight times its scale is rounded to x's dtype.
    """
    _check(x, weight, bias, scales, input_activation)
    if scales is not None and rounds_rows(len(x), weight, x.dtype):
        y = _multiply_fp8(*quantize_rows(x, input_activation), weight, scales, bias, workspace)
        if y is not None:
            y = ACTIVATIONS[activation](y)
            return y if out is None else out.copy_(y)
    x = ACTIVATIONS[input_activation](x)
    tiles = _plan(len(x), weight, x.dtype, activation == "swiglu")
    if tiles is None:
        return _many_rows(x, weight, bias, activation, scales, out)
    x = x.contiguous()
    if out is None:
        out = torch.empty(len(x), len(weight) // (1 + (activation == "swiglu")), dtype=x.dtype, device=x.device)
    if tiles.block_m == 1 and scales is not None:
        return byte_row.launch(x, weight, scales, bias, out, activation, tiles)
    return _launch(tiles, x, weight, scales, bias, out, workspace, activation)


def rounds_rows(rows: int, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `linear` rounds so many rows of this dtype to fp8, as the weight is: then `input_activation` is free.

    One row stays as it is: its product takes the time to read the weight. So do up to 32 where there is no dependent
    launch. torch multiplies fp8 with fp8 for results in bf16, and sizes that 16 divides.
    """
    if rows < 2 or not runs_on(weight.device) or weight.dtype != FP8 or dtype != torch.bfloat16:
        return False
    is_fit = all(size % 16 == 0 for size in weight.shape)
    return is_fit and (_plan_fp8(rows, weight) is not None or _plan(rows, weight, dtype, False) is None)


def _plan_fp8(rows: int, weight: torch.Tensor) -> TilePlan | None:
    """None too where dependent launch is not: there the plans were not measured."""
    num_out, num_in = weight.shape
    return plan_fp8_rows(rows, num_out, num_in) if dependent_launch.has_dependent_launch(weight.device) else None


def _plan(rows: int, weight: torch.Tensor, dtype: torch.dtype, is_gated: bool) -> TilePlan | None:
    if not runs_on(weight.device) or dtype not in (torch.bfloat16, torch.float16):
        return None
    num_out, num_in = weight.shape
    return plan(rows, num_out, num_in, {torch.int8: "int8", FP8: "fp8"}.get(weight.dtype, "plain"), is_gated)


def _launch(
    tiles: TilePlan,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    workspace: torch.Tensor,
    activation: str = "none",
    row_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel of a plan. x: contiguous; in fp8 with row_scales [rows, 1]. Returns out."""
    block_m, block_n, block_k, splits, warps, stages, _ = tiles
    (rows, num_in), num_out = x.shape, out.shape[1]
    partials = torch.empty(splits, rows, num_out, dtype=torch.float32, device=x.device) if splits > 1 else out
    split_len = -(-num_in // (splits * block_k)) * block_k
    splits = -(-num_in // split_len)  # no split is empty
    tensors = (x, weight, out if scales is None else scales, out if bias is None else bias, out)
    constants = dict(
        num_in=num_in,
        has_scales=scales is not None,
        has_bias=bias is not None,
        activation=activation,
        is_gated=activation == "swiglu",
        is_even=num_in % block_k == 0 and num_out % block_n == 0,
        block_n=block_n,
        block_k=block_k,
        num_warps=warps,
        num_stages=stages,
        **dependent_launch.options(x.device),
    )
    grid = (-(-num_out // block_n), splits, -(-rows // block_m))
    if block_m == 1:
        _one_row[grid](*tensors, num_out, **constants)
    else:
        sizes = dict(split_len=split_len, splits=splits, block_m=block_m, has_row_scales=row_scales is not None)
        row_tensors = (out if row_scales is None else row_scales, partials, workspace)
        _tile[grid](*tensors, *row_tensors, rows, num_out, **sizes, **constants)
    return out


def _many_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    scales: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`reference`, and what cuBLAS does besides: GELU or ReLU after a product, 16-bit factors with fp32 results."""
    wide = weight if scales is None else widen.widen(weight, scales, x.dtype)
    if x.device.type == "cuda" and x.dtype != torch.float32:
        if bias is not None and activation in _CUBLAS_GELU and out is None:
            return torch._addmm_activation(bias, x, wide.t(), use_gelu=_CUBLAS_GELU[activation])
        # A bias is added after the product is rounded, so only to a result that is wider than x.
        if activation == "none" and out is not None and _HAS_WIDE_RESULTS and (bias is None or out.dtype != x.dtype):
            torch.mm(x, wide.t(), out_dtype=out.dtype, out=out)
            return out if bias is None else out.add_(bias)
    return reference(x, wide, bias, activation, out=out)


def _multiply_fp8(
    values: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    workspace: torch.Tensor,
) -> torch.Tensor | None:
    """x · Wᵀ + b in bf16, x = values · row_scales; the tensor cores' own sums of fp8 products, less exact than fp32.

    None: cuBLAS has no such product. It lacks scales per row where a few rows have many ins and not many outs, for
    example 127 rows, 9216 ins and 3072 outs on an H100 (github.com/pytorch/ao/issues/4582).
    """
    tiles = _plan_fp8(len(values), weight)
    if tiles is not None:
        out = torch.empty(len(values), len(weight), dtype=torch.bfloat16, device=weight.device)
        return _launch(tiles, values, weight, scales, bias, out, workspace, row_scales=row_scales)
    try:
        return torch._scaled_mm(
            values, weight.t(), row_scales, scales[None], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    except RuntimeError as error:
        if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
            raise
        return None


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    input_activation: str,
) -> None:
    width = 2 if input_activation == "swiglu" else 1
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != width * weight.shape[1]:
        columns = f"{width} · in" if width > 1 else "in"
        shapes = f"x is {list(x.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"{shapes}; they must be [rows, {columns}] and [out, in]")
    dtypes = (x.dtype,) if scales is None else widen.QUANTIZED
    if weight.dtype not in dtypes or not weight.is_contiguous():
        names = " or ".join(map(str, dtypes))
        raise ValueError(f"weight is {weight.dtype} with strides {weight.stride()}; it must be {names} and contiguous")
    if scales is not None and (scales.shape != weight.shape[:1] or scales.dtype != torch.float32):
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}; they must be fp32 [{weight.shape[0]}]")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; it must be {x.dtype} [{weight.shape[0]}]")


if triton is not None:

    @triton.jit
    def _add_splits(partials, counter, places, is_place, sums, size, splits: tl.constexpr):
        """(is_last, sums): the last of a tile's programs gets the sums of all of them."""
        tl.store(partials + tl.program_id(1) * size + places, sums, mask=is_place)
        tl.debug_barrier()  # all of the program's sums are there before it counts
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if is_last:
            sums = tl.zeros_like(sums)
            for s in range(splits):
                part = partials + s * size
                sums += tl.load(part + places, mask=is_place, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
        return is_last, sums

    @triton.jit
    def _one_row(
        x,
        weight,
        scales,
        bias,
        out,
        num_out,
        num_in: tl.constexpr,
        has_scales: tl.constexpr,
        has_bias: tl.constexpr,
        activation: tl.constexpr,
        is_gated: tl.constexpr,
        is_even: tl.constexpr,
        block_n: tl.constexpr,
        block_k: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """A tile of W, in x's dtype, times one x. The next block of W is on its way while one is multiplied."""
        outs = tl.program_id(0) * block_n + tl.arange(0, block_n)
        ks = tl.arange(0, block_k)
        ups = weight
        if is_gated:
            ups = weight + num_out * num_in  # W's second half
        if pdl:
            start_dependents()
        w = load_tile(weight, outs, ks, num_out, num_in, is_even)
        up = w
        if is_gated:
            up = load_tile(ups, outs, ks, num_out, num_in, is_even)
        if pdl:
            wait_for_predecessors()
        sums = tl.zeros((block_n, block_k), tl.float32)
        up_sums = tl.zeros((block_n, block_k), tl.float32)
        for first in range(0, num_in, block_k):
            next_w = w
            next_ks = ks + first + block_k
            if first + block_k < num_in:
                next_w = load_tile(weight, outs, next_ks, num_out, num_in, is_even)
            if is_even:
                xs = tl.load(x + first + ks).to(tl.float32)
            else:
                xs = tl.load(x + first + ks, mask=first + ks < num_in, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * xs[None, :]
            w = next_w
            if is_gated:
                up_sums += up.to(tl.float32) * xs[None, :]
                if first + block_k < num_in:
                    up = load_tile(ups, outs, next_ks, num_out, num_in, is_even)
        y = finish(
            tl.sum(sums, 1),
            tl.sum(up_sums, 1),
            scales,
            bias,
            outs,
            num_out,
            has_scales,
            has_bias,
            activation,
            is_gated,
            False,
        )
        tl.store(out + outs, y.to(out.dtype.element_ty), mask=outs < num_out)

    @triton.jit
    def _tile(
        x,
        weight,
        scales,
        bias,
        out,
        row_scales,  # [rows] fp32, of x in fp8
        partials,  # [splits, rows, num_out] fp32
        workspace,
        rows,
        num_out,
        num_in: tl.constexpr,
        split_len: tl.constexpr,
        splits: tl.constexpr,
        has_row_scales: tl.constexpr,
        has_scales: tl.constexpr,
        has_bias: tl.constexpr,
        activation: tl.constexpr,
        is_gated: tl.constexpr,
        is_even: tl.constexpr,
        block_m: tl.constexpr,
        block_n: tl.constexpr,
        block_k: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """A tile of yᵀ = W · xᵀ: with W on the left, int8 and fp8 are widened on their way into the matrix units.

        Where x is fp8, too, nothing is widened. The programs of a tile's splits store partial sums; the last to finish
        adds them, always in the same order.
        """
        outs = tl.program_id(0) * block_n + tl.arange(0, block_n)
        ms = tl.program_id(2) * block_m + tl.arange(0, block_m)
        is_row = ms[None, :] < rows
        first = tl.program_id(1) * split_len
        ks = first + tl.arange(0, block_k)
        ups = weight
        if is_gated:
            ups = weight + num_out * num_in  # W's second half
        if pdl:
            start_dependents()
        w = load_tile(weight, outs, ks, num_out, num_in, is_even)
        up = w
        if is_gated:
            up = load_tile(ups, outs, ks, num_out, num_in, is_even)
        if pdl:
            wait_for_predecessors()
        xs = tl.load(x + ms[None, :] * num_in + ks[:, None], mask=is_row & (ks[:, None] < num_in), other=0.0)
        sums = tl.dot(w.to(xs.dtype), xs)
        up_sums = sums
        if is_gated:
            up_sums = tl.dot(up.to(xs.dtype), xs)
        for k in range(first + block_k, min(first + split_len, num_in), block_k):
            ks = k + tl.arange(0, block_k)
            w = load_tile(weight, outs, ks, num_out, num_in, is_even)
            if is_even:
                xs = tl.load(x + ms[None, :] * num_in + ks[:, None], mask=is_row, other=0.0)
            else:
                xs = tl.load(x + ms[None, :] * num_in + ks[:, None], mask=is_row & (ks[:, None] < num_in), other=0.0)
            sums = tl.dot(w.to(xs.dtype), xs, sums)
            if is_gated:
                up = load_tile(ups, outs, ks, num_out, num_in, is_even)
                up_sums = tl.dot(up.to(xs.dtype), xs, up_sums)
        places = ms[None, :].to(tl.int64) * num_out + outs[:, None]
        is_place = is_row & (outs[:, None] < num_out)
        is_last = True
        if splits > 1:
            counter = workspace + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
            is_last, sums = _add_splits(partials, counter, places, is_place, sums, rows * num_out, splits)
        if is_last:
            if has_row_scales:
                sums *= tl.load(row_scales + ms, mask=ms < rows, other=0.0)[None, :]
            y = finish(sums, up_sums, scales, bias, outs, num_out, has_scales, has_bias, activation, is_gated, True)
            tl.store(out + places, y.to(out.dtype.element_ty), mask=is_place)
