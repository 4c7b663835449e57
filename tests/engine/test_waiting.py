"""Turns in the waiting queue: against plain lists, and how long a small request waits behind a large one."""

from __future__ import annotations

import random
from itertools import count

from engine.plan import StepOutput
from engine.request import CANCELLED, Request, SamplingParams
from engine.scheduler import Scheduler
from engine.static import StaticScheduler
from engine.waiting import WaitingQueue

END = 9


def requests(number: int, output_len: int = 4, **sampling: int) -> list[Request]:
    """What one client submits."""
    origin = object()
    return [Request([1], SamplingParams(output_len, **sampling), (END,), origin=origin) for _ in range(number)]


def add(queue: WaitingQueue | Scheduler | StaticScheduler, *many: list[Request]) -> None:
    for one in many:
        for request in one:
            queue.add(request)


def in_turns(queue: WaitingQueue) -> list[Request]:
    taken = []
    while queue:
        taken.append(queue.first)
        queue.take(queue.first)
    return taken


def test_origins_take_turns_and_each_ones_requests_come_in_order() -> None:
    queue, (a, b, c) = WaitingQueue(), (requests(4), requests(1), requests(2))
    add(queue, a, b, c)
    expected = [a[0], b[0], c[0], a[1], c[1], a[2], a[3]]
    assert list(queue) == expected
    assert in_turns(queue) == expected


def test_requests_without_an_origin_come_in_order() -> None:
    queue, many = WaitingQueue(), [Request([1], SamplingParams(1)) for _ in range(5)]
    add(queue, many)
    assert in_turns(queue) == many


def test_a_new_origin_waits_for_one_request_of_each_other() -> None:
    queue, (a, b, new) = WaitingQueue(), (requests(64), requests(64), requests(1))
    add(queue, a, b)
    for _ in range(7):
        queue.take(queue.first)
    add(queue, new)
    assert in_turns(queue).index(new[0]) == 2


def test_any_history_equals_plain_lists() -> None:
    rng, numbers = random.Random(3), count()
    queue, lists = WaitingQueue(), []  # lists: of the origins' requests, in the order of turns
    origins = [object() for _ in range(6)]
    for _ in range(4000):
        waiting = [request for own in lists for request in own]
        action = rng.choice(["add", "add", "take", "remove"])
        if action == "add" and len(waiting) < 30:
            request = Request([next(numbers)], SamplingParams(1), origin=rng.choice(origins))
            queue.add(request)
            own = next((own for own in lists if own[0].origin is request.origin), None)
            lists.append([request]) if own is None else own.append(request)
        elif waiting:
            request = lists[0][0] if action == "take" else rng.choice(waiting)
            assert queue.first is lists[0][0] and request in queue
            (queue.take if action == "take" else queue.remove)(request)
            own = next(own for own in lists if request in own)
            own.remove(request)
            if action == "take":
                lists.append(lists.pop(0))
            lists = [own for own in lists if own]
            assert request not in queue
        assert len(queue) == len(list(queue)) == sum(map(len, lists))


def test_a_small_request_enters_in_its_turn_however_many_another_client_has() -> None:
    """One client's 64 prompts once kept a request of one token waiting until the last of them had a slot."""
    scheduler = Scheduler(8, 100, 100, 4, 1000)
    many, other, small = requests(64, 10), requests(64, 10), requests(1, 1)
    for place, request in enumerate([*many, *other, *small]):
        request.prompt_ids = [place]
    add(scheduler, many)
    started: list[int] = []
    while not small[0].is_finished:
        plan = scheduler.schedule()
        started += [new.prompt_ids[0] for new in plan.new_sequences]
        scheduler.commit(StepOutput([1] * plan.num_sequences, [0.0] * plan.num_sequences))
        if small[0] not in scheduler.waiting and 128 not in started:
            add(scheduler, other, small)
    assert started[:11] == [*range(8), 8, 64, 128]  # after one more of `many`, and one of `other`
    assert sum(request.is_finished for request in many) == 8


def test_a_cancelled_request_leaves_its_origin_the_others() -> None:
    scheduler, (a, b) = Scheduler(1, 100, 100, 4, 100), (requests(3), requests(1))
    add(scheduler, a, b)
    scheduler.schedule()  # a[0] runs; b's turn is next
    scheduler.cancel(b[0], CANCELLED)
    scheduler.cancel(a[1], CANCELLED)
    assert (list(scheduler.waiting), len(scheduler.waiting)) == ([a[2]], 1)
    assert [r.finish_reason for r in (*a, *b)] == [None, CANCELLED, None, CANCELLED]


def test_a_static_batch_takes_one_of_each_origin_first() -> None:
    static, (many, small) = StaticScheduler(4, 100, END), (requests(20), requests(2))
    add(static, many, small)
    static.schedule()
    assert static._running == [many[0], small[0], many[1], small[1]]
