"""Blocks on demand: sequences grow, the newest request leaves where blocks run out, and its result stays the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from engine import cohorts
from engine.request import CANCELLED, Request, SamplingParams
from engine.scheduler import Scheduler
from tests.support.paper_device import VOCAB_SIZE, PaperDevice, run


class BadWords:
    """Each token bans the one after it in the vocabulary."""

    always_banned: list[int] = []
    has_bad, has_stop = True, False

    def banned(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> list[int]:
        return [((*prompt_ids, *output_ids)[-1] + 1) % VOCAB_SIZE]


def random_request(rng: random.Random, **sampling: Any) -> Request:
    kind = rng.choice(["plain", "samples", "beams", "bad words", "scored"])
    if kind == "samples":
        sampling |= {"n": rng.randint(2, 4), "top_k": 5}
    elif kind == "beams":
        sampling |= {"beam_width": rng.randint(2, 4)}
    elif kind == "scored":
        sampling |= {"prompt_log_probs": True}
    params = SamplingParams(rng.randint(1, 31), random_seed=rng.randrange(1000), **sampling)
    prompt_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, rng.choice([10, 30])))]
    end_ids = (rng.randrange(VOCAB_SIZE),) if rng.random() < 0.3 else ()
    return Request(prompt_ids, params, end_ids, words=BadWords() if kind == "bad words" else None)


def copy(request: Request) -> Request:
    return Request(request.prompt_ids, request.sampling, request.end_ids, words=request.words)


def results(request: Request) -> list[Any]:
    outputs = [(o.token_ids, o.log_probs, o.finish_reason) for o in request.outputs]
    return [*outputs, request.prompt_log_probs]


@pytest.fixture(autouse=True)
def six_requests_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """So cohorts, if there are several, become one and several again."""
    monkeypatch.setattr(cohorts, "FEW", 6)


def scheduler(num_blocks: int, max_batch_size: int = 8, max_step_tokens: int = 16, num_cohorts: int = 1) -> Scheduler:
    return Scheduler(
        max_batch_size, 1000, max_step_tokens, block_size=4, num_blocks=num_blocks, num_cohorts=num_cohorts
    )


@pytest.mark.parametrize(("num_cohorts", "ahead"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("num_blocks", [42, 60])
def test_requests_that_are_preempted_have_the_results_of_their_solo_runs(
    num_cohorts: int, ahead: int, num_blocks: int
) -> None:
    rng = random.Random(num_blocks)
    s = scheduler(num_blocks, max_batch_size=16, num_cohorts=num_cohorts)
    requests = [random_request(rng) for _ in range(80)]
    assert run(s, PaperDevice(4), requests, ahead) > 10
    assert s.blocks.num_free == num_blocks
    for request in requests:
        alone = copy(request)
        run(scheduler(1000, max_step_tokens=1000), PaperDevice(4), [alone])
        assert results(request) == results(alone)


@pytest.mark.parametrize(("num_cohorts", "ahead"), [(1, 0), (1, 1), (2, 1)])
def test_requests_end_in_any_state_and_free_everything(num_cohorts: int, ahead: int) -> None:
    """Cancelled while they wait, compute a prompt, decode, or are preempted."""
    rng = random.Random(ahead)
    s, device = scheduler(42, max_batch_size=16, num_cohorts=num_cohorts), PaperDevice(4)
    requests: list[Request] = []
    launched = []
    cancelled_in = set()
    for _ in range(1500):
        if rng.random() < 0.4:
            requests.append(random_request(rng))
            s.check(requests[-1])
            s.add(requests[-1])
        plan = s.schedule()
        if plan is not None:
            launched.append(device.execute(plan))
        if rng.random() < (0.5 if s._preempted else 0.1) and (unfinished := s.unfinished()):
            victim = rng.choice(unfinished)
            group = s._running.get(victim) or s._preempted.get(victim)
            cancelled_in.add(None if group is None else (group.is_running, group.is_settled, group.is_prefilling))
            s.cancel(victim, CANCELLED)
            assert victim.is_finished
        if launched and (plan is None or len(launched) >= s.num_cohorts * (1 + ahead)):
            s.commit(launched.pop(0))
    while launched or s.has_work:
        plan = s.schedule()
        if plan is not None:
            launched.append(device.execute(plan))
        s.commit(launched.pop(0))
    assert len(cancelled_in) >= 4 + ahead  # None: it never ran
    assert s.blocks.num_free == 42 and s.memory.num_sequences == 0
    assert all(request.is_finished for request in requests)


def test_the_newest_leaves_and_enters_again_before_those_that_wait() -> None:
    s, device = scheduler(num_blocks=6), PaperDevice(4)
    a, b, c = requests = [Request([i] * 4, SamplingParams(16), ()) for i in range(3)]
    order = []
    for request in requests:
        s.add(request)
    while s.has_work:
        s.commit(device.execute(s.schedule()))
        order += [r for r in requests if r.is_finished and r not in order]
        assert a in s._running or a.is_finished  # the oldest one stays
        assert not (c in s._running and b in s._preempted)
    assert order == [a, b, c]


def test_a_preempted_request_whose_blocks_are_all_found_goes_on_at_once() -> None:
    """Alone, too: its plan once held no tokens and was not sent, so no rank heard of its new slot."""
    num_alone = 0
    for prompt_len, output_len in itertools.product(range(1, 9), range(6, 16)):
        s, device = scheduler(num_blocks=6), PaperDevice(4)
        requests = [Request([1] * 5, SamplingParams(output_len), ()), Request([2] * prompt_len, SamplingParams(14), ())]
        for request in requests:
            s.check(request)
            s.add(request)
        while s.has_work:
            plan = s.schedule()
            again = [new for new in plan.new_sequences if new.output_ids]
            num_alone += bool(again) and not plan.chunks and len(plan.decode_slots) == 1
            s.commit(device.execute(plan))
        for request in requests:
            alone = copy(request)
            run(scheduler(100), PaperDevice(4), [alone])
            assert results(request) == results(alone)
    assert num_alone > 3


def test_prompt_log_probs_are_delivered_once() -> None:
    """Of the second request, a part of the prompt is scored when it loses its blocks."""
    s, device = scheduler(num_blocks=8, max_step_tokens=8), PaperDevice(4)
    first = Request([1] * 3, SamplingParams(29), ())
    second = Request(list(range(25)), SamplingParams(3, prompt_log_probs=True), ())
    assert run(s, device, [first, second]) > 0
    alone = copy(second)
    run(scheduler(100), PaperDevice(4), [alone])
    assert results(second) == results(alone)
    assert len(second.prompt_log_probs) == 24


def test_a_sequence_grows_into_the_blocks_behind_it_and_spare_ones_come_back() -> None:
    s = scheduler(num_blocks=40)
    device = PaperDevice(4)
    long, other = Request([1] * 4, SamplingParams(60), ()), Request([2] * 4, SamplingParams(60), ())
    s.add(long)
    s.add(other)
    s.commit(device.execute(s.schedule()))
    held = [group.sequences[0].block_ids for group in s._running.values()]
    assert [ids[0] for ids in held] == [0, 16]  # each has room for its 63 tokens
    grown = []
    for _ in range(30):
        plan = s.schedule()
        grown += plan.new_blocks
        s.commit(device.execute(plan))
    assert held[0] == list(range(len(held[0]))) and held[1] == list(range(16, 16 + len(held[1])))
    assert grown[0] == (0, 8, [2, 3, 4, 5])  # several at once, as there are plenty
    assert s.memory.take_back(s._running.values()) or len(held[0]) == 9
    assert len(held[0]) == len(held[1]) == 9  # of 4 + 31 tokens
