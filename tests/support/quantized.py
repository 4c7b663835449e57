"""FasterTransformer's weight-only int8, and fp8 (e4m3): by their definitions and with numpy alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from weights.model_config import ModelConfig
from weights.table import layer_specs


def by_definition(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """symmetric_quantize of FasterTransformer's cutlass_preprocessors.cc: (integers [in, out], scales [out])."""
    integers = np.zeros(weight.shape, dtype=np.int8)
    scales = np.float32(1 / 128) * np.abs(weight).max(0)
    for column, scale in enumerate(scales):
        for row, value in enumerate(weight[:, column]):
            if scale > 0:
                scaled = float(value / scale)
                nearest = np.copysign(np.floor(abs(scaled) + 0.5), scaled)  # C's round
                integers[row, column] = max(-128, min(127, nearest))
    return integers, scales


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of three bits after the first, halves to even; none is finer than 2^-9 or above 448."""
    exponents = np.floor(np.log2(np.abs(x), where=x != 0, out=np.full(x.shape, -6.0, x.dtype)))
    steps = (2.0 ** (np.maximum(exponents, -6) - 3)).astype(x.dtype)
    return np.clip(np.rint(x / steps) * steps, -448, 448)


def fp8_by_definition(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3's numbers [in, out], scales [out]): each column's largest |w| becomes 448."""
    scales = np.abs(weight).max(0) / np.float32(448)
    return nearest_e4m3(weight / np.where(scales > 0, scales, np.float32(1))), scales


def write_dequantized(
    original: Path,
    folder: Path,
    quantize: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = by_definition,
) -> Path:
    """A copy of a folder for tp 1 with the values that quantized numbers stand for in its files, by numpy."""
    shutil.copytree(original, folder)
    config = ModelConfig.read(folder / "config.ini")
    for layer in range(config.num_layer):
        for spec in layer_specs(config, layer):
            if spec.is_matrix:
                path = folder / spec.file_name(0)
                weight = np.fromfile(path, dtype=np.float32).reshape(spec.shape[0], -1)
                values, scales = quantize(weight)
                (values * scales).tofile(path)
    return folder
