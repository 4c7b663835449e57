"""What a plan's output brought: tokens, gaps between them, and each request's times, on a clock that stands still."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest

from engine.beam import Candidate
from engine.metrics import Progress
from engine.plan import Plan, StepOutput
from engine.request import CANCELLED, Output, Request, SamplingParams, Times, Token
from engine.scheduler import Scheduler
from engine.static import StaticScheduler


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


class BadWord:
    """A bad word that never comes: the host looks at each token before it plans the next one."""

    always_banned: list[int] = []
    has_bad, has_stop = True, False

    def banned(self, prompt_ids: list[int], output_ids: list[int]) -> list[int]:
        return []


def request(prompt_len: int, output_len: int, **options: object) -> Request:
    return Request([1] * prompt_len, SamplingParams(output_len, **options))


def stepwise(prompt_len: int, output_len: int) -> Request:
    return Request([1] * prompt_len, SamplingParams(output_len), words=BadWord())


def drive(s: Scheduler, clock: Clock, ahead: int = 0, act: Callable[[int], None] = lambda step: None) -> list[Progress]:
    """Plan and commit to the end, `ahead` plans late. The clock moves by a second before each commit."""
    found: list[Progress] = []
    launched: list[Plan] = []
    for step in range(1000):
        act(step)
        plan = s.schedule()
        if plan is not None:
            launched.append(plan)
        if launched and (plan is None or len(launched) > ahead):
            clock.now += 1
            found.append(s.commit(output(launched.pop(0))))
        if not launched and not s.has_work:
            return found
    raise AssertionError("the scheduler never came to an end")


def output(plan: Plan) -> StepOutput:
    """Ones; a beam search, if there is one, runs alone."""
    searches = any(new.sampling.beam_width > 1 for new in plan.new_sequences) or bool(plan.beam_reorders)
    candidates = [Candidate(0, -float(token_id), Token(token_id, -0.5)) for token_id in range(4)]
    return StepOutput([1] * plan.num_sequences, [-0.5] * plan.num_sequences, candidates=[candidates] * searches)


def scheduler(*requests: Request, max_batch_size: int = 8, num_blocks: int = 64) -> Scheduler:
    s = Scheduler(max_batch_size, 1000, 16, block_size=4, num_blocks=num_blocks, has_prefix_cache=False)
    for one in requests:
        s.add(one)
    return s


def gaps(found: list[Progress]) -> dict[float, int]:
    """Sequences per gap, over all steps."""
    counts: Counter[float] = Counter()
    for progress in found:
        for seconds, count in progress.gaps:
            counts[seconds] += count
    return dict(counts)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_every_token_but_the_first_has_a_gap(ahead: int, clock: Clock) -> None:
    requests = [request(3, 5), request(40, 4), request(2, 6, n=3, top_k=2), request(1, 1)]
    found = drive(scheduler(*requests), clock, ahead)
    tokens = [5, 4, 18, 1]
    assert sum(progress.num_tokens for progress in found) == sum(tokens)
    assert gaps(found) == {1.0: sum(tokens) - (1 + 1 + 3 + 1)}
    assert Counter(id(r) for p in found for r in p.started) == Counter(map(id, requests))
    assert Counter(id(r) for p in found for r in p.finished) == Counter(map(id, requests))


def test_a_request_that_skips_plans_has_longer_gaps(clock: Clock) -> None:
    """With a bad word, a request gets a token from every other plan where plans are made one ahead."""
    plain, slow = request(3, 9), stepwise(3, 4)
    found = drive(scheduler(plain, slow), clock, ahead=1)
    assert gaps(found) == {1.0: 8, 2.0: 3}
    assert sum(progress.num_tokens for progress in found) == 13
    assert gaps(drive(scheduler(request(3, 9), stepwise(3, 4)), clock, ahead=0)) == {1.0: 11}


@pytest.mark.parametrize("make", [request, stepwise])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_preempted_request_has_one_long_gap(ahead: int, make: Callable[..., Request], clock: Clock) -> None:
    first, second = request(4, 12), make(4, 12)
    found = drive(scheduler(first, second, num_blocks=5), clock, ahead)
    assert sum(progress.num_preempted for progress in found) == 1
    assert sum(progress.num_tokens for progress in found) == 24
    own = gaps(found)
    assert sum(own.values()) == 22
    (longest,) = [seconds for seconds in own if seconds > 2]
    assert own[longest] == 1
    # Every second from a first token to the last one is in a gap.
    spans = [r.times.last_token - r.times.first_token for r in (first, second)]
    assert sum(seconds * count for seconds, count in own.items()) == sum(spans)


def test_times_of_requests_that_wait_and_run(clock: Clock) -> None:
    first, second = request(20, 3), request(2, 2)
    drive(scheduler(first, second, max_batch_size=1), clock)
    # 16 and 4 of 20 prompt tokens: the first token comes with the second step
    assert first.times == Times(0.0, 100.0, 102.0, 104.0, 104.0)
    assert second.times == Times(0.0, 104.0, 105.0, 106.0, 106.0)


@pytest.mark.parametrize("make", [request, stepwise])
def test_a_cancelled_request_keeps_the_time_of_its_last_token(make: Callable[..., Request], clock: Clock) -> None:
    one, queued, early = make(2, 50), request(2, 5), request(40, 5)
    s = scheduler(early, one, queued, max_batch_size=2)

    def act(step: int) -> None:
        if step == 1:
            s.cancel(early, CANCELLED)  # its prompt is not computed yet
        if step == 6:
            clock.now += 0.25
            s.cancel(one, CANCELLED)

    found = drive(s, clock, act=act)
    assert one.times == Times(0.0, 100.0, 101.0, 106.0, 106.25)  # its prompt does not wait for the long one
    assert early.times == Times(0.0, 100.0, 0.0, 0.0, 101.0)
    assert [p.finished for p in found if p.finished] == [[queued]]
    assert sum(p.num_tokens for p in found) == len(one.output_ids) + 5 == 11


def test_a_beam_search_has_times_and_its_tokens_are_left_to_its_end(clock: Clock) -> None:
    one = request(2, 3, beam_width=2)
    found = drive(scheduler(one), clock)
    assert one.times == Times(0.0, 100.0, 101.0, 103.0, 103.0)
    assert [(p.num_tokens, p.gaps) for p in found] == [(0, [])] * 3
    assert [p.finished for p in found] == [[], [], [one]]


def test_a_static_batch_gives_all_at_its_end(clock: Clock) -> None:
    static = StaticScheduler(8, max_seq_len=100, end_id=9)
    one, two, gone = request(3, 4), request(5, 2, n=2, top_k=2), request(3, 2)
    for r in (one, two, gone):
        static.add(r)
    batch = static.schedule()
    assert batch.num_tokens == 3 + 2 * 5 + 3 + 4 * 4
    static.cancel(gone, CANCELLED)
    clock.now += 5
    progress = static.commit([[Output([1] * 4)] for _ in batch.rows])
    assert progress == Progress([one, two], 4 + 2 * 2, [], [one, two])
    assert one.times == two.times == Times(0.0, 100.0, 105.0, 105.0, 105.0)
    assert gone.times == Times(0.0, 100.0, 0.0, 0.0, 100.0)
