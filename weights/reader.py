"""Reads one tensor-parallel rank's shards from a weight folder."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from weights.model_config import ModelConfig
from weights.table import WeightSpec

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ShardReader:
    """Reads one tp rank's weights from a converted folder, checking each file's size.

    Tensors are memory-mapped unless their dtype changes: a caller that takes rows of the embedding reads only
    those rows.
    """

    def __init__(self, folder: Path, config: ModelConfig, tp_rank: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.config = config
        self.tp_rank = tp_rank
        self.dtype = dtype
        self.file_dtype = TORCH_DTYPES[config.weight_data_type]

    def has(self, spec: WeightSpec) -> bool:
        """Whether the folder has a file for this weight."""
        return (self.folder / spec.file_name(self.tp_rank)).exists()

    def read(self, spec: WeightSpec) -> torch.Tensor:
        """This rank's shard in the computation's dtype, on the CPU. Raises ValueError on a wrong file."""
        return self.map(spec).to(self.dtype)

    def map(self, spec: WeightSpec, tp_rank: int | None = None) -> torch.Tensor:
        """This rank's shard, or another's, in the file's dtype, memory-mapped, read-only by convention."""
        path = self.folder / spec.file_name(self.tp_rank if tp_rank is None else tp_rank)
        shape = spec.shard_shape(self.config.tensor_para_size)
        count = math.prod(shape)
        expected = count * self.file_dtype.itemsize
        try:
            actual = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: the file is missing") from None
        if actual != expected:
            raise ValueError(
                f"{path}: {actual} bytes, but shape {list(shape)} in {self.config.weight_data_type} takes {expected}"
            )
        return torch.from_file(str(path), size=count, dtype=self.file_dtype).view(shape)
