"""Choosing tokens from logits: greedy, temperature, min-p, top-k, top-p. Each row depends on its own request only.

Sampling is argmax of logits / temperature + Gumbel noise over the tokens that min-p, top-k and top-p leave (the
Gumbel-max form of drawing from their softmax). The noise of a token is a counter-based function of (random_seed,
position, token id), so a request draws the same alone, in any batch, on any device and at any tp × pp. And unlike
drawing from the cumulated probabilities, where rounding moves every boundary, a change in the last bits of the logits
changes the token only where the two best are that close.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.request import SamplingParams
from executor.sampling_rows import SamplingRows
from kernels.gumbel import gumbel, row_states
from kernels.slot_parameters import Parameter

# Rows with 0 < top_k ≤ this look at twice as many candidates, not at the vocabulary; fixed, so that a row's result
# cannot depend on another row's top_k. A larger one sorts everything.
_MAX_PARTIAL_TOP_K = 512
_MOST_SORTED = 1 << 23  # logits that are sorted at once: each takes about 115 bytes meanwhile


def sample(logits: torch.Tensor, rows: SamplingRows, top_p: torch.Tensor | None = None) -> torch.Tensor:
    """One token per row.

    logits: [rows, vocab] fp32; top_p: [rows] fp64, where decay has changed it. Returns [rows] int64 on the logits'
    device.
    """
    tokens = logits.argmax(dim=-1)
    groups: dict[int, list[int]] = {}  # candidates to look at → rows
    for row in np.flatnonzero(~rows.state.is_greedy[rows.seq_slots]).tolist():
        groups.setdefault(_num_candidates(rows.requests[row].params, logits[row]), []).append(row)
    at_once = max(1, _MOST_SORTED // logits.shape[-1])
    parts = [(n, own[i : i + at_once]) for n, own in groups.items() for i in range(0, len(own), at_once)]
    for num_candidates, own_rows in parts:
        index = torch.tensor(own_rows, device=logits.device)
        own_top_p = top_p[index] if top_p is not None else None
        tokens[index] = _sample_rows(logits[index], rows.part(np.array(own_rows)), num_candidates, own_top_p)
    return tokens


def _num_candidates(params: SamplingParams, logits: torch.Tensor) -> int:
    """How many of a row's likeliest tokens must be sorted: 0 where nothing is cut off. logits: [vocab]."""
    vocab_size = logits.shape[-1]
    partial = min(2 * _MAX_PARTIAL_TOP_K, vocab_size)
    top_p = params.top_p  # the largest that it becomes
    if params.top_p_decay < 1:
        top_p = max(params.top_p, params.top_p_min)
    elif params.top_k == 0 and params.top_p in (0, 1):
        return 0
    if 0 < params.top_k <= _MAX_PARTIAL_TOP_K:
        return partial
    if params.top_k == 0 and logits.device.type == "cpu":  # on a GPU the answer would cost more than the sort
        scaled = logits.double() / params.temperature
        mass = (scaled.topk(partial, sorted=False).values - scaled.logsumexp(dim=-1)).exp().sum()
        if mass > top_p + 1e-9:  # the nucleus ends inside
            return partial
    return vocab_size


def _sample_rows(
    logits: torch.Tensor, rows: SamplingRows, num_candidates: int, decayed_top_p: torch.Tensor | None
) -> torch.Tensor:
    device = logits.device
    slots, positions = rows.on_device
    row_state = row_states(rows.state.seeds[slots], positions)[:, None]
    temperature = rows.column(Parameter.TEMPERATURE)
    if rows.state.has_min_p[rows.seq_slots].any():  # p ≥ min_p · max p, in terms of logits; min_p 0 leaves all
        least = logits.amax(dim=-1, keepdim=True) + temperature * rows.column(Parameter.MIN_P).log()
        logits = logits.masked_fill(logits < least, float("-inf"))
    if num_candidates == 0:
        token_ids = torch.arange(logits.shape[-1], device=device)
        return (logits / temperature + gumbel(row_state, token_ids)).argmax(dim=-1)
    logsumexp = (logits / temperature).logsumexp(dim=-1, keepdim=True)  # [rows, 1] fp64
    logits, token_ids = _descending(logits, num_candidates)
    top_k = rows.column(Parameter.TOP_K, torch.int64)
    is_cut = top_k > 0
    own_top_p = rows.column(Parameter.TOP_P)
    top_p = own_top_p if decayed_top_p is None else decayed_top_p[:, None]
    top_p = top_p.masked_fill(own_top_p == 0, 1.0)
    rank = torch.arange(num_candidates, device=device)
    is_beyond = is_cut & (rank >= top_k)
    scaled = (logits / temperature).masked_fill(is_beyond, float("-inf"))  # [rows, candidates] fp64
    # The nucleus ends with the first candidate whose cumulated mass reaches top_p: of the top k's mass if they are
    # cut to k, of all tokens' if not (the candidates then need not be all).
    logsumexp = torch.where(is_cut, scaled.logsumexp(dim=-1, keepdim=True), logsumexp)
    mass_before = (scaled - logsumexp).exp().cumsum(dim=-1).roll(1, dims=-1)
    scaled = scaled.masked_fill((rank > 0) & (mass_before >= top_p), float("-inf"))
    chosen = (scaled + gumbel(row_state, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.gather(-1, chosen).squeeze(-1)


def _descending(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row and their ids, largest first, equal ones by id."""
    is_partial = count < logits.shape[-1]
    if is_partial:
        largest, token_ids = logits.topk(count, dim=-1, sorted=False)
        num_reaching = (logits >= largest.amin(dim=-1, keepdim=True)).sum(dim=-1)
        is_partial = not bool((num_reaching > count).any())  # topk takes any of those that equal the last one
    if not is_partial:
        values, token_ids = logits.sort(dim=-1, descending=True, stable=True)
        return values[:, :count], token_ids[:, :count]
    token_ids = token_ids.sort(dim=-1).values
    values, order = logits.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(-1, order)
