"""FasterTransformer's weight-only int8, by its definition and with numpy alone."""

from __future__ import annotations

import shutil
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


def write_dequantized(original: Path, folder: Path) -> Path:
    """A copy of a folder for tp 1 with the values that int8 stands for in its files, by numpy."""
    shutil.copytree(original, folder)
    config = ModelConfig.read(folder / "config.ini")
    for layer in range(config.num_layer):
        for spec in layer_specs(config, layer):
            if spec.is_matrix:
                path = folder / spec.file_name(0)
                weight = np.fromfile(path, dtype=np.float32).reshape(spec.shape[0], -1)
                integers, scales = by_definition(weight)
                (integers * scales).tofile(path)
    return folder
