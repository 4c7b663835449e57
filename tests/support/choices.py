"""Rows for the tests of kernels.choose_tokens: every mix of parameters, and the tokens that executor.sampler gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.plan import NewSequences
from engine.request import SamplingParams
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState
from executor.token_choice import choose

CUTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k 1": {"top_k": 1, "top_p": 0.5},
    "temperature 0": {"temperature": 0.0, "top_k": 9},
    "temperature": {"top_p": 1.0, "temperature": 0.7},
    "cold": {"top_p": 1.0, "temperature": 0.001},
    "hot": {"top_p": 1.0, "temperature": 1000.0},
    "top_p": {"top_p": 0.95},
    "top_p half": {"top_p": 0.5, "temperature": 1.7},
    "top_p little": {"top_p": 0.1},
    "top_p next to none": {"top_p": 1e-9},
    "top_k": {"top_k": 50},
    "top_k 2": {"top_k": 2, "temperature": 3.0},
    "top_k 512": {"top_k": 512},
    "top_k 1000": {"top_k": 1000},
    "top_k of more than there are": {"top_k": 2**32 - 1, "top_p": 0.9},
    "top_k, top_p": {"top_k": 50, "top_p": 0.9, "temperature": 1.2},
    "top_k 700, top_p": {"top_k": 700, "top_p": 0.6},
    "min_p": {"top_p": 1.0, "min_p": 0.05},
    "min_p 1": {"top_p": 1.0, "min_p": 1.0, "temperature": 2.0},
    "min_p, top_p": {"top_p": 0.8, "min_p": 0.1},
    "min_p, top_k, top_p": {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "decay": {"top_p": 0.95, "top_p_decay": 0.97, "top_p_min": 0.3, "top_p_reset_id": 7},
    "decay of 1": {"top_p": 1.0, "top_p_decay": 0.9, "top_p_min": 0.05, "top_k": 100},
}
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.3, "presence_penalty": -0.4},
    "OpenAI's": {
        "openai_penalties": True,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.7,
        "repetition_penalty": 0.8,
    },
    "bias": {"logit_bias": ((5, 4.0), (11, -100.0), (5, 1.0), (0, 2.5))},
    "min_length": {"min_length": 10**6},
    "min_length reached": {"min_length": 1},
    "all": {"logit_bias": ((3, 3.0), (4, -3.0)), "repetition_penalty": 1.2, "min_length": 10**6},
}


def mixed_rows(count: int, vocab_size: int, device: torch.device, seed: int = 0, max_seq_len: int = 64) -> SamplingRows:
    """Rows of all cuts and changes, one after another; half of a row's tokens come from a few. Slots are shuffled.

    The state has two slots more than rows: one that nobody has, and the dummy.
    """
    rng = random.Random(seed)
    kinds = [(cut, change) for change in CHANGES.values() for cut in CUTS.values()]
    if count < len(kinds):
        kinds = rng.sample(kinds, count)
    state = SlotState(count + 1, max_seq_len, 1, 0, device)
    slots = rng.sample(range(count + 1), count)
    positions = []
    for row, slot in enumerate(slots):
        cut, change = kinds[row % len(kinds)]
        position = rng.randrange(2, max_seq_len)
        prompt_len = rng.randrange(1, position)
        tokens = [rng.randrange(rng.choice([12, vocab_size])) for _ in range(max_seq_len)]
        random_seed = rng.choice([0, 1, 2**63, 2**64 - 1, rng.randrange(2**64)])
        params = SamplingParams(1, random_seed=random_seed, **{**change, **cut})
        banned = rng.choice([[], [], [1, 2, 3, vocab_size - 1]])
        state.start([NewSequences([slot], tokens[:prompt_len], params, (7, 8), [[]], banned)])
        state.token_ids[slot] = torch.tensor(tokens)
        positions.append(position)
    state.positions[state.tensor(slots)] = state.tensor(positions) - 1
    return SamplingRows(state, np.array(slots), np.array(positions))


def mixed_logits(count: int, vocab_size: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """[count, vocab_size] fp32: flat rows and peaked ones, some of few values, so with many ties, some of bf16's."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(count, vocab_size, device=device, generator=generator)
    logits *= torch.tensor([0.05, 1.0, 3.0, 8.0], device=device).repeat(-(-count // 4))[:count, None]
    logits[1::5] = (logits[1::5] * 2).round() / 2
    logits[2::5] = logits[2::5].bfloat16().float()
    return logits


def by_sampler(rows: SamplingRows, logits: torch.Tensor) -> torch.Tensor:
    """[2, rows] fp64: tokens and log-probabilities of executor.sampler, each row by itself."""
    parts = [choose(rows.part(np.array([row])), logits[row : row + 1]) for row in range(len(rows))]
    return torch.cat(parts, dim=1)


def differences(rows: SamplingRows, found: Sequence[int], expected: Sequence[int]) -> list[str]:
    """The rows whose tokens differ, in words."""
    return [
        f"row {row} at {rows.positions[row]}: {one}, not {other}: {rows.requests[row].params}"
        for row, (one, other) in enumerate(zip(found, expected, strict=True))
        if one != other
    ]
