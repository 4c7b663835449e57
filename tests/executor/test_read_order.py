"""The order in which a rank's weights are read ahead is that in which its GPT reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config import ParallelConfig
from executor.model import GPT, read_order
from weights.model_config import ModelConfig
from weights.read_ahead import FileRange, ReadAhead
from weights.reader import ShardReader

CPU = torch.device("cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[FileRange]:
    """The ranges that are asked for."""
    ranges: list[FileRange] = []
    take = ReadAhead.take

    def recorded(self: ReadAhead, wanted: FileRange) -> torch.Tensor:
        ranges.append(wanted)
        return take(self, wanted)

    monkeypatch.setattr(ReadAhead, "take", recorded)
    return ranges


@pytest.mark.parametrize(
    ("tp", "pp", "rank", "weight_format"),
    [(1, 1, 0, "none"), (1, 1, 0, "int8"), (2, 1, 1, "none"), (1, 2, 1, "none"), (2, 2, 1, "none")],
)
def test_order_is_that_of_the_model(
    tp: int, pp: int, rank: int, weight_format: str, converted: Callable[[int], Path], taken: list[FileRange]
) -> None:
    parallel = ParallelConfig(tp, pp, rank)
    config = ModelConfig.read(converted(tp) / "config.ini")
    reader = ShardReader(converted(tp), config, parallel.tp_rank, torch.float32)
    order = list(read_order(reader, parallel))
    comm: Any = SimpleNamespace(parallel=parallel)
    with reader.read_ahead(order):
        GPT(comm, reader, CPU, lambda: None, weight_format)
    assert [part for part in taken if part in order] == order
    unordered = {part.path.name for part in taken if part not in order}
    assert unordered <= {"model.wpe.bin", "model.final_layernorm.weight.bin", "model.final_layernorm.bias.bin"}
