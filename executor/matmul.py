"""How a linear multiplies: one Matmul for each weight format and device, chosen once when the weight is loaded.

A layer holds a Matmul and calls it. A new weight format adds a class here and a case to `make_matmul`; no signature
outside this file changes.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
import torch.nn.functional as F

from executor.quantization import QuantizedMatrix
from kernels import linear
from kernels.activation import ACTIVATIONS
from kernels.fp8 import FP8

# oneDNN picks the packed layout for this number of rows. Measured at 1 to 128 rows, 64 is within noise of the best.
_PACK_ROWS = 64
# Activations that oneDNN applies to its result, and the algorithm's name: one pass over it less.
_FUSED = {"none": ("none", ""), "relu": ("relu", ""), "gelu_tanh": ("gelu", "tanh"), "gelu_erf": ("gelu", "none")}


class Matmul(Protocol):
    """A weight W [in, out], laid out for one device."""

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "none",
        out: torch.Tensor | None = None,
        input_activation: str = "none",
    ) -> torch.Tensor:
        """x [rows, in] and bias [out] of one dtype → activation(x · W + bias), [rows, out] of that dtype.

        activation: a name of kernels.activation; swiglu halves the last axis. input_activation: another one, of x
        before the product. With `out`, [rows, out] fp32, the result goes there.
        """
        ...

    def activates_input(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether an `input_activation` of so many rows of this dtype costs nothing."""
        ...


def make_matmul(weight: torch.Tensor | QuantizedMatrix) -> Matmul:
    """The fastest Matmul for a weight [in, out] on the device that holds it."""
    if isinstance(weight, QuantizedMatrix):
        if weight.values.device.type == "cuda":
            return GpuMatmul(weight.values, weight.scales)
        # Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow.
        is_int8_safe = weight.values.dtype != FP8 and torch.cpu._is_vnni_supported()
        if weight.rounds_rows and not is_int8_safe:
            raise ValueError("the weights are w8a8, which needs a CPU with VNNI")
        return Int8CpuMatmul(weight) if is_int8_safe else WideningMatmul(weight)
    if weight.device.type == "cuda":
        return GpuMatmul(weight.t().contiguous())
    return PackedMatmul(weight) if can_pack(weight.dtype, weight.device) else PlainMatmul(weight)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN packs weights of this dtype here. On a CPU that is 1.3 to 3 times as fast as F.linear."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def leave_out_amx() -> None:
    """Keep oneDNN from AMX in this process, unless its environment says which instructions to use.

    For w8a8, before anything is multiplied. AMX makes oneDNN's int8 product of a few rows slower, so tokens come later,
    and that of many rows faster (docs/design.md has figures). bf16 and int8's three digits are faster with AMX.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


class GpuMatmul:
    """Weights on a GPU: kernels.linear chooses its own kernels or cuBLAS."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """weight: [out, in]; int8 or fp8 with scales [out] fp32."""
        self._weight = weight
        self._scales = scales
        self._workspace = linear.make_workspace(weight.device)

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "none",
        out: torch.Tensor | None = None,
        input_activation: str = "none",
    ) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        return linear.linear(x, self._weight, bias, self._workspace, activation, self._scales, out, input_activation)

    def activates_input(self, rows: int, dtype: torch.dtype) -> bool:
        """Where rows are rounded on their way."""
        return linear.rounds_rows(rows, self._weight, dtype)


def padded_rows(rows: int) -> int:
    """The number of rows that a CPU multiplies in place of `rows`: at most an eighth more, and exact below 16.

    oneDNN compiles a program for each number of rows and shape of weights, and keeps it. It takes 1 to 3 ms, and 0.5
    MB. So the numbers must be few: 64 up to 512, a CPU's longest step.
    """
    step = min(1 << max(0, rows.bit_length() - 4), 16)
    return -(-rows // step) * step


class CpuMatmul:
    """What CPU formats share: few numbers of rows, activations that the product does not apply itself, and `out`."""

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "none",
        out: torch.Tensor | None = None,
        input_activation: str = "none",
    ) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        x = ACTIVATIONS[input_activation](x)
        rows = len(x)
        padding = padded_rows(rows) - rows
        y = self.multiply(F.pad(x, (0, 0, 0, padding)) if padding else x, bias, activation)[:rows]
        return y if out is None else out.copy_(y)

    def activates_input(self, rows: int, dtype: torch.dtype) -> bool:
        """Never."""
        return False

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        """activation(x · W + bias), [rows, out]"""
        return ACTIVATIONS[activation](self.product(x, bias))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x · W + bias, [rows, out]"""
        raise NotImplementedError


class PlainMatmul(CpuMatmul):
    """F.linear with the weight as it was loaded."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [in, out]"""
        self._weight = weight.t()  # [out, in], as F.linear expects

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        return F.linear(x, self._weight, bias)


class PackedMatmul(CpuMatmul):
    """oneDNN's linear on a CPU, with a weight in oneDNN's blocked layout."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [in, out]; `can_pack` says for which dtypes and devices."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), _PACK_ROWS)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        name, algorithm = _FUSED.get(activation, _FUSED["none"])
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, name, [], algorithm)
        return y if activation in _FUSED else ACTIVATIONS[activation](y)


class Int8CpuMatmul(CpuMatmul):
    """int8 weights on a CPU through oneDNN's uint8 · int8 product; x is fp32 or bf16.

    Each row of activations becomes integers times a step of its own. An integer has one, two or three digits to base
    256. Each digit is a row of uint8, and its product with the weights is exact in int32. So the weights are read once,
    as bytes. Three digits (two for bf16) are exact: the result is as accurate as an fp32 product (at 768 inputs 1.4e-7
    against 2.6e-7; 2e-6 in a row with one value 100 times the others). One digit rounds the activations to int8, W8A8.
    """

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self._rounds_rows = matrix.rounds_rows
        self._scales = matrix.scales
        self._packed = torch.ops.onednn.qlinear_prepack(matrix.values, None)
        # Digits are stored 128 too large. Subtracting that here is faster than oneDNN's zero points.
        self._excess = matrix.values.sum(1, dtype=torch.int32).mul_(-128).float().mul_(matrix.scales)
        self._zeros = torch.zeros(len(matrix.scales), dtype=torch.int64)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        num_digits = 1 if self._rounds_rows else 2 if x.dtype == torch.bfloat16 else 3
        digits, steps = split_digits(x, num_digits)
        parts = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 0, self._packed, self._scales, self._zeros, self._excess, 1.0, 0, torch.float32, "none", [], ""
        ).split(len(x))  # each digit's [rows, out], the lowest first
        out = parts[-1]
        for part in parts[-2::-1]:
            out = torch.add(part, out, alpha=256.0)
        return (out.mul_(steps) if bias is None else torch.addcmul(bias, out, steps)).to(x.dtype)


# Of a number of digits: the largest integer that they hold, less a margin for rounding up, and 128 in each digit.
_DIGITS = {1: (0x7F, 0x80), 2: (0x7F7E, 0x8080), 3: (0x7F7F70, 0x808080)}


def split_digits(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] → (digits [count · rows, in] uint8, lowest first, each 128 too large; steps [rows, 1] fp32).

    x ≈ steps · Σ (digit - 128) · 256^i. This is within half a step: of the row's largest value 6e-8 with three digits,
    1.5e-5 with two, 4e-3 with one.
    """
    top, offset = _DIGITS[count]
    x = x.float()
    steps = x.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny * 2**24).div_(top)
    integers = (x / steps).round_()
    if count == 1:
        return integers.add_(offset).to(torch.uint8), steps
    as_bytes = integers.to(torch.int32).add_(offset).view(torch.uint8).unflatten(1, (-1, 4))
    return as_bytes.permute(2, 0, 1)[:count].contiguous().flatten(0, 1), steps


class WideningMatmul(CpuMatmul):
    """Weights widened to x's dtype at every call: fp8, and int8 on CPUs without a safe int8 product (no VNNI)."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self._matrix = matrix

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        return linear.reference(x, self._matrix.values, bias, scales=self._matrix.scales)
