"""The decode rows that go on by themselves, step after step."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import numpy as np

from engine.sequence import Sequence, SequenceGroup

_num_computed = attrgetter("num_computed")


class DecodeRows:
    """A row for each sequence of the steady groups: every step computes its next token and samples the one after it.

    The longest sequences come first: the attention of the last row to start is the shortest. All rows grow alike, so
    their order and their arrays are made again only after a group came or went.
    """

    def __init__(self, slot_type: np.dtype) -> None:
        self._slot_type = slot_type
        self._sequences: list[Sequence] = []
        self._slots = np.empty(0, dtype=slot_type)
        self._positions = np.empty(0, dtype=np.int32)
        self._is_stale = False

    def add(self, group: SequenceGroup) -> None:
        """Let a group be steady."""
        self._is_stale |= not group.is_steady
        group.is_steady = True

    def remove(self, group: SequenceGroup) -> None:
        """Let a group not be steady any more, if it is."""
        self._is_stale |= group.is_steady
        group.is_steady = False

    def step(self, groups: Iterable[SequenceGroup]) -> tuple[np.ndarray, np.ndarray, list[Sequence | None]]:
        """Slots, positions and sequences of the next step's rows; counts these tokens. groups: the cohort's."""
        if self._is_stale:
            self._arrange(groups)
        for sequence in self._sequences:
            sequence.num_computed += 1
        positions = self._positions
        self._positions = positions + 1
        return self._slots, positions, list(self._sequences)

    def _arrange(self, groups: Iterable[SequenceGroup]) -> None:
        sequences = [sequence for group in groups if group.is_steady for sequence in group.sequences]
        sequences.sort(key=_num_computed, reverse=True)  # stable: samples of one request stay neighbours
        self._sequences = sequences
        self._slots = np.array([sequence.seq_slot for sequence in sequences], dtype=self._slot_type)
        self._positions = np.array([sequence.num_computed for sequence in sequences], dtype=np.int32)
        self._is_stale = False
