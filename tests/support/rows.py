"""Rows of logits for the tests of sampling: each has a slot of its own in a state that nothing else uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.plan import NewSequences
from engine.request import SamplingParams
from executor.sampler import sample
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState
from kernels.gumbel import as_int64


@dataclass(frozen=True)
class Row:
    """A request of one sample, and the position of the token to choose."""

    params: SamplingParams
    end_ids: tuple[int, ...] = ()
    prompt_len: int = 0
    position: int = 0
    banned: Sequence[int] = ()  # in this step
    always_banned: list[int] = field(default_factory=list)


def sampling_rows(rows: Sequence[Row], history: torch.Tensor | None = None) -> SamplingRows:
    """history: [rows or 1, any] int64, each row's tokens so far and whatever is behind them."""
    longest = max([1, *(row.prompt_len for row in rows), *([] if history is None else [history.shape[1]])])
    state = SlotState(len(rows), longest, 1, 0, torch.device("cpu"))
    state.start(
        [
            NewSequences([slot], [0] * row.prompt_len, row.params, row.end_ids, [[]], row.always_banned)
            for slot, row in enumerate(rows)
        ]
    )
    if history is not None:
        state.token_ids[: len(rows), : history.shape[1]] = history
    positions = np.array([row.position for row in rows])
    banned = {slot: list(row.banned) for slot, row in enumerate(rows) if row.banned}
    return SamplingRows(state, np.arange(len(rows)), positions, banned)


def set_seeds(rows: SamplingRows, seeds: Sequence[int]) -> None:
    """Other random seeds, one per row."""
    rows.state.seeds[: len(rows)] = torch.tensor([as_int64(seed) for seed in seeds])


def sample_rows(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """`sample`, of rows without a history."""
    rows = [Row(own, position=position) for own, position in zip(params, positions, strict=True)]
    return sample(logits, sampling_rows(rows))
