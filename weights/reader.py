"""Reads one tensor-parallel rank's shards from a weight folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from weights.model_config import ModelConfig
from weights.read_ahead import FileRange, ReadAhead
from weights.table import WeightSpec

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CPU = torch.device("cpu")


class ShardReader:
    """Reads one tp rank's weights from a converted folder onto a device, checking each file's size.

    On a CPU, tensors are memory-mapped unless their dtype changes: ranks share the memory of a file that all of them
    read. For a GPU, `read_ahead` is several times as fast.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, tp_rank: int, dtype: torch.dtype, device: torch.device = _CPU
    ) -> None:
        self.folder = folder
        self.config = config
        self.tp_rank = tp_rank
        self.dtype = dtype
        self.device = device
        self.file_dtype = TORCH_DTYPES[config.weight_data_type]
        self._ahead: ReadAhead | None = None

    @contextmanager
    def read_ahead(self, order: Iterable[FileRange]) -> Iterator[None]:
        """Within this, threads read the files; those in `order` before they are asked for.

        order: ranges of `locate`, in the order in which they will be read, each once.
        """
        self._ahead = ReadAhead(self.device, order)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def has(self, spec: WeightSpec) -> bool:
        """Whether the folder has a file for this weight."""
        return (self.folder / spec.file_name(self.tp_rank)).exists()

    def read(self, spec: WeightSpec, rows: slice = slice(None)) -> torch.Tensor:
        """This rank's shard in the computation's dtype, on the device. Raises ValueError on a wrong file.

        rows: of the first axis, as many as there are; no others are read.
        """
        return self._get(spec, self.tp_rank, rows).to(self.dtype)

    def map(self, spec: WeightSpec, tp_rank: int | None = None) -> torch.Tensor:
        """This rank's shard, or another's, in the file's dtype, on the device; on a CPU read-only by convention."""
        return self._get(spec, self.tp_rank if tp_rank is None else tp_rank, slice(None))

    def locate(self, spec: WeightSpec, rows: slice = slice(None), tp_rank: int | None = None) -> FileRange:
        """The bytes of a shard, or of rows of it. Raises ValueError on a missing file or a wrong size."""
        path = self.folder / spec.file_name(self.tp_rank if tp_rank is None else tp_rank)
        shape = spec.shard_shape(self.config.tensor_para_size)
        expected = math.prod(shape) * self.file_dtype.itemsize
        try:
            actual = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: the file is missing") from None
        if actual != expected:
            raise ValueError(
                f"{path}: {actual} bytes, but shape {list(shape)} in {self.config.weight_data_type} takes {expected}"
            )
        first, end, _ = rows.indices(shape[0])
        row_bytes = expected // shape[0]
        return FileRange(path, first * row_bytes, max(0, end - first) * row_bytes)

    def _get(self, spec: WeightSpec, tp_rank: int, rows: slice) -> torch.Tensor:
        part = self.locate(spec, rows, tp_rank)
        shape = spec.shard_shape(self.config.tensor_para_size)
        shape = (len(range(*rows.indices(shape[0]))), *shape[1:])
        if self._ahead is not None:
            return self._ahead.take(part).view(self.file_dtype).view(shape)
        itemsize = self.file_dtype.itemsize
        first, end = part.start // itemsize, (part.start + part.size) // itemsize
        elements = torch.from_file(str(part.path), size=end, dtype=self.file_dtype)
        return elements[first:].view(shape).to(self.device)
