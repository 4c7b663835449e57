"""What the linears' kernels share: how they read W, and their end, with scales, bias and activation. Stateless."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    from kernels.activation import activate, gated
except ImportError:  # a CPU-only torch comes without it
    triton = None


if triton is not None:

    @triton.jit
    def load_tile(weight, outs, ks, num_out, num_in, is_even: tl.constexpr):
        """W's tile [outs, ks], zeros beyond W. weight: [num_out, num_in] of any dtype, words of several weights too.

        num_in: a constant of the kernel, or not.
        """
        places = weight + outs[:, None].to(tl.int64) * num_in + ks[None, :]
        if is_even:
            return tl.load(places)
        return tl.load(places, mask=(outs[:, None] < num_out) & (ks[None, :] < num_in), other=0.0)

    @triton.jit
    def _scaled(
        sums, scales, bias, outs, num_out, has_scales: tl.constexpr, has_bias: tl.constexpr, is_column: tl.constexpr
    ):
        """sums [outs] or [outs, rows] · scale + bias, fp32."""
        if has_scales:
            scale = tl.load(scales + outs, mask=outs < num_out, other=0.0)
            sums = sums * (scale[:, None] if is_column else scale)
        if has_bias:
            added = tl.load(bias + outs, mask=outs < num_out, other=0.0).to(tl.float32)
            sums = sums + (added[:, None] if is_column else added)
        return sums

    @triton.jit
    def finish(
        sums,
        up_sums,  # of a gated linear
        scales,
        bias,
        outs,
        num_out,
        has_scales: tl.constexpr,
        has_bias: tl.constexpr,
        activation: tl.constexpr,
        is_gated: tl.constexpr,
        is_column: tl.constexpr,
    ):
        """activation(sums · scale + bias), fp32."""
        y = _scaled(sums, scales, bias, outs, num_out, has_scales, has_bias, is_column)
        if is_gated:
            up_scales, up_bias = scales + num_out, bias + num_out
            y = gated(y, _scaled(up_sums, up_scales, up_bias, outs, num_out, has_scales, has_bias, is_column))
        else:
            y = activate(y, activation)
        return y
