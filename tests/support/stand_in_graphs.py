"""The way of a step through graphs, on a CPU: a graph's stand-in computes the step anew when it is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

import executor.draft_graphs
import executor.graphs
import executor.prompt_graphs
from executor import runner

KINDS = {"decode steps", "steps with prompts"}
Replays = list[tuple[str, int]]  # kinds and sizes


class StandInGraph:
    """Computes what a CUDA graph of the same size would."""

    def __init__(self, name: str, size: int, step: Callable[[int], torch.Tensor], replayed: Replays) -> None:
        self._key = name, size
        self._step = step
        self._replayed = replayed
        self.values = step(size).clone()

    def replay(self) -> None:
        self._replayed.append(self._key)
        self.values.copy_(self._step(self._key[1]))


@contextmanager
def stand_in_graphs() -> Iterator[Replays]:
    """Executors that are prepared in here have them. Gives the list of all replays."""
    replayed: Replays = []

    def capture(name: str, sizes: Sequence[int], step: Callable[[int], torch.Tensor], device: torch.device) -> Any:
        graphs = {size: StandInGraph(name, size, step, replayed) for size in sizes}
        return {size: (graph, graph.values) for size, graph in graphs.items()}

    with ExitStack() as patches:
        patches.enter_context(patch.object(runner, "runs_on", lambda device: True))
        for module in (executor.graphs, executor.prompt_graphs, executor.draft_graphs):
            patches.enter_context(patch.object(module, "capture", capture))
            patches.enter_context(patch.object(module, "release", lambda graphs, device: None))
        yield replayed
