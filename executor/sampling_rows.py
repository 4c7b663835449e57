"""The rows of logits that tokens are chosen from, with the parameters of each row's slot."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch

from executor.slots import SlotRequest, SlotState
from kernels.slot_parameters import Parameter


class SamplingRows:
    """Rows of logits: the slot of each, and the position of the token to choose.

    seq_slots, positions: [rows] int64 of the host; banned_ids: seq_slot → ids banned in this step.
    """

    def __init__(
        self,
        state: SlotState,
        seq_slots: np.ndarray,
        positions: np.ndarray,
        banned_ids: Mapping[int, list[int]] | None = None,
    ) -> None:
        self.state = state
        self.seq_slots = seq_slots
        self.positions = positions
        self.banned_ids = banned_ids or {}

    def __len__(self) -> int:
        return len(self.seq_slots)

    def part(self, index: slice | np.ndarray) -> SamplingRows:
        """Some of the rows."""
        return SamplingRows(self.state, self.seq_slots[index], self.positions[index], self.banned_ids)

    @cached_property
    def requests(self) -> list[SlotRequest]:
        """Per row."""
        return [self.state.requests[seq_slot] for seq_slot in self.seq_slots.tolist()]

    @cached_property
    def on_device(self) -> torch.Tensor:
        """[2, rows] int64: slots, positions."""
        return self.state.tensor(np.stack([self.seq_slots, self.positions]))

    def column(self, parameter: Parameter, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """[rows, 1]: one parameter of each row."""
        return self._parameters[:, parameter, None].to(dtype)

    def beyond_kernels(self) -> np.ndarray:
        """The rows for which kernels.choose_tokens cannot choose: what it needs of them is not on the device."""
        is_beyond = self.state.has_long_list[self.seq_slots]
        if self.banned_ids:
            is_beyond = is_beyond | np.isin(self.seq_slots, list(self.banned_ids))
        return np.flatnonzero(is_beyond)

    def with_bans(self) -> list[int]:
        """The rows that have banned tokens."""
        has_bans = self.positions < self.state.unbanned_from[self.seq_slots]
        if self.banned_ids:
            has_bans |= np.isin(self.seq_slots, list(self.banned_ids))
        return np.flatnonzero(has_bans).tolist()

    @cached_property
    def _parameters(self) -> torch.Tensor:
        return self.state.parameters[self.on_device[0]]
