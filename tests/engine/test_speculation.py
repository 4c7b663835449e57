"""Speculation: the same results in fewer steps, whatever else runs; who gets drafts; what is counted.

First the scheduler on a device of paper, then whole engines, in this process and over ranks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.metrics import Progress
from engine.plan import Plan
from engine.request import CANCELLED, END_ID, LENGTH, STOP, Request, SamplingParams
from engine.scheduler import Scheduler
from engine.speculation import Speculation
from tests.support.engines import make_engine
from tests.support.paper_device import VOCAB_SIZE, PaperDevice, run
from tests.support.ranks import run_engine
from tests.support.soak import Counter
from tests.support.traffic import looping_items, make_request, results, run_alone, run_crowd, vocabulary

REACH = 2  # a token depends on the two before it, so a text soon repeats itself


class Words:
    """A stop word of one token."""

    always_banned: list[int] = []
    has_bad, has_stop = False, True

    def stops(self, output_ids: list[int]) -> bool:
        return output_ids[-1] == 13


class BadWords:
    """A bad word that never comes: the host looks at each token."""

    always_banned: list[int] = []
    has_bad, has_stop = True, False

    def banned(self, prompt_ids: list[int], output_ids: list[int]) -> list[int]:
        return []


def scheduler(num_blocks: int = 400, max_drafts: int = 8, max_rows: int = 32, max_batch_size: int = 8) -> Scheduler:
    s = Scheduler(max_batch_size, 1000, 64, block_size=4, num_blocks=num_blocks)
    s.speculation = Speculation(max_drafts, max_rows) if max_drafts else None
    return s


def random_request(rng: random.Random) -> Request:
    kind = rng.choice(["plain", "plain", "plain", "stop", "bad", "samples", "beams", "scored"])
    options: dict[str, Any] = {"random_seed": rng.randrange(1000)}
    options |= {"samples": {"n": 2, "top_k": 5}, "beams": {"beam_width": 2}}.get(kind, {})
    options |= {"prompt_log_probs": True} if kind == "scored" else {}
    prompt_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 10))]
    end_ids = (rng.randrange(VOCAB_SIZE),) if rng.random() < 0.3 else ()
    words = {"stop": Words(), "bad": BadWords()}.get(kind)
    return Request(prompt_ids, SamplingParams(rng.randint(1, 60), **options), end_ids, words=words)


def again(request: Request) -> Request:
    return Request(request.prompt_ids, request.sampling, request.end_ids, words=request.words)


def outputs(request: Request) -> list[Any]:
    return [(o.token_ids, o.log_probs, o.finish_reason) for o in request.outputs] + [request.prompt_log_probs]


def solo(request: Request) -> list[Any]:
    """What the request gives alone, without drafts."""
    alone = again(request)
    run(scheduler(max_drafts=0), PaperDevice(4, REACH), [alone])
    return outputs(alone)


class Recorder(PaperDevice):
    """Keeps the plans."""

    def __init__(self) -> None:
        super().__init__(4, REACH)
        self.plans: list[Plan] = []

    def execute(self, plan: Plan) -> Any:
        self.plans.append(plan)
        return super().execute(plan)

    @property
    def drafts(self) -> list[int]:
        """How many each chunk with drafts has."""
        return [len(chunk.draft_ids) for plan in self.plans for chunk in plan.chunks if chunk.draft_ids]


def follow(
    s: Scheduler, device: PaperDevice, ahead: int = 0, before_commit: Callable[[], None] = lambda: None
) -> list[Progress]:
    """Run what was added to its end."""
    launched: list[Any] = []
    found: list[Progress] = []
    while s.has_work or launched:
        plan = s.schedule()
        if plan is not None:
            launched.append(device.execute(plan))
        if launched and (plan is None or len(launched) > ahead):
            before_commit()
            found.append(s.commit(launched.pop(0)))
    return found


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("num_blocks", [50, 400])
def test_requests_have_the_results_of_their_solo_runs_without_drafts(ahead: int, num_blocks: int) -> None:
    """With 50 blocks, requests are preempted in the midst of it."""
    rng = random.Random(num_blocks)
    s, device = scheduler(num_blocks), Recorder()
    requests = [random_request(rng) for _ in range(80)]
    num_preempted = run(s, device, requests, ahead)
    assert (num_preempted > 5) == (num_blocks == 50)
    assert s.blocks.num_free == num_blocks and s.memory.num_sequences == 0
    assert [outputs(request) for request in requests] == [solo(request) for request in requests]
    assert len(device.drafts) > 50
    assert {o.finish_reason for request in requests for o in request.outputs} == {END_ID, LENGTH, STOP}


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_text_that_repeats_itself_takes_few_steps(ahead: int) -> None:
    request = Request([1, 2], SamplingParams(200), ())
    device = Recorder()
    run(scheduler(), device, [request], ahead)
    assert outputs(request) == solo(request)
    plain = PaperDevice(4, REACH)
    run(scheduler(max_drafts=0), plain, [again(request)])
    assert len(device.plans) < 60
    assert max(device.drafts) == 8
    assert device.num_computed < plain.num_computed + 20  # few drafts were wrong


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_text_without_repetition_is_planned_as_without_drafts(ahead: int) -> None:
    """So plans are made ahead, and none is late."""
    rng = random.Random(3)
    prompt_ids = [rng.randrange(10**6) for _ in range(50)]
    found = []
    for max_drafts in (0, 8):
        s, device, plans = scheduler(max_drafts=max_drafts), PaperDevice(4), []
        s.add(Request(prompt_ids, SamplingParams(30), ()))
        launched = []
        while s.has_work or launched:
            plan = s.schedule()
            plans.append(None if plan is None else (plan.decode_positions.tolist(), plan.chunks))
            if plan is not None:
                output = device.execute(plan)
                output.token_ids = [10**6 + len(plans)]  # never seen before
                launched.append(output)
            if launched and (plan is None or len(launched) > ahead):
                s.commit(launched.pop(0))
        found.append(plans)
    assert found[0] == found[1]


def test_running_sequences_share_the_rows() -> None:
    shares = {count: Speculation(8, 32).share(count) for count in (1, 3, 4, 8, 16, 17, 256)}
    assert shares == {1: 8, 3: 8, 4: 7, 8: 3, 16: 1, 17: 0, 256: -1}


def test_a_crowd_has_no_drafts_and_they_come_back_when_it_is_gone() -> None:
    s, device = scheduler(max_rows=8), Recorder()
    long, crowd = Request([1, 2], SamplingParams(200), ()), [Request([i], SamplingParams(30), ()) for i in range(5)]
    s.add(long)
    for _ in range(40):
        s.commit(device.execute(s.schedule()))
    assert sum(device.drafts) > 0
    for request in crowd:
        s.add(request)
    s.commit(device.execute(s.schedule()))
    device.plans.clear()
    while not any(request.is_finished for request in crowd):
        s.commit(device.execute(s.schedule()))
        assert all(plan.num_rows <= 8 for plan in device.plans)
    assert device.drafts == []
    follow(s, device)
    assert len(device.drafts) > 3
    assert outputs(long) == solo(long)


def test_drafts_never_reach_beyond_the_last_token() -> None:
    for max_new_tokens in range(30, 45):
        s, device = scheduler(), Recorder()
        request = Request([1, 2], SamplingParams(max_new_tokens), ())
        run(s, device, [request])
        ends = [chunk.start + chunk.length for plan in device.plans for chunk in plan.chunks]
        assert max(ends) <= 2 + max_new_tokens - 1  # the last token is sampled, and never computed


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_cancelled_request_drops_what_is_on_its_way(ahead: int) -> None:
    rng = random.Random(5)
    for stop_at in range(10, 30, 3):
        s, device = scheduler(), Recorder()
        first, second = (Request([rng.randrange(VOCAB_SIZE)], SamplingParams(300), ()) for _ in range(2))
        s.add(first)
        s.add(second)
        launched: list[Any] = []
        for step in range(1000):
            plan = s.schedule()
            if plan is not None:
                launched.append(device.execute(plan))
            if step == stop_at:
                s.cancel(first, CANCELLED)
                num_tokens = len(first.output_ids)
            if launched and (plan is None or len(launched) > ahead):
                s.commit(launched.pop(0))
            if not launched and not s.has_work:
                break
        assert len(first.output_ids) == num_tokens
        assert first.output_ids == solo(first)[0][0][:num_tokens]
        assert outputs(second) == solo(second)
        assert s.blocks.num_free == 400


@pytest.mark.parametrize("ahead", [0, 1])
def test_every_token_but_the_first_has_a_gap_and_gaps_add_up(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of one step share the time since the one before."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def tick() -> None:
        now[0] += 1

    requests = [Request([7], SamplingParams(90), ()), Request([1, 2], SamplingParams(70), (5,))]
    s, device = scheduler(), Recorder()
    for request in requests:
        s.add(request)
    found = follow(s, device, ahead, tick)
    num_tokens = [len(request.output_ids) for request in requests]
    assert sum(progress.num_tokens for progress in found) == sum(num_tokens)
    gaps = [gap for progress in found for gap in progress.gaps]
    assert sum(count for _, count in gaps) == sum(num_tokens) - 2
    times = [request.times.last_token - request.times.first_token for request in requests]
    assert sum(seconds * count for seconds, count in gaps) == pytest.approx(sum(times))
    assert all(seconds > 0 and count > 0 for seconds, count in gaps)
    drafted = [(p.num_drafts, p.num_drafted, p.num_accepted) for p in found]
    assert np.sum(drafted, axis=0)[:2].tolist() == [len(device.drafts), sum(device.drafts)]
    assert all(0 <= accepted <= count for _, count, accepted in drafted)
    # Without drafts, each token but the two first would take a row of its own.
    assert sum(p.num_accepted for p in found) >= sum(num_tokens) - sum(plan.num_sequences for plan in device.plans)


def run_items(folder: Path, items: list[dict[str, Any]], is_crowd: bool, **flags: Any) -> tuple[list[Any], Counter]:
    engine = make_engine(folder, max_batch_size=6, max_step_tokens=24, block_size=4, **flags)
    requests = [make_request(item, vocabulary()) for item in items]
    engine.observer = counter = Counter()
    (run_crowd if is_crowd else run_alone)(engine, requests)
    return [results(request) for request in requests], counter


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        for ours, theirs in zip(one["outputs"], other["outputs"], strict=True):
            assert (ours["token_ids"], ours["finish_reason"]) == (theirs["token_ids"], theirs["finish_reason"])
            np.testing.assert_allclose(ours["log_probs"], theirs["log_probs"], atol=1e-4)
            assert len(ours["alternatives"]) == len(theirs["alternatives"])
            for mine, yours in zip(ours["alternatives"], theirs["alternatives"], strict=True):
                np.testing.assert_allclose(mine, yours, atol=1e-3)
        np.testing.assert_allclose(one["prompt_log_probs"], other["prompt_log_probs"], atol=1e-4)


def test_every_mix_of_parameters_has_the_tokens_of_plain_decoding(converted: Callable[[int], Path]) -> None:
    """Greedy and seeded, with penalties, decay, biases, stop words, end ids, alternatives; alone and in a crowd."""
    items = looping_items(32)
    expected, without = run_items(converted(1), items, True)
    assert without.num_drafts == without.num_drafted == without.num_accepted == 0
    for is_crowd, count in ((True, 32), (False, 8)):
        found, counted = run_items(converted(1), items[:count], is_crowd, speculative="ngram")
        assert_same(found, expected[:count])
        assert counted.num_drafts > 2 * count
        assert count < counted.num_accepted < counted.num_drafted < 4 * counted.num_accepted


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)], ids=str)
def test_ranks_have_the_tokens_of_plain_decoding(tp: int, pp: int, converted: Callable[[int], Path]) -> None:
    items = looping_items(10)
    expected, _ = run_items(converted(1), items, True)
    flags = ["--speculative", "ngram", "--max-batch-size", "6"]
    assert_same(run_engine(converted(tp), items, tp, pp, *flags), expected)
