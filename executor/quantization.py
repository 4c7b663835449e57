"""Weight-only int8: a layer's matrices quantized as they are read, and their products with activations.

Owns the scale of a column, what is kept in int8 and how it is multiplied on a CPU (a GPU's kernel is in kernels/).
It must not know which layer a matrix serves, and talks to no other rank.

The numbers are those of FasterTransformer's symmetric_quantize_last_axis_of_batched_matrix (cutlass_preprocessors.cc,
symmetric_quantize): per output column, scale = max|w| / 128, w / scale rounded to the nearest, halves away from zero,
and cut to [-128, 127]. They differ from it in two ways: what is quantized are the file's own values, not rounded to
the computation's dtype before, and scales stay fp32; and where ranks share a column the largest of all its values
counts, not of a rank's own, so that any tp computes with the same weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kernels import int8_linear
from weights.reader import ShardReader
from weights.table import WeightSpec

_LOG = logging.getLogger("engine")


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix [in, out] as integers, [out, in] for reading along a column; scales [out] fp32."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """[in, out] fp32"""
        return (self.values * self.scales[:, None]).t()


def quantize(weight: torch.Tensor, column_max: torch.Tensor) -> Int8Matrix:
    """weight: [in, out] of any float dtype, or rows of it; column_max: [out], the largest |w| of each column."""
    scales = column_max.float() / 128
    values = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)
    for part in _parts(weight):
        integers = weight[:, part].float() / scales[part].where(scales[part] > 0, 1)  # a column of zeros stays one
        nearest = integers.trunc()
        nearest += integers.sub_(nearest).mul_(2).trunc_()  # halves away from zero, which torch.round does not
        values[part] = nearest.clamp_(-128, 127).t()
    return Int8Matrix(values, scales)


def relative_error(matrix: Int8Matrix, weight: torch.Tensor) -> float:
    """‖w − w'‖ / ‖w‖ of a matrix and its original [in, out]; 0 where all is 0."""
    lost = whole = 0.0
    for part in _parts(weight):
        original = weight[:, part].float()
        difference = Int8Matrix(matrix.values[part], matrix.scales[part]).dequantize() - original
        lost += float(difference.square_().sum())
        whole += float(original.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def _parts(weight: torch.Tensor) -> list[slice]:
    """Columns to have in fp32 at a time: 4 million values on a GPU, and few on a CPU, whose heap keeps what it had."""
    most = 1 << 22 if weight.device.type == "cuda" else 1 << 18
    count = max(1, most // len(weight))
    return [slice(first, first + count) for first in range(0, weight.shape[1], count)]


class Quantizer:
    """Reads matrices as int8, a few columns at a time in fp32, and keeps account of what that costs in precision."""

    def __init__(self, reader: ShardReader, device: torch.device) -> None:
        self.reader = reader
        self.device = device
        self.errors: list[float] = []  # of `relative_error`, one a matrix

    def read(self, spec: WeightSpec) -> Int8Matrix:
        """This rank's shard, quantized on the device; axes after the first are one. Raises ValueError on a wrong file.

        A column split over ranks needs the other ranks' largest values: they are read from those ranks' files. That
        reads 5/12 of the layers tp times, from the page cache where ranks share a host; asking the ranks themselves
        would make loading collective, and a rank that cannot read its files could no longer say so by itself.
        """
        weight = self._map(spec, self.reader.tp_rank)
        column_max = _column_max(weight)
        if spec.split_axis == 0:
            for rank in range(self.reader.config.tensor_para_size):
                if rank != self.reader.tp_rank:
                    column_max = torch.maximum(column_max, _column_max(self._map(spec, rank)))
        matrix = quantize(weight, column_max)
        self.errors.append(relative_error(matrix, weight))
        return matrix

    def _map(self, spec: WeightSpec, rank: int) -> torch.Tensor:
        return self.reader.map(spec, rank).flatten(1).to(self.device)

    def report(self) -> None:
        """Log how many matrices there are and how far they lie from their originals."""
        mean, largest = sum(self.errors) / len(self.errors), max(self.errors)
        _LOG.info(
            "int8: %d matrices quantized, relative error %.2e at most, %.2e mean", len(self.errors), largest, mean
        )


def _column_max(weight: torch.Tensor) -> torch.Tensor:
    """[out] fp32, the largest |w| along the first axis, without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0)).float()


class GpuProduct:
    """x [rows, in] bf16 or fp16 → x · W + b on a GPU, int8 all the way into the registers; fp32 through torch."""

    def __init__(self, matrix: Int8Matrix) -> None:
        self._matrix = matrix
        self._counters = int8_linear.make_counters(matrix.values.device)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_linear.int8_linear(x, self._matrix.values, self._matrix.scales, bias, self._counters)


class CpuProduct:
    """x [rows, in] fp32 or bf16 → x · W + b on a CPU, through oneDNN's product of uint8 by int8, without loss.

    A row of activations is written as 24-bit integers (16-bit for bf16) times a step of its own, those as three (two)
    digits to base 256, and each digit is a row of uint8 whose product with the weights is exact in int32. The weights
    are so read once, as bytes, and the result is as near as an fp32 product's (at 768 inputs 1.4e-7 against 2.6e-7;
    2e-6 in a row with one value 100 times the others).
    """

    def __init__(self, matrix: Int8Matrix) -> None:
        num_out = len(matrix.scales)
        self._scales = matrix.scales
        self._packed = torch.ops.onednn.qlinear_prepack(matrix.values, None)
        # Digits are stored 128 too large. To take that off here is quicker than oneDNN's zero points.
        self._excess = matrix.values.sum(1, dtype=torch.int32).mul_(-128).float()
        self._ones, self._zeros = torch.ones(num_out), torch.zeros(num_out, dtype=torch.int64)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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

    x ≈ steps · Σ (digit - 128) · 256^i, to half a step: 6e-8 of the row's largest value, 1.5e-5 for bf16.
    """
    # The largest integer whose digits all fit, a little less for what multiplying rounds up, and 128 for each digit.
    count, top, offset = (2, 0x7F7E, 0x8080) if x.dtype == torch.bfloat16 else (3, 0x7F7F70, 0x808080)
    x = x.float()
    largest = x.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny * 2**24)
    integers = (x * (top / largest)).round_().to(torch.int32).add_(offset)
    as_bytes = integers.view(torch.uint8).unflatten(1, (-1, 4))  # the lowest first
    return as_bytes[..., :count].flip(-1).permute(2, 0, 1).contiguous(), largest / top


class WideningProduct:
    """x · W + b by widening W at every call: for CPUs whose products of integers would saturate, or that have none."""

    def __init__(self, matrix: Int8Matrix) -> None:
        self._matrix = matrix

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_linear.reference(x, self._matrix.values, self._matrix.scales, bias)


def product(matrix: Int8Matrix) -> GpuProduct | CpuProduct | WideningProduct:
    """How to multiply by the matrix where it lies."""
    if matrix.values.device.type == "cuda":
        return GpuProduct(matrix)
    # Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow.
    return CpuProduct(matrix) if torch.cpu._is_vnni_supported() else WideningProduct(matrix)
