"""Pipeline stages are busy: what is on its way while a plan is made, by the engine with a device on paper."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engine import cohorts
from engine.engine import Engine
from engine.plan import Plan, StepOutput
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.watchdog import Watchdog
from engine.world import World
from tests.support.paper_device import PaperDevice


class PaperStages:
    """An executor of several stages. Notes each plan's slots, beside those of the plans whose tokens are not read."""

    max_seq_len, max_step_tokens, max_mixed_tokens, max_draft_rows, num_blocks = 1000, 64, 64, 1, 200

    def __init__(self, num_stages: int, num_ahead: int) -> None:
        self.num_stages, self.num_ahead = num_stages, num_ahead
        self.steps: list[tuple[set[int], list[set[int]]]] = []
        self._device = PaperDevice(4)
        self._on_their_way: list[set[int]] = []

    def prepare(self) -> None: ...
    def close(self) -> None: ...

    def execute(self, plan: Plan) -> Any:
        slots = {*plan.decode_slots.tolist(), *(chunk.seq_slot for chunk in plan.chunks)}
        self.steps.append((slots, self._on_their_way[:]))
        self._on_their_way.append(slots)
        return Result(self._device.execute(plan), self._on_their_way)


class Result:
    def __init__(self, output: StepOutput, on_their_way: list[set[int]]) -> None:
        self._output, self._on_their_way = output, on_their_way

    def wait(self) -> StepOutput:
        self._on_their_way.pop(0)
        return self._output


@pytest.fixture(autouse=True)
def two_requests_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a cohort each."""
    monkeypatch.setattr(cohorts, "FEW", 2)


def make(num_stages: int, num_ahead: int = 0) -> tuple[Engine, PaperStages]:
    stages = PaperStages(num_stages, num_ahead)
    scheduler = Scheduler(8, 1000, 64, block_size=4, num_blocks=stages.num_blocks, num_cohorts=num_stages)
    return Engine(scheduler, stages, World(), Watchdog(), 60, 100), stages


def request(output_len: int = 20) -> Request:
    return Request([1, 2, 3], SamplingParams(output_len), ())


def finish(engine: Engine, requests: list[Request]) -> None:
    for one in requests:
        engine.submit(one)
    while engine.step():
        pass
    assert all(len(one.output_ids) == one.sampling.max_new_tokens for one in requests)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_compute_different_sequences(num_stages: int) -> None:
    engine, stages = make(num_stages)
    finish(engine, [request() for _ in range(6)])
    for slots, others in stages.steps:
        assert len(slots) == 6 // num_stages
        assert all(slots.isdisjoint(other) for other in others)
    num_others = [len(others) for _, others in stages.steps]
    assert num_others == [*range(num_stages - 1), *[num_stages - 1] * (19 * num_stages + 1)]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_one_sequence_is_not_planned_before_its_token_is_read(num_stages: int) -> None:
    engine, stages = make(num_stages)
    finish(engine, [request()])
    assert stages.steps == [({0}, [])] * 20


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_on_a_gpu_each_sequence_is_planned_once_ahead(num_stages: int) -> None:
    engine, stages = make(num_stages, num_ahead=1)
    finish(engine, [request() for _ in range(6)])
    full = stages.steps[2 * num_stages : 19 * num_stages]
    assert {len(others) for _, others in full} == {2 * num_stages - 1}
    assert all(others.count(slots) == 1 for slots, others in full)
    assert len(stages.steps) == 20 * num_stages


def test_cohorts_are_as_large_as_each_other_when_requests_come_one_by_one() -> None:
    engine, stages = make(2)
    for _ in range(8):
        engine.submit(request())
        for _ in range(2):
            engine.step()
    assert {len(slots) for slots, _ in stages.steps[-2:]} == {4}


def test_cohorts_are_as_large_as_each_other_when_one_of_them_has_ended() -> None:
    """Requests that run move, and new ones take what is their cohort's share."""
    engine, stages = make(2)
    short, long = [request(4) for _ in range(4)], [request(40) for _ in range(4)]
    for one in short + long:
        engine.submit(one)
    while not all(one.is_finished for one in short):
        engine.step()
    for num_each in (2, 4):
        for _ in range(8):
            engine.step()
        (one, _), (other, before) = stages.steps[-2:]
        assert len(one) == len(other) == num_each and before == [one] and one.isdisjoint(other)
        for _ in range(4):
            engine.submit(request(30))
    while engine.step():
        pass
    assert all(len(one.output_ids) == one.sampling.max_new_tokens for one in short + long)


def test_few_requests_are_in_one_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left over of many, too, once they are half as many."""
    monkeypatch.setattr(cohorts, "FEW", 6)
    engine, stages = make(2)
    finish(engine, [request() for _ in range(5)])
    assert {len(slots) for slots, _ in stages.steps} == {5}
    requests = [request(4 * count) for count in range(1, 9)]
    for one in requests:
        engine.submit(one)
    while engine.step():
        pass
    steps = [(len(slots), len(others)) for slots, others in stages.steps[20:]]
    assert steps[:8] == [(4, 0), *[(4, 1)] * 7]
    assert steps[-8:] == [(2, 0)] * 4 + [(1, 0)] * 4
    assert all(len(one.output_ids) == one.sampling.max_new_tokens for one in requests)


def test_gaps_are_between_tokens_of_one_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine, _ = make(2)
    engine.scheduler.add(request(3))
    engine.scheduler.add(request(3))
    device, gaps = PaperDevice(4), []
    while engine.scheduler.has_work:
        plans = [plan for plan in (engine.scheduler.schedule(), engine.scheduler.schedule()) if plan is not None]
        for output in [device.execute(plan) for plan in plans]:
            now += 1
            gaps += engine.scheduler.commit(output).gaps
    assert gaps == [(2.0, 1)] * 4


def test_cohorts_are_as_large_as_each_other_when_blocks_are_few() -> None:
    """Each request takes 5 blocks of 4 tokens in the end, 2 at first: 20 fit for some steps, and 50 want to run."""
    stages = PaperStages(2, num_ahead=1)
    scheduler = Scheduler(64, 1000, 64, block_size=4, num_blocks=40, num_cohorts=2)
    engine, requests = Engine(scheduler, stages, World(), Watchdog(), 60, 100), [request(16) for _ in range(50)]
    for one in requests:
        engine.submit(one)
    while not all(one.is_finished for one in requests[:30]):
        engine.step()
    sizes = [len(slots) for slots, _ in stages.steps[8:]]
    unequal = [pair for pair in zip(sizes, sizes[1:], strict=False) if max(pair) > 1.25 * sum(pair) / 2 + 3]
    assert len(unequal) < len(sizes) / 5, unequal
    while engine.step():
        pass
    assert all(len(one.output_ids) == 16 for one in requests)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_few_plans_suffice_for_requests_that_fit_after_larger_ones(num_stages: int) -> None:
    """Seven of the larger ones fit at once. Once, each plan let two more requests enter from there on."""
    stages = PaperStages(num_stages, num_ahead=1)
    scheduler = Scheduler(64, 1000, 64, block_size=4, num_blocks=600, num_cohorts=num_stages)
    engine = Engine(scheduler, stages, World(), Watchdog(), 60, 100)
    finish(engine, [Request([1] * 320, SamplingParams(4), ()) for _ in range(12)])
    for _ in range(60):
        engine.submit(request(40))
    for _ in range(6 * num_stages):
        engine.step()
    assert scheduler.num_running == 60


def test_few_of_many_that_fit_at_once_are_in_one_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 46 of 600 blocks. Where one has ended, no more than one enters."""
    monkeypatch.setattr(cohorts, "FEW", 16)
    stages = PaperStages(2, num_ahead=0)
    scheduler = Scheduler(64, 1000, 512, block_size=4, num_blocks=600, num_cohorts=2)
    engine = Engine(scheduler, stages, World(), Watchdog(), 60, 100)
    finish(engine, [Request([index] * 180, SamplingParams(4 + index % 7), ()) for index in range(40)])
    assert max(len(slots) for slots, _ in stages.steps) == 12
    assert not any(others for _, others in stages.steps)


def test_requests_that_move_have_no_gap_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(cohorts, "FEW", 6)
    engine, _ = make(2)
    device, gaps, added = PaperDevice(4), [], 0
    while engine.scheduler.has_work or added < 8:
        if added < 8:  # the sixth lets requests move to the second cohort
            engine.scheduler.add(request(12))
            added += 1
        plans = [plan for plan in (engine.scheduler.schedule(), engine.scheduler.schedule()) if plan is not None]
        for output in [device.execute(plan) for plan in plans]:
            now += 1
            gaps += engine.scheduler.commit(output).gaps
    assert max(gap for gap, _ in gaps) <= 4


def test_requests_that_move_before_their_first_token_have_no_old_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(cohorts, "FEW", 6)
    scheduler, device = make(2)[0].scheduler, PaperDevice(4)
    launched, gaps = [], []
    for count in (5, 1):  # the sixth lets some move to the second cohort, while their first tokens are on the way
        for _ in range(count):
            scheduler.add(request(12))
        launched.append(device.execute(scheduler.schedule()))
    while launched:
        gaps += scheduler.commit(launched.pop(0)).gaps
        if (plan := scheduler.schedule()) is not None:
            launched.append(device.execute(plan))
    assert sum(count for _, count in gaps) == 6 * 11
    assert all(gap == 0 for gap, _ in gaps)


def test_prompts_are_limited_beside_sequences_of_another_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "FEW", 3)  # so two decode in one cohort, and two prompts are the other one
    scheduler = Scheduler(8, 1000, 64, block_size=4, num_blocks=200, max_mixed_tokens=16, num_cohorts=2)
    device = PaperDevice(4)
    for one in (request(30), request(30)):
        scheduler.add(one)
    for _ in range(4):
        scheduler.commit(device.execute(scheduler.schedule()))
    for _ in range(2):
        scheduler.add(Request([5] * 60, SamplingParams(2), ()))
    lengths = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        if plan.chunks:
            lengths.append(plan.num_tokens)
        scheduler.commit(device.execute(plan))
    assert sum(lengths) > 100 and max(lengths) <= 16
