"""Parts of the running requests that are planned in turn, one for each pipeline stage.

Stages compute different plans at the same time. A sequence's next plan needs its token of the last one, which comes
from the last stage. Meanwhile the first stage computes the plans of the other cohorts.
"""

from __future__ import annotations

import numpy as np

from engine.decode_rows import DecodeRows
from engine.request import Request
from engine.sequence import SequenceGroup


class Cohort:
    """Some of the running requests, in the order in which they entered first."""

    def __init__(self, index: int, slot_type: np.dtype) -> None:
        self.rows = DecodeRows(slot_type)
        self.groups: dict[Request, SequenceGroup] = {}
        self.committed_at = 0.0  # when its last tokens came
        self._index = index

    def enter(self, group: SequenceGroup) -> None:
        """Let a request run in this cohort."""
        group.cohort = self._index
        self.groups[group.request] = group

    def leave(self, group: SequenceGroup) -> None:
        """Note that a request of this cohort runs no more."""
        self.rows.remove(group)
        del self.groups[group.request]


class Cohorts(list[Cohort]):
    """All cohorts. They are about as large: a cohort takes no more than its share of all requests."""

    def __init__(self, count: int, slot_type: np.dtype) -> None:
        super().__init__(Cohort(index, slot_type) for index in range(count))
        self._turn = 0

    def next(self) -> Cohort:
        """The cohort whose turn it is."""
        self._turn = (self._turn + 1) % len(self)
        return self[self._turn]

    def num_busy(self, num_waiting: int) -> int:
        """Cohorts that have requests, or get some of those that wait; at least 1."""
        return max(1, min(sum(bool(cohort.groups) for cohort in self) + num_waiting, len(self)))
