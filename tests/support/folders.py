"""Converted weight folders as tests compare them: bytes of the files, config.ini, numbers as they are on disk."""

from __future__ import annotations

import configparser
from pathlib import Path

import numpy as np


def cast(array: np.ndarray, data_type: str) -> np.ndarray:
    """float32 → what is on disk, with numpy alone; bf16 is rounded to nearest even by hand."""
    if data_type != "bf16":
        return array.astype({"fp32": np.float32, "fp16": np.float16}[data_type])
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def weight_files(folder: Path) -> dict[str, bytes]:
    """Every weight file's bytes, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def config_ini(folder: Path) -> dict[str, str]:
    """The section [gpt] of config.ini."""
    parser = configparser.ConfigParser()
    parser.read(folder / "config.ini")
    return dict(parser["gpt"])
