"""A rank's shards: rows and other ranks' files, mapped or read in threads; files of a wrong size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from weights.model_config import ModelConfig
from weights.reader import ShardReader
from weights.table import WeightSpec, weight_specs

WTE = WeightSpec("wte", (303, 64))


def reader_of(folder: Path, tp_rank: int, dtype: torch.dtype = torch.float32) -> ShardReader:
    return ShardReader(folder, ModelConfig.read(folder / "config.ini"), tp_rank, dtype)


@pytest.mark.parametrize("is_ahead", [False, True], ids=["mapped", "in threads"])
def test_weights_are_those_of_the_files(is_ahead: bool, converted: Callable[[int], Path]) -> None:
    folder = converted(2)
    reader = reader_of(folder, 1, torch.float64)
    specs = [spec for spec in weight_specs(reader.config) if reader.has(spec)]
    with reader.read_ahead(map(reader.locate, specs)) if is_ahead else nullcontext():
        for spec in specs:
            written = np.fromfile(folder / spec.file_name(1), np.float32).reshape(spec.shard_shape(2))
            value = reader.read(spec)
            assert value.dtype == torch.float64
            np.testing.assert_array_equal(value.numpy(), written)
        other = next(spec for spec in specs if spec.split_axis == 0)
        written = np.fromfile(folder / other.file_name(0), np.float32).reshape(other.shard_shape(2))
        np.testing.assert_array_equal(reader.map(other, 0).numpy(), written)


@pytest.mark.parametrize("is_ahead", [False, True], ids=["mapped", "in threads"])
def test_rows_end_where_the_table_ends(is_ahead: bool, converted: Callable[[int], Path]) -> None:
    reader = reader_of(converted(1), 0)
    table = np.fromfile(converted(1) / "model.wte.bin", np.float32).reshape(303, 64)
    with reader.read_ahead([]) if is_ahead else nullcontext():
        for first, end in ((0, 303), (0, 7), (100, 250), (300, 310), (303, 400), (500, 600)):
            np.testing.assert_array_equal(reader.read(WTE, slice(first, end)).numpy(), table[first:end])
    assert reader.locate(WTE, slice(100, 250)).size == 150 * 64 * 4  # and no more is read


def test_wrong_files_are_refused_by_name(converted: Callable[[int], Path], tmp_path: Path) -> None:
    config = ModelConfig.read(converted(1) / "config.ini")
    reader = ShardReader(tmp_path, config, 0, torch.float32)
    with pytest.raises(ValueError, match=r"model.wte.bin: the file is missing"):
        reader.read(WTE)
    (tmp_path / "model.wte.bin").write_bytes(bytes(303 * 64 * 4 - 1))
    with pytest.raises(ValueError, match=r"77567 bytes, but shape \[303, 64\] in fp32 takes 77568"):
        reader.read(WTE)


def test_no_thread_is_left(converted: Callable[[int], Path]) -> None:
    """Also where loading fails."""
    reader = reader_of(converted(1), 0)
    with pytest.raises(RuntimeError, match="in between"), reader.read_ahead([reader.locate(WTE)]):
        reader.read(WTE)
        raise RuntimeError("in between")
    assert torch.equal(
        reader.read(WTE), torch.from_file(str(converted(1) / "model.wte.bin"), size=303 * 64).view(303, 64)
    )
