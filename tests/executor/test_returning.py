"""The first stage waits for a plan's results where a later plan uses one of its slots, and not before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.plan import Chunk, NewSequences, Plan
from engine.request import SamplingParams
from executor.collectives import Transfer
from executor.returning import ReturningResults


def decodes(*slots: int) -> Plan:
    return Plan(np.array(slots, dtype=np.uint8), np.array([5] * len(slots), dtype=np.int32))


class Stage:
    """Adds results, and notes what happens to them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.returning = ReturningResults(8, lambda layout, values: self.seen.append(("keep", int(values))))

    def compute(self, number: int, *slots: int) -> None:
        layout: Any = SimpleNamespace(rows=SimpleNamespace(seq_slots=np.array(slots)))
        wait = lambda: self.seen.append(("wait", number))  # noqa: E731
        self.returning.add(layout, Transfer(wait, lambda: False, torch.tensor(number)))

    def take_for(self, plan: Plan) -> list[tuple[str, int]]:
        self.seen.clear()
        self.returning.take_for(plan)
        return self.seen


def taken(*numbers: int) -> list[tuple[str, int]]:
    return [(what, number) for number in numbers for what in ("wait", "keep")]


def test_results_of_other_slots_are_left_on_their_way() -> None:
    stage = Stage()
    stage.compute(1, 0, 1)
    assert stage.take_for(decodes(2, 3)) == []
    stage.compute(2, 2, 3)
    assert stage.take_for(decodes(0, 1)) == taken(1)
    assert stage.take_for(decodes(0, 1)) == []


def test_results_are_taken_in_their_order() -> None:
    stage = Stage()
    stage.compute(1, 0, 1)
    stage.compute(2, 2, 3)
    stage.compute(3, 4)
    assert stage.take_for(decodes(3)) == taken(1, 2)
    assert stage.take_for(decodes(4)) == taken(3)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(chunks=[Chunk(6, 0, 4)]),
        Plan(chunks=[Chunk(7, 0, 4)], new_sequences=[NewSequences([5, 6], [1, 2], SamplingParams(2), (), [[0], [1]])]),
    ],
    ids=["chunk", "new sequence"],
)
def test_a_slot_that_is_used_again_has_got_its_last_token(plan: Plan) -> None:
    """It would overwrite a token of the next sequence."""
    stage = Stage()
    stage.compute(1, 6)
    assert stage.take_for(plan) == taken(1)


def test_at_the_end_nothing_is_on_its_way() -> None:
    stage = Stage()
    stage.compute(1, 0)
    stage.returning.settle()
    assert stage.seen == [("wait", 1)]
    stage.returning.settle()
    assert stage.seen == [("wait", 1)]
