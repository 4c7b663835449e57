"""Penalties, bans and top_p decay: the formulas of their sources in a few lines of numpy, and draws against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from engine.request import SamplingParams
from executor.penalties import add_bias, ban, current_top_p, penalize
from executor.sampler import sample
from tests.support.rows import Row, sampling_rows, set_seeds

DRAWS = 20_000
VOCAB = 8
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -3.0])
PROMPT, OUTPUT = [0, 4, 4], [1, 6, 6, 7, 1, 6]
END_ID = 2


def by_definition(params: SamplingParams, banned: list[int]) -> np.ndarray:
    """Probabilities: bias; FasterTransformer's order (temperature, penalties) or OpenAI's; bans; then the nucleus."""
    logits = LOGITS.copy()
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    temperature = params.temperature or 1.0
    if not params.openai_penalties:
        logits /= temperature
    for token_id in set(PROMPT + OUTPUT):
        if logits[token_id] < 0:
            logits[token_id] *= params.repetition_penalty
        else:
            logits[token_id] /= params.repetition_penalty
    for token_id in set(OUTPUT if params.openai_penalties else PROMPT + OUTPUT):
        logits[token_id] -= params.presence_penalty
    for token_id in OUTPUT:
        logits[token_id] -= params.frequency_penalty
    if params.openai_penalties:
        logits /= temperature
    logits[banned] = -np.inf
    if len(OUTPUT) < params.min_length:
        logits[END_ID] = -np.inf
    p = np.exp(logits) / np.exp(logits).sum()
    top_p = params.top_p
    for token_id in OUTPUT:
        top_p = params.top_p if token_id == params.top_p_reset_id else max(top_p * params.top_p_decay, params.top_p_min)
    order = np.argsort(-p, kind="stable")
    keep = order[: int(np.argmax(np.cumsum(p[order]) >= top_p)) + 1] if top_p < 1 else order
    cut = np.zeros_like(p)
    cut[keep] = p[keep] / p[keep].sum()
    return cut


def row(params: SamplingParams, banned: Sequence[int] = ()) -> Row:
    return Row(params, (END_ID,), len(PROMPT), len(PROMPT) + len(OUTPUT), banned)


def history() -> torch.Tensor:
    """[1, max_seq_len]; behind the text there are tokens of another request."""
    tokens = torch.full((1, 20), 3)
    tokens[:, : len(PROMPT) + len(OUTPUT)] = torch.tensor(PROMPT + OUTPUT)
    return tokens


KINDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "repetition": ({"repetition_penalty": 1.7}, []),
    "repetition below 1": ({"repetition_penalty": 0.6, "temperature": 1.4}, []),
    "presence": ({"presence_penalty": 0.9, "temperature": 0.7}, []),
    "frequency": ({"frequency_penalty": 0.4, "temperature": 0.7}, []),
    "presence and frequency": ({"presence_penalty": 0.5, "frequency_penalty": -0.3}, []),
    "repetition and frequency": ({"repetition_penalty": 1.2, "frequency_penalty": 0.2}, []),
    "OpenAI's presence": ({"openai_penalties": True, "presence_penalty": 0.9, "temperature": 0.7}, []),
    "OpenAI's frequency": ({"openai_penalties": True, "frequency_penalty": 0.4, "temperature": 1.6}, []),
    "OpenAI's and repetition": (
        {
            "openai_penalties": True,
            "presence_penalty": -0.8,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.4,
            "temperature": 0.8,
        },
        [],
    ),
    "bias": ({"logit_bias": ((3, 1.5), (0, -2.0), (3, 0.5)), "temperature": 0.7}, []),
    "bias of -100": ({"logit_bias": ((0, -100.0), (6, -100.0))}, []),
    "bias before penalties": ({"logit_bias": ((4, 2.0), (6, -2.0)), "repetition_penalty": 1.7}, []),
    "min_length": ({"min_length": 7}, []),
    "min_length reached": ({"min_length": 6}, []),
    "banned": ({}, [0, 6, 6]),
    "top_p": ({"top_p": 0.8}, []),
    "top_p decay": ({"top_p": 0.9, "top_p_decay": 0.8}, []),
    "top_p decay from 1": ({"top_p": 1.0, "top_p_decay": 0.95}, []),
    "top_p decay to its least": ({"top_p": 0.9, "top_p_decay": 0.5, "top_p_min": 0.55}, []),
    "top_p reset": ({"top_p": 0.9, "top_p_decay": 0.8, "top_p_reset_id": 7}, []),
    "top_p reset just now": ({"top_p": 0.9, "top_p_decay": 0.5, "top_p_reset_id": 6}, []),
    "all": ({"top_p": 0.9, "top_p_decay": 0.98, "repetition_penalty": 1.3, "min_length": 9, "temperature": 1.2}, [3]),
}


SLOW = pytest.mark.slow("3 s of draws each; two kinds with a decay stay, others' logits are compared too")
SLOW_KINDS = {"top_p", "top_p decay", "top_p decay from 1", "top_p decay to its least", "top_p reset"}
SLOW_KINDS |= {kind for kind in KINDS if kind.startswith(("OpenAI", "bias"))}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "top_p" not in KINDS[kind][0]])
def test_logits_are_the_definitions(kind: str) -> None:
    settings, banned = KINDS[kind]
    params = SamplingParams(1, top_p=1.0, **settings)
    rows = sampling_rows([row(params, banned)], history())
    logits = ban(penalize(add_bias(torch.tensor(LOGITS[None], dtype=torch.float32), rows), rows), rows)
    probabilities = (logits[0] / params.temperature).softmax(dim=-1).numpy()
    np.testing.assert_allclose(probabilities, by_definition(params, banned), atol=1e-6)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW if kind in SLOW_KINDS else []) for kind in KINDS])
def test_draws_pass_chi_square(kind: str) -> None:
    settings, banned = KINDS[kind]
    counts = np.zeros(VOCAB, dtype=int)
    params = SamplingParams(1, **{"top_p": 1.0, **settings})
    rows = sampling_rows([row(params, banned)] * 1000, history())
    for first in range(0, DRAWS, 1000):
        set_seeds(rows, range(first, first + 1000))
        logits = torch.tensor(LOGITS, dtype=torch.float32).repeat(1000, 1)
        penalized = penalize(add_bias(logits, rows), rows)
        tokens = sample(ban(penalized, rows), rows, current_top_p(rows))
        counts += np.bincount(tokens.numpy(), minlength=VOCAB)
    probabilities = by_definition(params, banned)
    kept = probabilities > 1e-9  # a bias of -100 leaves that little
    assert counts[~kept].sum() == 0
    if kept.sum() > 1:
        assert chisquare(counts[kept], probabilities[kept] * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["presence", "frequency", "repetition", "OpenAI's and repetition", "bias"])
def test_greedy_follows_the_penalized_logits(kind: str) -> None:
    params = SamplingParams(1, **KINDS[kind][0])
    rows = sampling_rows([row(params)], history())
    logits = penalize(add_bias(torch.tensor(LOGITS[None], dtype=torch.float32), rows), rows)
    assert sample(logits, rows).tolist() == [by_definition(params, []).argmax()]


def test_rows_of_any_length_share_a_batch_and_neutral_ones_are_untouched() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 30), generator=generator)
    logits = torch.randn(4, 50, generator=generator)
    kinds = [{"repetition_penalty": 1.5}, {}, {"frequency_penalty": 0.3}, {"presence_penalty": 0.2, "temperature": 3.0}]
    rows = [Row(SamplingParams(1, top_k=5, **kind), (), 2 + slot, 5 + 7 * slot) for slot, kind in enumerate(kinds)]
    together = penalize(logits, sampling_rows(rows, tokens))
    for i, one in enumerate(rows):
        assert torch.equal(together[i], penalize(logits[i : i + 1], sampling_rows([one], tokens[i : i + 1]))[0])
    assert torch.equal(together[1], logits[1])
    assert not torch.equal(together[0], logits[0])
    assert penalize(logits, sampling_rows([rows[1]] * 4, tokens)) is logits


def test_a_bias_is_its_own_rows_and_rows_without_one_cost_nothing() -> None:
    logits = torch.zeros(3, VOCAB)
    biased = [Row(SamplingParams(1, logit_bias=bias)) for bias in (((1, 2.0),), (), ((7, -1.0), (1, 0.5)))]
    expected = torch.zeros(3, VOCAB)
    expected[0, 1], expected[2, 7], expected[2, 1] = 2.0, -1.0, 0.5
    rows = sampling_rows(biased)
    assert torch.equal(add_bias(logits, rows), expected)
    assert not logits.any()
    assert add_bias(logits, sampling_rows([biased[1]])) is logits


def test_ends_are_banned_only_where_there_is_an_end() -> None:
    logits = torch.zeros(2, VOCAB)
    params = SamplingParams(1, min_length=100)
    rows = [row(params), Row(params, (), 3, 9)]
    assert ban(logits, sampling_rows(rows)).isinf().sum(dim=1).tolist() == [1, 0]
    assert ban(logits, sampling_rows([rows[1]] * 2)) is logits


def test_top_p_min_is_of_no_account_without_decay() -> None:
    """A neighbour with decay once applied it to rows that have none."""
    rows = [row(SamplingParams(1, top_p=0.05, top_p_min=0.9)), row(SamplingParams(1, top_p=0.5, top_p_decay=0.9))]
    assert current_top_p(sampling_rows(rows, history()))[0].item() == 0.05


def test_bans_of_the_whole_request_and_of_the_step() -> None:
    rows = [row(SamplingParams(1), banned=[1]), row(SamplingParams(1))]
    rows[1] = replace(rows[1], always_banned=[2, 5])
    banned = ban(torch.zeros(2, VOCAB), sampling_rows(rows)).isinf()
    assert [ids.nonzero().flatten().tolist() for ids in banned] == [[1], [2, 5]]
