"""Parts of the running requests that are planned in turn, one for each pipeline stage.

Stages compute different plans at the same time. A sequence's next plan needs its token of the last one, which comes
from the last stage. Meanwhile the first stage computes the plans of the other cohorts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.decode_rows import DecodeRows
from engine.request import Request
from engine.sequence import SequenceGroup

FEW = 16  # requests; fewer begin in one cohort


def may_fit(num_running: int) -> int:
    """How many requests may fit where so many do.

    Of many a quarter more: few plans suffice for all, and cohorts stay about as large where no more fit. Of few one
    more: several cohorts do not pay for those that do not come.
    """
    return num_running + 1 + (num_running // 4 if num_running >= FEW else 0)


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

    def move(self, count: int, other: Cohort, running: Mapping[Request, SequenceGroup]) -> None:
        """Let the newest requests run in another cohort. running: all that run, in their order."""
        if not count:
            return
        other.committed_at = max(other.committed_at, self.committed_at)  # when the moved ones' last tokens came
        for group in list(self.groups.values())[-count:]:
            self.leave(group)
            other.enter(group)
        other.groups = {request: group for request, group in running.items() if request in other.groups}


class Cohorts(list[Cohort]):
    """All cohorts. They are about as large: a cohort takes no more than its share of all requests.

    Few requests are in one cohort. Several cohorts cost the time of the slowest stage for each of them, and the last
    stage has the LM head besides its layers. What they save is the time of each row, which is little for few rows.

    In all methods, most_running: the requests that run, or would if their cohorts took all that wait and fit.
    """

    def __init__(self, count: int, slot_type: np.dtype) -> None:
        super().__init__(Cohort(index, slot_type) for index in range(count))
        self._turn = 0

    def next(self) -> Cohort:
        """The cohort whose turn it is."""
        self._turn = (self._turn + 1) % len(self)
        return self[self._turn]

    def num_busy(self, most_running: int) -> int:
        """Cohorts that have requests, or get some; at least 1."""
        if most_running >= FEW:
            return len(self)
        return max(1, sum(bool(cohort.groups) for cohort in self))

    def has_room(self, cohort: Cohort, most_running: int) -> bool:
        """Whether a cohort may take one more request."""
        if most_running >= FEW:
            return len(cohort.groups) * len(self) < most_running
        return bool(cohort.groups) or not any(other.groups for other in self)

    def balance(self, running: Mapping[Request, SequenceGroup], most_running: int) -> None:
        """Move requests where cohorts have become too different, or all requests into one where they have become few.

        A move makes the first stage wait once. running: all that run, in their order.
        """
        by_size = sorted(self, key=lambda cohort: len(cohort.groups))
        smallest, largest = by_size[0], by_size[-1]
        if most_running < FEW // 2:
            for cohort in by_size[:-1]:
                cohort.move(len(cohort.groups), largest, running)
            return
        share = -(-most_running // len(self))
        if most_running >= FEW and len(largest.groups) > 1.25 * share + 1:
            largest.move(min(len(largest.groups) - share, share - len(smallest.groups)), smallest, running)
