"""Requests of every kind that come, leave and begin alike, through an engine with too few blocks for them."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from engine.engine import Engine
from engine.metrics import Progress
from engine.request import Request
from tests.support.traffic import VOCAB_SIZE, make_request, random_items, results, run_crowd, vocabulary


class Counts(NamedTuple):
    num_preempted: int
    num_hit: int  # prompt tokens found in the prefix cache


class Counter:
    """An engine.metrics.Observer."""

    def __init__(self) -> None:
        self.num_preempted = self.num_hit = 0

    def count_plan(self, num_tokens: int) -> None: ...

    def count_progress(self, progress: Progress) -> None:
        self.num_preempted += progress.num_preempted
        self.num_hit += progress.num_hit

    def count_finished(self, request: Request) -> None: ...


def soak_items(count: int, seed: int) -> list[dict[str, Any]]:
    """traffic's items; a third begin with the tokens of others, a tenth are cancelled after `leaves_after` tokens."""
    rng = random.Random(seed)
    texts = [[rng.randrange(VOCAB_SIZE - 1) for _ in range(40)] for _ in range(4)]
    items = random_items(count, seed)
    for item in items:
        if rng.random() < 0.33:
            item["prompt_ids"] = rng.choice(texts)[: rng.randint(5, 40)] + item["prompt_ids"][:5]
        if rng.random() < 0.1:
            item["leaves_after"] = rng.randint(0, 8)
    return items


def run(engine: Engine, items: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counts]:
    """traffic.results of each item, after a crowd. Asserts that nothing is left in the engine."""
    engine.observer = counter = Counter()
    words = vocabulary()
    requests = [make_request(item, words) for item in items]
    for request, item in zip(requests, items, strict=True):
        if (most := item.get("leaves_after")) is not None:

            def leave(request: Request, most: int = most) -> None:
                if len(request.output_ids) >= most and not request.is_finished:
                    engine.cancel(request)

            request.on_update = leave
    run_crowd(engine, requests)
    scheduler = engine.scheduler
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks and scheduler.memory.num_sequences == 0
    return [results(request) for request in requests], Counts(counter.num_preempted, counter.num_hit)
