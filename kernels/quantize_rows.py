"""Rows of activations in fp8, with a scale for each row, in one launch: one factor of an fp8 product. Stateless."""

from __future__ import annotations

import torch

from kernels import dependent_launch, runs_on
from kernels.activation import ACTIVATIONS
from kernels.fp8 import FP8, FP8_MAX, to_fp8

try:
    import triton
    import triton.language as tl

    from kernels.activation import activate, gated
    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import cast_fp8
except ImportError:  # a CPU-only torch comes without it
    triton = None

_LEAST = 1e-30  # of a row's largest value: the inverse of its scale is a finite number


def reference(x: torch.Tensor, activation: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, on any device."""
    x = ACTIVATIONS[activation](x.float())
    largest = x.abs().amax(1, keepdim=True)
    scales = torch.where(largest > _LEAST, largest / FP8_MAX, 1.0)
    return to_fp8(x, scales), scales


def quantize_rows(x: torch.Tensor, activation: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """activation(x), x [rows, in] of any float dtype → (values [rows, in] fp8, scales [rows, 1] fp32): values · scales.

    activation: a name of ACTIVATIONS; swiglu halves the last axis. A row's scale takes its largest value to 448, fp8's
    largest; a row of zeros, or below 1e-30, has the scale 1. Without Triton or a GPU it calls the reference. Raises
    ValueError for another number of axes.
    """
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}; it must be [rows, in]")
    if not runs_on(x.device):
        return reference(x, activation)
    x = x.contiguous()
    is_gated = activation == "swiglu"
    rows, num_in = len(x), x.shape[1] // (1 + is_gated)
    values = torch.empty(rows, num_in, dtype=FP8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(num_in)
    _quantize_rows[(rows,)](
        x,
        values,
        scales,
        num_in=num_in,
        activation=activation,
        is_gated=is_gated,
        block=block,
        least=_LEAST,
        # As measured on an H200: 8192 rows of 24576 take the time of the memory, 140 us.
        num_warps=max(4, min(32, block // 2048)),
        **dependent_launch.options(x.device),
    )
    return values, scales


if triton is not None:

    @triton.jit
    def _quantize_rows(
        x,
        values,
        scales,
        num_in: tl.constexpr,
        activation: tl.constexpr,
        is_gated: tl.constexpr,
        block: tl.constexpr,
        least: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One row, read once."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, block)
        is_element = columns < num_in
        if pdl:
            start_dependents()
            wait_for_predecessors()
        if is_gated:
            gate = tl.load(x + row * (2 * num_in) + columns, mask=is_element, other=0.0).to(tl.float32)
            up = tl.load(x + row * (2 * num_in) + num_in + columns, mask=is_element, other=0.0).to(tl.float32)
            y = gated(gate, up)
        else:
            y = activate(tl.load(x + row * num_in + columns, mask=is_element, other=0.0).to(tl.float32), activation)
        most = tl.max(tl.abs(y), 0)
        scale = tl.where(most > least, most / 448.0, 1.0)
        tl.store(scales + row, scale)
        tl.store(values + row * num_in + columns, cast_fp8(y, scale), mask=is_element)
