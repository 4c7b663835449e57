"""Requests of every kind on a GPU with too few blocks for them: each result is that of its solo run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.engines import make_engine
from tests.support.soak import run, soak_items
from tests.support.ties import texts
from tests.support.traffic import make_request, results, run_alone, vocabulary

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
NUM_BLOCKS = 52  # of 4 tokens: the largest request takes 49
COUNT = 300


def test_preempted_requests_are_what_they_are_alone(converted: Callable[[int], Path]) -> None:
    items = [item for item in soak_items(COUNT, seed=5) if "leaves_after" not in item]
    limits = dict(device="cuda", data_type="fp32", max_batch_size=24, block_size=4)
    engine = make_engine(converted(1), num_blocks=NUM_BLOCKS, max_step_tokens=24, **limits)
    crowd, counts = run(engine, items)
    engine.executor.close()
    print(counts)
    assert counts.num_preempted >= 0.15 * len(items)
    assert counts.num_hit > len(items) / 2
    engine = make_engine(converted(1), max_step_tokens=64, no_prefix_cache=True, **limits)
    requests = [make_request(item, vocabulary()) for item in items]
    run_alone(engine, requests)
    engine.executor.close()
    same = [texts(ours) == texts(results(request)) for ours, request in zip(crowd, requests, strict=True)]
    print(f"{sum(same)} of {len(same)} the same")
    assert sum(same) >= 0.97 * len(same)  # ties fall to either side, as the sums' order is another
