"""A request's result is its own: requests with every mix of parameters, in a crowd as alone, at any tp × pp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from tests.support.engines import make_engine
from tests.support.ranks import run_engine
from tests.support.ties import is_tie, texts
from tests.support.traffic import make_request, random_items, results, run_alone, run_crowd, vocabulary

COUNT = 500
MOST_TIES = 3  # that rounding may decide, of some 7000 tokens


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return random_items(COUNT, seed=1)


class Runs:
    """The results of the first `count` items by (tp, pp, alone or in a crowd, count), each run once."""

    def __init__(self, items: list[dict[str, Any]], converted: Callable[[int], Path]) -> None:
        self.items = items
        self.converted = converted
        self.get = functools.cache(self._run)

    def _run(self, tp: int, pp: int, is_alone: bool, count: int) -> list[dict[str, Any]]:
        items = self.items[:count]
        if tp * pp == 1:
            engine = make_engine(self.converted(1), max_batch_size=24, max_step_tokens=24, block_size=4)
            words = vocabulary()
            requests = [make_request(item, words) for item in items]
            (run_alone if is_alone else run_crowd)(engine, requests)
            assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
            return [results(request) for request in requests]
        flags = ["--max-batch-size", "24", *(["--alone"] if is_alone else [])]
        return run_engine(self.converted(tp), items, tp, pp, *flags)


@pytest.fixture(scope="module")
def runs(items: list[dict[str, Any]], converted: Callable[[int], Path]) -> Runs:
    return Runs(items, converted)


SLOW = pytest.mark.slow("500 requests take a minute at each grid; some of them stay")


@pytest.mark.parametrize(
    ("tp", "pp", "count"),
    [(1, 1, 100), (2, 2, 25), *(pytest.param(tp, pp, COUNT, marks=SLOW) for tp, pp in ((1, 1), (2, 1), (2, 2)))],
    ids=str,
)
def test_each_request_is_what_it_is_alone(
    tp: int,
    pp: int,
    count: int,
    items: list[dict[str, Any]],
    runs: Runs,
    gpt2_source: tuple[Path, GPT2LMHeadModel],
) -> None:
    alone, crowd = runs.get(tp, pp, True, count), runs.get(tp, pp, False, count)
    different = [index for index in range(count) if texts(crowd[index]) != texts(alone[index])]
    for index in different:
        report = f"request {index}: {items[index]}\n{crowd[index]}\n{alone[index]}"
        assert is_tie(gpt2_source[1], items[index], alone[index], crowd[index]), report
    assert len(different) <= MOST_TIES
    for index in set(range(count)) - set(different):
        one, other = crowd[index], alone[index]
        for name in ("log_probs", "alternatives"):
            for ours, theirs in zip(one["outputs"], other["outputs"], strict=True):
                assert np.allclose(flat(ours[name]), flat(theirs[name]), atol=1e-4)
        assert np.allclose(one["prompt_log_probs"], other["prompt_log_probs"], atol=1e-4)
        assert np.allclose(one["next_token_logits"], other["next_token_logits"], atol=1e-4)


def test_a_tie_is_told_from_a_defect(items: list[dict[str, Any]], gpt2_source: tuple[Path, GPT2LMHeadModel]) -> None:
    known = [185, 119, 57, 85, 2, 27, 2, 269, 165, 29, 88, 80]

    def ending(token_id: int) -> dict[str, Any]:
        return {"outputs": [{"token_ids": [*known, token_id]}]}

    assert is_tie(gpt2_source[1], items[199], ending(85), ending(87))
    for wrong in (79, 0, 217):
        assert not is_tie(gpt2_source[1], items[199], ending(85), ending(wrong))


def flat(values: list[Any]) -> list[float]:
    """The numbers of nested lists."""
    return [number for value in values for number in (flat(value) if isinstance(value, (list, tuple)) else [value])]


@pytest.mark.parametrize("count", [100, pytest.param(COUNT, marks=SLOW)])
def test_the_mix_has_everything(count: int, items: list[dict[str, Any]], runs: Runs) -> None:
    alone = runs.get(1, 1, True, count)
    reasons = {output["finish_reason"] for result in alone for output in result["outputs"]}
    assert reasons == {"length", "end_id", "stop"}
    for name in ("n", "beam_width", "top_p_decay", "presence_penalty", "frequency_penalty", "prompt_log_probs"):
        assert sum(name in item["sampling"] for item in items) > 20
    words = vocabulary()
    for item, result in zip(items[:count], alone, strict=True):
        for output in result["outputs"]:
            text = b"".join(words.token_bytes[i] for i in output["token_ids"]).decode()
            assert not any(word in text for word in item["bad"])
            stops = [word for word in item["stop"] if word in text]
            assert bool(stops) == (output["finish_reason"] == "stop") or output["finish_reason"] == "end_id"
