"""y = act(x · Wᵀ + b) for one row, W in int8 or fp8: `kernels.linear` calls it. Stateless.

Such a product is limited by instructions, not by the memory: so a load takes four weights, and few instructions make
fp32 of them. They are exact, and so are their products with x but for fp32's rounding.
"""

from __future__ import annotations

import torch

from kernels import dependent_launch
from kernels.fp8 import FP8
from kernels.linear_plans import TilePlan

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.linear_parts import finish, load_tile
except ImportError:  # a CPU-only torch comes without it
    triton = None


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    plan: TilePlan,
) -> torch.Tensor:
    """Arguments as of `kernels.linear.linear`, which checked them: x [1, in], contiguous. Returns out."""
    num_in, num_out = x.shape[1], out.shape[1]
    _byte_row[(-(-num_out // plan.block_n),)](
        x.view(torch.int64),
        weight.view(torch.int32),
        scales,
        out if bias is None else bias,
        out,
        num_out,
        num_in=num_in,
        x_is_bf16=x.dtype == torch.bfloat16,
        is_fp8=weight.dtype == FP8,
        has_bias=bias is not None,
        activation=activation,
        is_gated=activation == "swiglu",
        is_even=num_in % plan.block_k == 0 and num_out % plan.block_n == 0,
        block_n=plan.block_n,
        block_k=plan.block_k,
        is_two_ahead=plan.stages > 1,
        num_warps=plan.warps,
        **dependent_launch.options(x.device),
    )
    return out


if triton is not None:

    @triton.jit
    def _weights(words, is_fp8: tl.constexpr):
        """The four weights of each int32, the lowest byte first, fp32."""
        if is_fp8:
            return tl.inline_asm_elementwise(
                """{
                .reg .b16 low, high, a, b, c, d;
                .reg .b32 p, q;
                mov.b32 {low, high}, $4;
                cvt.rn.f16x2.e4m3x2 p, low;
                cvt.rn.f16x2.e4m3x2 q, high;
                mov.b32 {a, b}, p;
                mov.b32 {c, d}, q;
                cvt.f32.f16 $0, a;
                cvt.f32.f16 $1, b;
                cvt.f32.f16 $2, c;
                cvt.f32.f16 $3, d;
                }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            # The last byte of 2^23 + 128 + w: faster than a conversion.
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                xor.b32 t, $4, 0x80808080;
                prmt.b32 $0, t, 0x4B000000, 0x7440;
                prmt.b32 $1, t, 0x4B000000, 0x7441;
                prmt.b32 $2, t, 0x4B000000, 0x7442;
                prmt.b32 $3, t, 0x4B000000, 0x7443;
                }""",
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
            return a - 8388736.0, b - 8388736.0, c - 8388736.0, d - 8388736.0

    @triton.jit
    def _activations(quads, is_bf16: tl.constexpr):
        """The four 16-bit numbers of each int64, the lowest first, fp32."""
        low, high = quads.to(tl.int32), (quads >> 32).to(tl.int32)
        if is_bf16:
            a, b = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
            c, d = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
        else:
            a, b = low.to(tl.int16).to(tl.float16, bitcast=True), (low >> 16).to(tl.int16).to(tl.float16, bitcast=True)
            c, d = (
                high.to(tl.int16).to(tl.float16, bitcast=True),
                (high >> 16).to(tl.int16).to(tl.float16, bitcast=True),
            )
        return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)

    @triton.jit
    def _add(sums, words, x0, x1, x2, x3, is_fp8: tl.constexpr):
        """sums + the four weights of each word times x's four numbers."""
        w0, w1, w2, w3 = _weights(words, is_fp8)
        sums += w0 * x0[None, :]
        sums += w1 * x1[None, :]
        sums += w2 * x2[None, :]
        sums += w3 * x3[None, :]
        return sums

    @triton.jit
    def _byte_row(
        x,  # [in / 4] int64
        weight,  # [out, in / 4] int32
        scales,
        bias,
        out,
        num_out,
        num_in: tl.constexpr,
        x_is_bf16: tl.constexpr,
        is_fp8: tl.constexpr,
        has_bias: tl.constexpr,
        activation: tl.constexpr,
        is_gated: tl.constexpr,
        is_even: tl.constexpr,
        block_n: tl.constexpr,
        block_k: tl.constexpr,
        is_two_ahead: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """A tile of W times x. One or two blocks of W are on their way while one is multiplied."""
        outs = tl.program_id(0) * block_n + tl.arange(0, block_n)
        step: tl.constexpr = block_k // 4
        row_words: tl.constexpr = num_in // 4
        words = tl.arange(0, step)
        ups = weight
        if is_gated:
            ups = weight + num_out * row_words  # W's second half
        if pdl:
            start_dependents()
        w = load_tile(weight, outs, words, num_out, row_words, is_even)
        up = w
        if is_gated:
            up = load_tile(ups, outs, words, num_out, row_words, is_even)
        second = w
        if is_two_ahead and block_k < num_in:
            second = load_tile(weight, outs, words + step, num_out, row_words, is_even)
        if pdl:
            wait_for_predecessors()
        sums = tl.zeros((block_n, step), tl.float32)
        up_sums = tl.zeros((block_n, step), tl.float32)
        for first in range(0, row_words, step):
            ahead = second
            if is_two_ahead:
                if first + 2 * step < row_words:
                    ahead = load_tile(weight, outs, words + first + 2 * step, num_out, row_words, is_even)
            else:
                if first + step < row_words:
                    ahead = load_tile(weight, outs, words + first + step, num_out, row_words, is_even)
            if is_even:
                quads = tl.load(x + first + words)
            else:
                quads = tl.load(x + first + words, mask=first + words < row_words, other=0)
            x0, x1, x2, x3 = _activations(quads, x_is_bf16)
            sums = _add(sums, w, x0, x1, x2, x3, is_fp8)
            if is_two_ahead:
                w = second
                second = ahead
            else:
                w = ahead
            if is_gated:
                up_sums = _add(up_sums, up, x0, x1, x2, x3, is_fp8)
                if first + step < row_words:
                    up = load_tile(ups, outs, words + first + step, num_out, row_words, is_even)
        y = finish(
            tl.sum(sums, 1),
            tl.sum(up_sums, 1),
            scales,
            bias,
            outs,
            num_out,
            True,
            has_bias,
            activation,
            is_gated,
            False,
        )
        tl.store(out + outs, y.to(out.dtype.element_ty), mask=outs < num_out)
