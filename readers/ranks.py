"""The files of Megatron's ranks: the grid of their names, and the tensors of one file. It knows no table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from readers.archive import Place
from readers.shards import Shard
from readers.torchfile import load, tensors


class RankFile:
    """One rank's file of torch.save; `state` takes the (nested) state dict out of its content."""

    def __init__(self, place: Place, state: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self.name = place.name
        self._place = place
        self._state = state

    def headers(self) -> Iterator[Shard]:
        """Every tensor, in the file's order."""
        for stored, tensor in tensors(self._state(load(self._place)[0]), self.name):
            yield Shard(stored, tuple(tensor.shape), tensor.dtype)

    def open(self) -> tuple[Callable[[str], torch.Tensor], bool]:
        """A function that returns a tensor by name, and whether tensors view the mapped file (else it is in memory)."""
        content, is_mapped = load(self._place)
        return dict(tensors(self._state(content), self.name)).__getitem__, is_mapped


def find_grid(names: Iterable[str], source: object, wanted: re.Pattern[str]) -> list[list[str]]:
    """The files of a checkpoint by [pp rank][tp rank], out of names such as tp_rank_00_pp_rank_001/model.ckpt.

    `wanted` matches the file's own name. Raises ValueError, with the `source`, where there is none, where a rank has
    two, and where one is missing.
    """
    folders = re.compile(r"(?:mp_rank_(\d+)(?:_(\d+))?|tp_rank_(\d+)_pp_rank_(\d+))/([^/]+)")
    grid: dict[tuple[int, int], str] = {}
    for name in names:
        found = folders.fullmatch(name)
        if wanted.fullmatch(found[5] if found else name):
            tp_rank, pp_rank = (int(found[1] or found[3]), int(found[2] or found[4] or 0)) if found else (0, 0)
            if (pp_rank, tp_rank) in grid:
                raise ValueError(f"{source}: both {grid[pp_rank, tp_rank]} and {name} are there")
            grid[pp_rank, tp_rank] = name
    if not grid:
        raise ValueError(f"{source}: no weight file of a rank ({wanted.pattern}) is there")
    pp, tp = (max(ranks) + 1 for ranks in zip(*grid, strict=True))
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            if (pp_rank, tp_rank) not in grid:
                raise ValueError(
                    f"{source}: no file of tensor-parallel rank {tp_rank}, pipeline-parallel rank {pp_rank}, "
                    f"where others make it {tp} × {pp} ranks"
                )
    return [[grid[pp_rank, tp_rank] for tp_rank in range(tp)] for pp_rank in range(pp)]
