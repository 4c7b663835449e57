"""Prompts share a step: short ones do not wait for long ones, long ones go on, and no room is left unused."""

from __future__ import annotations

import random

import pytest

from engine.budget import share_budget
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from tests.support.paper_device import PaperDevice


@pytest.mark.parametrize(
    ("remaining", "budget", "shares"),
    [
        ([], 8, []),
        ([100], 8, [8]),
        ([3, 2], 8, [3, 2]),
        ([100, 100, 100], 8, [8, 0, 0]),  # of the same length: in their order
        ([100, 50, 1], 8, [4, 3, 1]),
        ([2, 100, 3], 9, [2, 4, 3]),
        ([100, 1], 1, [1, 0]),
    ],
)
def test_half_is_for_the_oldest_and_half_for_the_shortest(remaining: list[int], budget: int, shares: list[int]) -> None:
    assert share_budget(remaining, budget) == shares


def num_steps(remaining: list[int], budget: int) -> list[int]:
    """The step in which each prompt is computed to its end."""
    left, ends, step = list(remaining), [0] * len(remaining), 0
    while any(left):
        step += 1
        shares = iter(share_budget([count for count in left if count], budget))
        assert sum(left) >= budget or sum(left) == sum(share_budget([c for c in left if c], budget))
        for index, count in enumerate(left):
            if count:
                left[index] -= next(shares)
                if left[index] == 0:
                    ends[index] = step
    return ends


def test_the_bounds_hold() -> None:
    rng = random.Random(0)
    num_short = 0
    for _ in range(300):
        remaining = [rng.choice([rng.randint(1, 5), rng.randint(1, 300)]) for _ in range(rng.randint(1, 20))]
        budget = rng.randint(2, 100)
        ends = num_steps(remaining, budget)
        assert max(ends) == -(-sum(remaining) // budget)  # every step but the last one is full
        for index, (own, end) in enumerate(zip(remaining, ends, strict=True)):
            older = sum(remaining[:index])
            assert end <= -(-(older + own) // (budget - budget // 2))
            if own <= budget // 2:
                num_short += 1
                others = sum(count for count in remaining if count <= own) - own
                assert end <= -(-(others + own) // (budget // 2))
    assert num_short > 300


def scheduler(max_mixed_tokens: int = 0) -> Scheduler:
    return Scheduler(40, 10_000, 256, 16, 10_000, max_mixed_tokens=max_mixed_tokens)


def test_a_request_of_one_token_behind_many_long_prompts_gets_the_next_step() -> None:
    s, device = scheduler(), PaperDevice(16)
    long = [Request([index] * 1000, SamplingParams(2), ()) for index in range(32)]
    for request in long:
        s.add(request)
    s.commit(device.execute(s.schedule()))
    short = Request([50], SamplingParams(1), ())
    s.add(short)
    s.commit(device.execute(s.schedule()))
    assert short.is_finished
    steps = 2
    while not all(request.is_finished for request in long):
        s.commit(device.execute(s.schedule()))
        steps += 1
    assert steps <= -(-(32 * 1000 + 64 + 1) // 256) + 2  # as few as for one prompt after the other


def test_prompts_take_less_room_where_others_decode() -> None:
    s, device = scheduler(max_mixed_tokens=64), PaperDevice(16)
    first = Request([1] * 4, SamplingParams(4), ())
    s.add(first)
    s.commit(device.execute(s.schedule()))
    s.add(Request([2] * 1000, SamplingParams(2), ()))
    sizes = []
    while s.has_work:
        plan = s.schedule()
        sizes.append((len(plan.decode_slots), plan.num_tokens))
        s.commit(device.execute(plan))
    assert sizes == [(1, 64), (1, 64), (1, 64), (0, 256), (0, 256), (0, 256), (0, 43), (1, 1)]


def test_a_limit_below_the_decode_rows_leaves_room_for_a_token() -> None:
    s, device = Scheduler(4, 1000, 256, 16, 1000, max_mixed_tokens=1), PaperDevice(16)
    for token_id in range(3):
        s.add(Request([token_id] * 3, SamplingParams(10), ()))
    s.commit(device.execute(s.schedule()))
    prompt = Request([5] * 6, SamplingParams(1), ())
    s.add(prompt)
    steps = 0
    while not prompt.is_finished:
        plan = s.schedule()
        assert (len(plan.decode_slots), plan.num_tokens) in ((3, 4), (4, 4))  # the prompt's last token is a row
        s.commit(device.execute(plan))
        steps += 1
    assert steps == 6
