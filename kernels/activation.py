"""The functions between an MLP's linears: in plain torch, and for the end of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) · second half of the last axis."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# By name; swiglu halves the last axis, the others keep it.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "swiglu": swiglu,
}

if triton is not None:

    @triton.jit
    def activate(x, activation: tl.constexpr):
        """fp32 → fp32; every name but swiglu."""
        if activation == "gelu_tanh":  # (1 + tanh(a)) / 2 = 1 / (1 + exp(-2a))
            x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        if activation == "gelu_erf":
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        if activation == "relu":
            x = tl.maximum(x, 0.0)
        if activation == "squared_relu":
            x = tl.maximum(x, 0.0)
            x = x * x
        return x

    @triton.jit
    def gated(gate, up):
        """silu(gate) · up, fp32"""
        return gate / (1.0 + tl.exp(-gate)) * up
