"""y = act(x · Wᵀ + b) for one row, W in int8 or fp8: `kernels.linear` calls it. Stateless.

The memory limits such a product only if the kernel takes few instructions. So a word has four weights, and few
instructions make fp32 of them. The loop is unrolled and has no barriers. That makes 3.1 instructions for each weight in
fp8 and 3.8 in int8, and some more where a block is masked. The weights are exact, and so are their products with x but
for fp32's rounding.
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
    blocks = -(-num_in // plan.block_k)
    _byte_row[(-(-num_out // plan.block_n),)](
        x.view(torch.int64),
        weight.view(torch.int32),
        scales,
        out if bias is None else bias,
        out,
        num_out,
        num_in // 4,
        num_in=num_in,
        x_is_bf16=x.dtype == torch.bfloat16,
        is_fp8=weight.dtype == FP8,
        has_bias=bias is not None,
        activation=activation,
        is_gated=activation == "swiglu",
        is_even=num_in % plan.block_k == 0 and num_out % plan.block_n == 0,
        block_n=plan.block_n,
        block_k=plan.block_k,
        is_two_ahead=plan.stages == 2,
        unroll=next(count for count in range(plan.unroll, 0, -1) if blocks % count == 0),
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
    def _quads(places):
        """The int64 at each place, in the threads that multiply it.

        tl.load chooses threads of its own. Then the numbers go through shared memory, with barriers for each block.
        """
        return tl.inline_asm_elementwise(
            "ld.global.b64 $0, [$1];", "=l,l", [places], dtype=tl.int64, is_pure=False, pack=1
        )

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
        num_words,  # in / 4
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
        unroll: tl.constexpr,  # divides the number of blocks
        pdl: tl.constexpr,
    ):
        """A tile of W times x. The next one or two blocks of W are on their way while one is multiplied."""
        outs = tl.program_id(0) * block_n + tl.arange(0, block_n)
        step: tl.constexpr = block_k // 4
        row_words: tl.constexpr = num_in // 4
        words = tl.arange(0, step)
        lead: tl.constexpr = 2 if is_two_ahead else 1
        # ptxas (CUDA 12.8) converts an fp8 zero that it knows to a wrong constant. So where a block reaches beyond W,
        # the compiler must not know W's width.
        width = row_words if is_even else num_words
        ups = weight
        if is_gated:
            ups = weight + num_out * row_words  # W's second half
        if pdl:
            start_dependents()
        w = load_tile(weight, outs, words, num_out, width, is_even)
        up = w
        if is_gated:
            up = load_tile(ups, outs, words, num_out, width, is_even)
        second = w
        if is_two_ahead and step < row_words:
            second = load_tile(weight, outs, words + step, num_out, width, is_even)
        if pdl:
            wait_for_predecessors()
        sums = tl.zeros((block_n, step), tl.float32)
        up_sums = tl.zeros((block_n, step), tl.float32)
        for start in range(0, row_words, step * unroll):
            for block in tl.static_range(unroll):
                first = start + block * step
                at = first + words
                ahead = second if is_two_ahead else w
                if first + lead * step < row_words:
                    ahead = load_tile(weight, outs, at + lead * step, num_out, width, is_even)
                next_up = up
                if is_gated and first + step < row_words:
                    next_up = load_tile(ups, outs, at + step, num_out, width, is_even)
                # Beyond W's columns there are zeros: what x has there does not count, if it is finite.
                quads = _quads(x + (at if is_even else tl.minimum(at, row_words - 1)))
                x0, x1, x2, x3 = _activations(quads, x_is_bf16)
                sums = _add(sums, w, x0, x1, x2, x3, is_fp8)
                if is_gated:
                    up_sums = _add(up_sums, up, x0, x1, x2, x3, is_fp8)
                    up = next_up
                if is_two_ahead:
                    w = second
                    second = ahead
                else:
                    w = ahead
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
