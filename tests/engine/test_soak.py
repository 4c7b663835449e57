"""Many requests of every kind with too few blocks: each result is that of its solo run, at any tp × pp.

SOAK_REQUESTS=2000 python -m pytest -n 0 -s tests/engine/test_soak.py
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel

from engine.request import CANCELLED
from tests.support.engines import make_engine
from tests.support.ranks import run_soak
from tests.support.soak import run, soak_items
from tests.support.ties import is_tie, texts
from tests.support.traffic import make_request, results, run_alone, vocabulary

SEED = 3
NUM_BLOCKS = 52  # of 4 tokens: the largest request takes 49
# As many requests as wished: 2000 take some ten minutes at each grid.
WISHED = int(os.environ.get("SOAK_REQUESTS", "0"))
SLOW = (pytest.mark.slow("160 requests alone and in a crowd at each grid"), pytest.mark.timeout(max(900, 4 * WISHED)))


@pytest.fixture(scope="module")
def alone(converted: Callable[[int], Path]) -> Callable[[int], list[dict[str, Any]]]:
    """count → the results of the solo runs, at 1 × 1."""
    return functools.cache(lambda count: solo_results(converted(1), soak_items(count, SEED)))


@pytest.mark.parametrize(
    ("tp", "pp", "count"),
    [(1, 1, WISHED or 60), *(pytest.param(tp, pp, WISHED or 160, marks=SLOW) for tp, pp in ((2, 1), (2, 2)))],
    ids=str,
)
def test_preempted_requests_are_what_they_are_alone(
    tp: int,
    pp: int,
    count: int,
    converted: Callable[[int], Path],
    alone: Callable[[int], list[dict[str, Any]]],
    gpt2_source: tuple[Path, GPT2LMHeadModel],
) -> None:
    items = soak_items(count, SEED)
    if tp * pp == 1:
        limits = dict(max_batch_size=24, max_step_tokens=24, block_size=4)
        crowd, counts = run(make_engine(converted(1), num_blocks=NUM_BLOCKS, **limits), items)
    else:
        flags = ["--max-batch-size", "24", "--num-blocks", str(NUM_BLOCKS)]
        crowd, counts = run_soak(converted(tp), items, tp, pp, *flags)
    assert counts.num_preempted >= 0.15 * count
    assert counts.num_hit > count / 2
    cancelled = different = 0
    for item, ours, theirs in zip(items, crowd, alone(count), strict=True):
        if any(output["finish_reason"] == CANCELLED for output in ours["outputs"]):
            cancelled += 1
            if "beam_width" not in item["sampling"]:  # beams on their way are not those at the end
                theirs = {"outputs": [cut(*pair) for pair in zip(theirs["outputs"], ours["outputs"], strict=True)]}
            else:
                continue
        if texts(ours) != texts(theirs):
            different += 1
            assert is_tie(gpt2_source[1], item, theirs, ours), f"{item}\n{ours}\n{theirs}"
        elif "prompt_log_probs" in theirs:
            assert ours["prompt_log_probs"] == pytest.approx(theirs["prompt_log_probs"], abs=1e-4)
            for one, other in zip(ours["outputs"], theirs["outputs"], strict=True):
                assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)
                assert len(one["alternatives"]) == len(other["alternatives"])
    print(f"{tp}×{pp}: {count} requests, {counts}, {cancelled} cancelled, {different} decided by rounding", flush=True)
    assert cancelled > 0.02 * count
    assert different <= 3 + count // 150


def cut(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """An output of a solo run as it was when ours was cancelled, if it was."""
    if ours["finish_reason"] != CANCELLED:
        return theirs
    return {"token_ids": theirs["token_ids"][: len(ours["token_ids"])], "finish_reason": CANCELLED}


def solo_results(folder: Path, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    engine = make_engine(folder, max_batch_size=24, max_step_tokens=64, block_size=4, no_prefix_cache=True)
    words = vocabulary()
    requests = [make_request(item, words) for item in items]
    run_alone(engine, requests)
    return [results(request) for request in requests]
