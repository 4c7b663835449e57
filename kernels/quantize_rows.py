"""Rows of activations in fp8, with a scale for each row, in one launch: one factor of an fp8 product. Stateless."""

from __future__ import annotations

import torch

from kernels import dependent_launch, runs_on
from kernels.fp8 import FP8, FP8_MAX, to_fp8

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import cast_fp8
except ImportError:  # a CPU-only torch comes without it
    triton = None

_BLOCK_ELEMENTS = 8192  # that a program holds at once


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, on any device."""
    largest = x.abs().amax(1, keepdim=True).float()
    scales = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return to_fp8(x, scales), scales


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] of any float dtype → (values [rows, in] fp8, scales [rows, 1] fp32): x ≈ values · scales.

    A row's scale takes its largest |x| to 448, fp8's largest value; a row of zeros has the scale 1. Without Triton or
    a GPU it calls the reference. Raises ValueError for another number of axes.
    """
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}; it must be [rows, in]")
    if not runs_on(x.device):
        return reference(x)
    x = x.contiguous()
    rows, num_in = x.shape
    values = torch.empty(rows, num_in, dtype=FP8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(num_in), _BLOCK_ELEMENTS)
    _quantize_rows[(rows,)](
        x, values, scales, num_in=num_in, block=block, num_warps=8, **dependent_launch.options(x.device)
    )
    return values, scales


if triton is not None:

    @triton.jit
    def _quantize_rows(x, values, scales, num_in: tl.constexpr, block: tl.constexpr, pdl: tl.constexpr):
        """One row: its largest value, then its cast."""
        row = tl.program_id(0).to(tl.int64)
        x += row * num_in
        values += row * num_in
        columns = tl.arange(0, block)
        if pdl:
            start_dependents()
            wait_for_predecessors()
        largest = tl.zeros((block,), tl.float32)
        for first in range(0, num_in, block):
            part = tl.load(x + first + columns, mask=first + columns < num_in, other=0.0)
            largest = tl.maximum(largest, tl.abs(part.to(tl.float32)))
        most = tl.max(largest, 0)
        scale = tl.where(most > 0, most / 448.0, 1.0)
        tl.store(scales + row, scale)
        for first in range(0, num_in, block):
            is_element = first + columns < num_in
            part = tl.load(x + first + columns, mask=is_element, other=0.0)
            tl.store(values + first + columns, cast_fp8(part, scale), mask=is_element)
