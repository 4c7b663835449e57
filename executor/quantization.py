"""Weights of one byte: quantizes the layers' matrices while they are read. executor/matmul.py multiplies by them.

Stateless: this module knows no layer and talks to no other rank. Each output column has a scale, in fp32:

- int8 is FasterTransformer's symmetric_quantize_last_axis_of_batched_matrix (cutlass_preprocessors.cc,
  symmetric_quantize): scale = max|w| / 128; w / scale is rounded to the nearest integer, halves away from zero, and
  clamped to [-128, 127].
- w8a8 has int8's numbers, and rounds what it multiplies to int8 as well.
- fp8 is e4m3: scale = max|w| / 448, so the largest value becomes e4m3's largest; w / scale is rounded to the nearest
  number, halves to even.

The values of the file are quantized directly, without rounding to the computation's dtype first. Where ranks share a
column, the scale comes from the largest value of the whole column, not of one rank's part, so every tp computes with
the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.fp8 import FP8, FP8_MAX, to_fp8
from weights.reader import ShardReader
from weights.table import WeightSpec


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [in, out] as int8 or fp8, [out, in] for reading along a column; scales [out] fp32.

    rounds_rows: the rows that it multiplies are rounded to int8 as well (W8A8).
    """

    values: torch.Tensor
    scales: torch.Tensor
    rounds_rows: bool = False

    def dequantize(self) -> torch.Tensor:
        """[in, out] fp32"""
        return (self.values.float() * self.scales[:, None]).t()


def quantize(weight: torch.Tensor, column_max: torch.Tensor, weight_format: str) -> QuantizedMatrix:
    """weight: [in, out] of any float dtype, or rows of it; column_max: [out], the largest |w| of each column.

    weight_format: int8, w8a8 or fp8.
    """
    dtype, largest, round_part = _FORMATS[weight_format]
    scales = column_max.float() / torch.full_like(column_max, largest, dtype=torch.float32)  # by a scalar, a GPU rounds
    values = torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device)
    for part in _parts(weight):
        steps = scales[part].where(scales[part] > 0, 1)  # a column of zeros stays one
        values[part] = round_part(weight[:, part], steps).t()
    return QuantizedMatrix(values, scales, weight_format == "w8a8")


def _round_to_integers(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """weight / steps as int8's integers, fp32: halves away from zero, which torch.round does not."""
    integers = weight.float() / steps
    nearest = integers.trunc()
    nearest += integers.sub_(nearest).mul_(2).trunc_()
    return nearest.clamp_(-128, 127)


# dtype, what a column's largest |w| becomes, and the rounding.
_INT8 = torch.int8, 128.0, _round_to_integers
_FORMATS = {"int8": _INT8, "w8a8": _INT8, "fp8": (FP8, FP8_MAX, to_fp8)}


def _parts(weight: torch.Tensor) -> list[slice]:
    """Column ranges to widen to fp32 at a time: 4 million values on a GPU; fewer on a CPU, whose heap never shrinks."""
    most = 1 << 22 if weight.device.type == "cuda" else 1 << 18
    count = max(1, most // len(weight))
    return [slice(first, first + count) for first in range(0, weight.shape[1], count)]


def read_quantized(reader: ShardReader, spec: WeightSpec, weight_format: str, device: torch.device) -> QuantizedMatrix:
    """This rank's shard, quantized on the device; axes after the first are one. Raises ValueError on a wrong file.

    Only this matrix is on the device in the file's dtype, and a few columns at a time in fp32. A column split over
    ranks needs the other ranks' largest values, which come from those ranks' files. That reads 5/12 of the layers tp
    times, from the page cache where ranks share a host. A collective instead would make loading collective: a rank that
    cannot read its files could not report that alone.
    """

    def shard(rank: int) -> torch.Tensor:
        return reader.map(spec, rank).flatten(1).to(device)

    weight = shard(reader.tp_rank)
    column_max = largest_of_columns(weight)
    if spec.split_axis == 0:
        for rank in range(reader.config.tensor_para_size):
            if rank != reader.tp_rank:
                column_max = torch.maximum(column_max, largest_of_columns(shard(rank)))
    return quantize(weight, column_max, weight_format)


def largest_of_columns(weight: torch.Tensor) -> torch.Tensor:
    """[out] fp32, the largest |w| along the first axis, without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0)).float()
