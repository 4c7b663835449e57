"""ParallelConfig and EngineConfig: the grid of ranks, stages of layers, flags, limits."""

from __future__ import annotations

import argparse

import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.flags import add_flags, from_flags


def test_rank_grid_is_fastertransformers() -> None:
    places = [(p.tp_rank, p.pp_rank) for p in (ParallelConfig(2, 3, rank) for rank in range(6))]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert list(ParallelConfig(2, 3, 3).layers(6)) == [2, 3]
    assert (ParallelConfig(2, 3, 1).is_first_stage, ParallelConfig(2, 3, 4).is_last_stage) == (True, True)


@pytest.mark.parametrize(
    ("num_layer", "pp", "expected"),
    [
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (4, 3, [[0, 1], [2], [3]]),
        (7, 4, [[0, 1], [2, 3], [4, 5], [6]]),
        (3, 3, [[0], [1], [2]]),
    ],
)
def test_stages_differ_by_one_layer_at_most(num_layer: int, pp: int, expected: list[list[int]]) -> None:
    for tp in (1, 2):
        stages = [list(ParallelConfig(tp, pp, tp * stage).layers(num_layer)) for stage in range(pp)]
        assert stages == expected
    assert [list(ParallelConfig(1, pp).layers(num_layer, stage)) for stage in range(pp)] == expected


def test_more_stages_than_layers_name_the_limit() -> None:
    with pytest.raises(ValueError, match="pp 7 is above this model's 6 layers; possible: 1 to 6$"):
        ParallelConfig(1, 7, 0).layers(6)


def test_flags_come_from_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, "engine")
    config = from_flags(EngineConfig, parser.parse_args(["--max-batch-size", "7", "--data-type", "bf16"]))
    assert config == EngineConfig(max_batch_size=7, data_type="bf16")
    with pytest.raises(ValueError, match="max_batch_size is 0; it must be at least 1"):
        from_flags(EngineConfig, parser.parse_args(["--max-batch-size", "0"]))
