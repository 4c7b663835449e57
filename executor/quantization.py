"""Weight-only int8: quantizes the layers' matrices while they are read. executor/matmul.py multiplies by them.

Stateless per matrix: this module knows no layer and talks to no other rank.

The scheme is FasterTransformer's symmetric_quantize_last_axis_of_batched_matrix (cutlass_preprocessors.cc,
symmetric_quantize): for each output column, scale = max|w| / 128; w / scale is rounded to the nearest integer, halves
away from zero, and clamped to [-128, 127]. It differs in two ways. The values of the file are quantized directly,
without rounding to the computation's dtype first, and scales stay fp32. Where ranks share a column, the scale comes
from the largest value of the whole column, not of one rank's part, so every tp computes with the same weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

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
    """Column ranges to widen to fp32 at a time: 4 million values on a GPU; fewer on a CPU, whose heap never shrinks."""
    most = 1 << 22 if weight.device.type == "cuda" else 1 << 18
    count = max(1, most // len(weight))
    return [slice(first, first + count) for first in range(0, weight.shape[1], count)]


class Quantizer:
    """Reads matrices as int8, a few columns at a time in fp32, and records the relative error of each."""

    def __init__(self, reader: ShardReader, device: torch.device) -> None:
        self.reader = reader
        self.device = device
        self.errors: list[float] = []  # of `relative_error`, one a matrix

    def read(self, spec: WeightSpec) -> Int8Matrix:
        """This rank's shard, quantized on the device; axes after the first are one. Raises ValueError on a wrong file.

        A column split over ranks needs the other ranks' largest values, which come from those ranks' files. That reads
        5/12 of the layers tp times, from the page cache where ranks share a host. A collective instead would make
        loading collective: a rank that cannot read its files could not report that alone.
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
        """Log the number of matrices and their relative errors."""
        mean, largest = sum(self.errors) / len(self.errors), max(self.errors)
        _LOG.info(
            "int8: %d matrices quantized, relative error %.2e at most, %.2e mean", len(self.errors), largest, mean
        )


def _column_max(weight: torch.Tensor) -> torch.Tensor:
    """[out] fp32, the largest |w| along the first axis, without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0)).float()
