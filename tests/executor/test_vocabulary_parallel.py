"""Steps of many rows at tp > 1: each rank chooses for its share of them, and logits are gathered where asked for.

The vocabulary of 303 tokens is uneven at each tp here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from executor.layers import FEW_ROWS
from tests.support.ranks import call_ranks, run_engine
from tests.support.ties import assert_close, assert_likeliest
from tests.support.traffic import looping_items, random_items, telling_items


@pytest.mark.parametrize("tp", [2, 4])
def test_each_rank_has_all_tokens_and_gathers_nothing_else(tp: int) -> None:
    """Numbers of rows that tp does not divide, and fewer shares than ranks. All logits are negative, so the padding of
    the vocabulary would be chosen."""
    rng = np.random.default_rng(0)
    weight, few_rows = -rng.random((41, 6), dtype=np.float32), 3
    inputs = [rng.random((rows, 6), dtype=np.float32) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 40)]
    for found in call_ranks(tp, "tests.multi.collectives:choose", weight, inputs, few_rows):
        for hidden, (chosen, reversed_logits, num_gathered) in zip(inputs, found, strict=True):
            logits, rows = hidden @ weight.T, len(hidden)
            assert chosen[0].tolist() == logits.argmax(1).tolist()
            np.testing.assert_allclose(chosen[1], logits.max(1), rtol=1e-5)
            np.testing.assert_allclose(reversed_logits[::-1], logits, rtol=1e-5)
            padded_vocab = -(-41 // tp) * tp
            assert num_gathered == (rows * padded_vocab if rows <= few_rows else 2 * -(-rows // tp) * tp)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (2, 2)], ids=str)
def test_many_rows_are_hugging_faces(
    tp: int, pp: int, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    """Greedy tokens, log-probabilities, alternatives, and those of prompts; each cohort has more than FEW_ROWS rows."""
    items = telling_items(60 * pp, 50)
    flags = [str(converted(tp)), "--tp", str(tp), "--pp", str(pp), "--max-batch-size", str(50 * pp)]
    parts = call_ranks(tp * pp, "tests.multi.engine_parity:generate_and_record", items, *flags)
    rows = parts[-1][1]
    assert all(other == rows for _, other in parts[-tp:])  # the last stage
    assert any(count > FEW_ROWS and count % tp for count in rows)
    for item, result in zip(items, parts[0][0], strict=True):
        assert_likeliest(gpt2_source[1], item, result)


SHARED = ("--few-rows", "1", "--max-batch-size", "6")  # each step of two rows or more


@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 2)], ids=str)
def test_random_requests_are_those_of_one_rank(tp: int, pp: int, converted: Callable[[int], Path]) -> None:
    """Beams, samples, bans and all that may be told of tokens. tests/executor/test_graphs.py has this in graphs."""
    items = random_items(24, seed=7)
    assert_close(run_engine(converted(1), items, 1, 1), run_engine(converted(tp), items, tp, pp, *SHARED))


def test_drafts_are_those_of_one_rank(converted: Callable[[int], Path]) -> None:
    """The rows of one slot are of several ranks' shares. Without graphs, and with them."""
    items = looping_items(12)
    expected, flags = run_engine(converted(1), items, 1, 1), (*SHARED, "--speculative", "ngram")
    assert_close(expected, run_engine(converted(2), items, 2, 1, *flags))
    flags = (str(converted(2)), "--tp", "2", *flags)
    found, replays = call_ranks(2, "tests.multi.engine_parity:generate_in_graphs", items, *flags)[0]
    assert_close(expected, found)
    assert sum(name == "steps with drafts" for name, _ in replays) > 20
