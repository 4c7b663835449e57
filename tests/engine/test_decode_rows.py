"""Decode rows go on by themselves: the longest come first, and what does not change is not made again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection

import pytest

from engine.decode_rows import DecodeRows
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import SequenceGroup
from tests.support.paper_device import PaperDevice


@pytest.fixture
def arrangements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many groups there were each time that the rows were made."""
    counts: list[int] = []
    arrange = DecodeRows._arrange

    def counted(self: DecodeRows, groups: Collection[SequenceGroup]) -> None:
        counts.append(len(groups))
        arrange(self, groups)

    monkeypatch.setattr(DecodeRows, "_arrange", counted)
    return counts


@pytest.mark.parametrize("num_blocks", [1000, 60])  # plenty; a few more than they need
def test_rows_are_made_once_while_all_go_on(arrangements: list[int], num_blocks: int) -> None:
    s, device = Scheduler(8, 1000, 1000, 4, num_blocks), PaperDevice(4)
    requests = [Request([index] * (index + 2), SamplingParams(20), ()) for index in range(8)]
    for request in requests:
        s.add(request)
    for _ in range(20):
        s.commit(device.execute(s.schedule()))
    assert all(request.is_finished for request in requests)
    assert arrangements == [8]
    s.add(Request([1], SamplingParams(3), ()))
    while s.has_work:
        s.commit(device.execute(s.schedule()))
    assert arrangements == [8, 0, 1]  # all were gone; the new one


def test_the_longest_come_first_and_samples_are_neighbours() -> None:
    rng = random.Random(0)
    s, device = Scheduler(64, 1000, 200, 4, 5000), PaperDevice(4)
    owners: dict[int, Request] = {}  # by slot
    num_rows = 0
    for step in range(300):
        if step < 200 and rng.random() < 0.6:
            params = SamplingParams(rng.randint(1, 60), n=rng.randint(1, 4), top_k=5)
            s.add(Request([0] * rng.randint(1, 30), params, (rng.randrange(20),)))
        plan = s.schedule()
        if plan is None:
            continue
        slots, positions = plan.decode_slots.tolist(), plan.decode_positions.tolist()
        assert positions == sorted(positions, reverse=True)
        for group in s._running.values():
            owners |= {sequence.seq_slot: group.request for sequence in group.sequences}
        runs = [owner for owner, _ in itertools.groupby(owners[slot] for slot in slots)]
        assert len(runs) == len(set(runs))
        num_rows += len(slots)
        s.commit(device.execute(plan))
    assert num_rows > 3000
