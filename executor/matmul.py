"""How a linear multiplies: one Matmul for each weight format and device, chosen once when the weight is loaded.

A layer holds a Matmul and calls it. A new weight format adds a class here and a case to `make_matmul`; no signature
outside this file changes.
"""

from __future__ import annotations

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
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str = "none", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [rows, in] and bias [out] of one dtype → activation(x · W + bias), [rows, out] of that dtype.

        activation: a name of kernels.activation; swiglu halves the last axis. With `out`, [rows, out] fp32, the result
        goes there.
        """
        ...


def make_matmul(weight: torch.Tensor | QuantizedMatrix) -> Matmul:
    """The fastest Matmul for a weight [in, out] on the device that holds it."""
    if isinstance(weight, QuantizedMatrix):
        if weight.values.device.type == "cuda":
            return GpuMatmul(weight.values, weight.scales)
        # Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow.
        is_int8_safe = weight.values.dtype != FP8 and torch.cpu._is_vnni_supported()
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


class GpuMatmul:
    """Weights on a GPU: kernels.linear chooses its own kernels or cuBLAS."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """weight: [out, in]; int8 or fp8 with scales [out] fp32."""
        self._weight = weight
        self._scales = scales
        self._workspace = linear.make_workspace(weight.device)

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str = "none", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        return linear.linear(x, self._weight, bias, self._workspace, activation, self._scales, out)


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
        self, x: torch.Tensor, bias: torch.Tensor | None, activation: str = "none", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        rows = len(x)
        padding = padded_rows(rows) - rows
        y = self.multiply(F.pad(x, (0, 0, 0, padding)) if padding else x, bias, activation)[:rows]
        return y if out is None else out.copy_(y)

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
    """int8 weights on a CPU, exact, through oneDNN's uint8 · int8 product; x is fp32 or bf16.

    Each row of activations becomes 24-bit integers (16-bit for bf16) times a step of its own. These are split into
    three (two) digits to base 256. Each digit is a row of uint8, and its product with the weights is exact in int32.
    So the weights are read once, as bytes, and the result is as accurate as an fp32 product (at 768 inputs 1.4e-7
    against 2.6e-7; 2e-6 in a row with one value 100 times the others).
    """

    def __init__(self, matrix: QuantizedMatrix) -> None:
        num_out = len(matrix.scales)
        self._scales = matrix.scales
        self._packed = torch.ops.onednn.qlinear_prepack(matrix.values, None)
        # Digits are stored 128 too large. Subtracting that here is faster than oneDNN's zero points.
        self._excess = matrix.values.sum(1, dtype=torch.int32).mul_(-128).float()
        self._ones, self._zeros = torch.ones(num_out), torch.zeros(num_out, dtype=torch.int64)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        digits, steps = _digits(x)
        parts = torch.ops.onednn.qlinear_pointwise(
            digits.flatten(0, 1), 1.0, 0, self._packed, self._ones, self._zeros, self._excess,
            1.0, 0, torch.float32, "none", [], "",
        ).unflatten(0, digits.shape[:2])  # fmt: skip
        out = parts[0]  # the highest digit's [rows, out]
        for part in parts[1:]:
            out = torch.add(part, out, alpha=256.0)
        out = out.mul_(self._scales) * steps
        return (out if bias is None else out.add_(bias)).to(x.dtype)


def _digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] → (digits [3 or 2, rows, in] uint8, highest first, each 128 too large; steps [rows, 1] fp32).

    x ≈ steps · Σ (digit - 128) · 256^i, within half a step: 6e-8 of the row's largest value, 1.5e-5 for bf16.
    """
    # top: the largest integer that the digits hold, less a margin for rounding up. offset: 128 in each digit.
    count, top, offset = (2, 0x7F7E, 0x8080) if x.dtype == torch.bfloat16 else (3, 0x7F7F70, 0x808080)
    x = x.float()
    largest = x.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny * 2**24)
    integers = (x * (top / largest)).round_().to(torch.int32).add_(offset)
    as_bytes = integers.view(torch.uint8).unflatten(1, (-1, 4))  # the lowest first
    return as_bytes[..., :count].flip(-1).permute(2, 0, 1).contiguous(), largest / top


class WideningMatmul(CpuMatmul):
    """Weights widened to x's dtype at every call: fp8, and int8 on CPUs without a safe int8 product (no VNNI)."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self._matrix = matrix

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        return linear.reference(x, self._matrix.values, bias, scales=self._matrix.scales)
