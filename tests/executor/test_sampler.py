"""Sampling against numpy written from the definition, and the generator against plain Python integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from engine.request import SamplingParams
from executor import sampler as sampling
from executor.sampler import sample
from kernels.gumbel import as_int64, gumbel, row_states
from tests.support.rows import Row, sample_rows, sampling_rows, set_seeds

DRAWS = 20_000
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -3.0])


def expected(temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0, min_p: float = 0.0) -> np.ndarray:
    """The distribution by definition: softmax(logits / T), cut by min_p, to top k, to the nucleus, renormalized."""
    p = np.exp(LOGITS / temperature)
    p[p < min_p * p.max()] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = order[: top_k or len(p)]
    cut = np.zeros_like(p)
    cut[keep] = p[keep] / p[keep].sum()
    if 0 < top_p < 1:
        cumulative = np.cumsum(cut[order])
        keep = order[: int(np.argmax(cumulative >= top_p)) + 1]
        nucleus = np.zeros_like(p)
        nucleus[keep] = cut[keep]
        cut = nucleus / nucleus.sum()
    return cut


def draw(params: SamplingParams, logits: np.ndarray = LOGITS) -> np.ndarray:
    """20 000 draws with as many seeds, in batches."""
    counts = np.zeros(len(logits), dtype=int)
    rows = sampling_rows([Row(params, position=7)] * 1000)
    for first in range(0, DRAWS, 1000):
        set_seeds(rows, range(first, first + 1000))
        tokens = sample(torch.tensor(logits, dtype=torch.float32).repeat(1000, 1), rows)
        counts += np.bincount(tokens.numpy(), minlength=len(logits))
    return counts


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 0, 1.0, 0.0),
        (1.0, 3, 0.0, 0.0),
        (0.7, 5, 0.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        pytest.param(1.3, 0, 0.9, 0.0, marks=pytest.mark.slow("3 s of draws; another top_p stays")),
        (0.9, 4, 0.8, 0.0),
        (1.5, 0, 1.0, 0.2),  # leaves 5 tokens; before the temperature it would leave 4
        (1.0, 0, 0.85, 0.2),  # the nucleus is of what min_p leaves: 3 tokens, not 4
        pytest.param(1.0, 3, 0.0, 0.5, marks=pytest.mark.slow("2 s of draws; min_p with top_p stays")),
    ],
)
def test_frequencies_pass_chi_square(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    probabilities = expected(temperature, top_k, top_p, min_p)
    counts = draw(SamplingParams(1, temperature, top_k, top_p, min_p=min_p))
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    assert chisquare(counts[kept], probabilities[kept] * DRAWS).pvalue > 1e-3


def test_chi_square_notices_a_wrong_distribution() -> None:
    counts = draw(SamplingParams(1, temperature=1.1, top_p=1.0))
    assert chisquare(counts, expected(1.0) * DRAWS).pvalue < 1e-6


@pytest.mark.parametrize("params", [SamplingParams(1), SamplingParams(1, top_k=1), SamplingParams(1, temperature=0.0)])
def test_greedy_is_argmax(params: SamplingParams) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert sample_rows(logits, [params] * 5, [0] * 5).tolist() == logits.argmax(-1).tolist()


def test_a_row_is_the_same_alone_and_among_strangers() -> None:
    logits = torch.randn(9, 3000, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # many ties
    kinds = [dict(top_k=40), dict(top_p=0.9), dict(), dict(top_k=600), dict(temperature=0.5, top_p=1.0)]
    kinds += [dict(top_p=1.0, min_p=0.3), dict(top_k=30, min_p=0.1)]
    params = [SamplingParams(1, random_seed=row * 17, **kinds[row % 7]) for row in range(9)]
    positions = list(range(100, 109))
    together = sample_rows(logits, params, positions).tolist()
    alone = [sample_rows(logits[r : r + 1], [params[r]], [positions[r]]).item() for r in range(9)]
    assert together == alone


def test_partial_and_full_sort_agree() -> None:
    """A top_k of 512 sorts candidates only, 513 the whole vocabulary; on one seed they draw alike."""
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(2)) * 8
    for top_k in (2, 17):
        partial = sample_rows(logits, [SamplingParams(1, top_k=top_k, random_seed=s) for s in range(200)], [0] * 200)
        ranks = (-logits).argsort(-1).argsort(-1).gather(-1, partial[:, None])
        assert int(ranks.max()) < top_k
    wide = [SamplingParams(1, top_k=512, random_seed=s) for s in range(200)]
    wider = [SamplingParams(1, top_k=513, random_seed=s) for s in range(200)]
    same = sample_rows(logits, wide, [0] * 200) == sample_rows(logits, wider, [0] * 200)
    assert int(same.sum()) >= 199  # the 513th token has almost no mass here


def test_a_nucleus_found_among_few_candidates_is_that_of_the_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a row whose nucleus ends early is not sorted whole; rows with flat logits still are."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(60, 5000, generator=generator) * torch.linspace(0.1, 6, 60)[:, None]
    params = [SamplingParams(1, top_p=0.9, random_seed=seed) for seed in range(60)]
    counts = [sampling._num_candidates(p, row) for p, row in zip(params, logits, strict=True)]
    assert {1024, 5000} == set(counts)
    quick = sample_rows(logits, params, [1] * 60)
    monkeypatch.setattr(sampling, "_num_candidates", lambda params, logits: 5000)
    assert torch.equal(quick, sample_rows(logits, params, [1] * 60))


def test_equal_logits_at_the_edge_of_the_candidates_go_by_id() -> None:
    """topk takes any of them: a row of equal logits once gave tokens that were not among the first k."""
    logits = torch.zeros(40, 5000)
    for kind in (dict(top_k=20), dict(top_p=0.1)):
        params = [SamplingParams(1, random_seed=seed, **kind) for seed in range(40)]
        assert int(sample_rows(logits, params, [0] * 40).max()) < (20 if "top_k" in kind else 501)


def splitmix64(state: int) -> int:
    """SplitMix64's output function, in Python integers."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def gumbel_by_definition(seed: int, position: int, token_id: int) -> float:
    """-log(-log(u)) with u from SplitMix64 of SplitMix64 of SplitMix64, in Python integers."""
    golden = 0x9E3779B97F4A7C15
    state = splitmix64(splitmix64(seed + golden) + golden * (position + 1))
    uniform = ((splitmix64(state + golden * (token_id + 1)) >> 11) + 0.5) / 2**53
    return -math.log(-math.log(uniform))


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    seeds, positions = [0, 1, 2**63, 2**64 - 1], [0, 5, 1000, 3]
    states = row_states(torch.tensor(list(map(as_int64, seeds))), torch.tensor(positions))[:, None]
    token_ids = torch.tensor([0, 1, 7, 50256])
    noise = gumbel(states, token_ids)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column, token_id in enumerate(token_ids.tolist()):
            exact = gumbel_by_definition(seed, position, token_id)
            assert noise[row, column].item() == pytest.approx(exact, rel=1e-12)


def test_noise_is_gumbel_and_does_not_correlate() -> None:
    for seeds, positions in (([3] * 300, list(range(300))), (list(range(300)), [3] * 300)):
        states = row_states(torch.tensor(list(map(as_int64, seeds))), torch.tensor(positions))[:, None]
        noise = gumbel(states, torch.arange(200)).numpy()
        assert kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
        for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_rounding_of_logits_hardly_ever_changes_a_token() -> None:
    """The first design drew from cumulated probabilities: fp32 noise between a CPU and a GPU changed a token of
    a 5003 token vocabulary within 15 steps, because it moves all 5003 boundaries."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 5003, generator=generator) * 2
    nudged = logits * (1 + 2e-6 * torch.randn(logits.shape, generator=generator))
    for kind in (dict(top_p=0.9), dict(top_p=1.0), dict(top_k=50), dict(top_k=50, top_p=0.8)):
        params = [SamplingParams(1, random_seed=seed, **kind) for seed in range(400)]
        assert torch.equal(sample_rows(logits, params, [5] * 400), sample_rows(nudged, params, [5] * 400)), kind
