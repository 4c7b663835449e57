"""Choosing tokens from logits: greedy, temperature, top-k, top-p. Each row depends on its own request only.

A row's randomness is one number in [0, 1) made from (random_seed, position) by a counter-based generator on
the host, so a request draws the same numbers alone, in any batch, on any device and at any tp × pp.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.request import SamplingParams

# Rows with 0 < top_k ≤ this sort only as many candidates, not the vocabulary; fixed, so that a row's result
# cannot depend on another row's top_k. A larger one sorts everything.
_MAX_PARTIAL_TOP_K = 512


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per row, fp64, by SplitMix64 (Steele, Lea, Flood 2014) of seed and position."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seeds, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15) * (np.asarray(positions, dtype=np.uint64) + np.uint64(1)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> torch.Tensor:
    """One token per row.

    logits: [rows, vocab] fp32; params: one per row; positions: of the token to be chosen, in its request.
    Returns [rows] int64 on the logits' device.
    """
    tokens = logits.argmax(dim=-1)
    groups: dict[bool, list[int]] = {}
    for row, p in enumerate(params):
        if not p.is_greedy:
            groups.setdefault(0 < p.top_k <= _MAX_PARTIAL_TOP_K, []).append(row)
    for is_partial, rows in groups.items():
        index = torch.tensor(rows, device=logits.device)
        chosen = _sample_rows(logits[index], [params[r] for r in rows], [positions[r] for r in rows], is_partial)
        tokens[index] = chosen
    return tokens


def _sample_rows(
    logits: torch.Tensor, params: list[SamplingParams], positions: list[int], is_partial: bool
) -> torch.Tensor:
    device = logits.device

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]  # [rows, 1]

    vocab_size = logits.shape[-1]
    logits, token_ids = _descending(logits, min(2 * _MAX_PARTIAL_TOP_K, vocab_size) if is_partial else vocab_size)
    temperature = column([p.temperature for p in params], torch.float32)
    top_k = column([p.top_k or vocab_size for p in params], torch.int64)
    top_p = column([p.top_p or 1.0 for p in params], torch.float64)
    uniform = column(uniforms([p.random_seed for p in params], positions).tolist(), torch.float64)

    rank = torch.arange(logits.shape[-1], device=device)
    scaled = (logits / temperature).masked_fill(rank >= top_k, float("-inf"))
    mass = scaled.double().softmax(dim=-1).cumsum(dim=-1)  # [rows, candidates], the last is 1
    # The nucleus: up to and with the first candidate whose mass reaches top_p; then u · its whole mass.
    last = torch.searchsorted(mass, top_p.clamp(max=1.0)).clamp(max=mass.shape[-1] - 1)
    last = torch.minimum(last, top_k - 1)
    target = uniform * mass.gather(-1, last)
    chosen = torch.searchsorted(mass, target, right=True)
    return token_ids.gather(-1, torch.minimum(chosen, last)).squeeze(-1)


def _descending(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row and their ids, largest first, equal ones by id."""
    if count == logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    _, token_ids = logits.topk(count, dim=-1, sorted=False)
    token_ids = token_ids.sort(dim=-1).values
    values, order = logits.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(-1, order)
