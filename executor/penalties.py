"""From a step's logits to what sampling chooses from: penalties, banned tokens; and log-probabilities.

Each row depends on its own request only. Formulas: engine.request.SamplingParams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.request import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """A row of logits: whose it is, and where in its request the token stands that they choose."""

    slot: int
    params: SamplingParams
    end_id: int | None
    prompt_len: int
    position: int
    banned_ids: Sequence[int] = ()  # now
    always_banned: torch.Tensor | None = None  # [any] int64, in all of the request's steps

    @property
    def num_generated(self) -> int:
        return self.position - self.prompt_len

    @property
    def is_plain(self) -> bool:
        """Whether its likeliest token is chosen as the logits are, and no other token is asked for."""
        params = self.params
        is_changed = params.has_penalty or self.banned_ids or self.always_banned is not None
        return params.is_greedy and not (is_changed or params.num_log_probs or self.num_generated < params.min_length)


def penalize(logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: torch.Tensor) -> torch.Tensor:
    """Apply repetition, presence and frequency penalties.

    logits: [rows, vocab] fp32, left as they are; tokens: [slots, max_seq_len] int64, what each slot has so far.
    Returns [rows, vocab] fp32, the argument itself where no row has a penalty. Additive penalties are multiplied by the
    temperature, so that they count as they are once the sampler has divided by it.
    """
    index = [i for i, row in enumerate(rows) if row.params.has_penalty]
    if not index:
        return logits
    own = [rows[i] for i in index]
    device = logits.device
    history_len = max(row.position for row in own)
    place = torch.arange(history_len, device=logits.device)
    length = column([row.position for row in own], torch.int64, device)
    history = tokens[column([row.slot for row in own], torch.int64, device)[:, 0], :history_len]
    history = torch.where(place < length, history, history[:, :1])  # shorter rows repeat their first token
    is_output = (place >= column([row.prompt_len for row in own], torch.int64, device)) & (place < length)
    values = logits[column(index, torch.int64, device)[:, 0]]
    counts = torch.zeros_like(values).scatter_add_(1, history, is_output.float())
    temperature = [row.params.temperature or 1.0 for row in own]
    presence = [row.params.presence_penalty * t for row, t in zip(own, temperature, strict=True)]
    frequency = [row.params.frequency_penalty * t for row, t in zip(own, temperature, strict=True)]
    repetition = column([row.params.repetition_penalty for row in own], torch.float32, device)
    seen = values.gather(1, history)
    seen = torch.where(seen < 0, seen * repetition, seen / repetition) - column(presence, torch.float32, device)
    values = values.scatter(1, history, seen) - counts * column(frequency, torch.float32, device)
    return logits.index_copy(0, column(index, torch.int64, device)[:, 0], values)


def ban(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """-inf for banned tokens, and for the end token before min_length; the argument itself where there are none."""
    index, ids = [], []
    for i, row in enumerate(rows):
        banned = list(row.banned_ids)
        if row.end_id is not None and row.num_generated < row.params.min_length:
            banned.append(row.end_id)
        index += [i] * len(banned)
        ids += banned
    always = [(i, row.always_banned) for i, row in enumerate(rows) if row.always_banned is not None]
    if not ids and not always:
        return logits
    logits = logits.clone()
    for i, banned_ids in always:
        logits[i].index_fill_(0, banned_ids, float("-inf"))
    places = tuple(torch.tensor(part, dtype=torch.int64).to(logits.device) for part in (index, ids))
    return logits.index_put_(places, logits.new_tensor(float("-inf")))


def current_top_p(rows: Sequence[SamplingRow], tokens: torch.Tensor) -> torch.Tensor:
    """[rows] fp64: each row's top_p after decay. tokens: [slots, max_seq_len], what each slot has so far."""
    params = [row.params for row in rows]
    device = tokens.device
    top_p = column([p.top_p for p in params], torch.float64, device)
    if all(p.top_p_decay == 1 for p in params):
        return top_p[:, 0]
    end = max(row.position for row in rows)
    place = torch.arange(end, device=tokens.device)
    history = tokens[column([row.slot for row in rows], torch.int64, device)[:, 0], :end]
    position = column([row.position for row in rows], torch.int64, device)
    prompt_len = column([row.prompt_len for row in rows], torch.int64, device)
    is_reset = history == column([p.top_p_reset_id for p in params], torch.int64, device)
    is_reset &= (place >= prompt_len) & (place < position)
    since = torch.where(is_reset, place + 1, prompt_len).amax(dim=1, keepdim=True)  # the first token that decay counts
    decayed = top_p * column([p.top_p_decay for p in params], torch.float64, device) ** (position - since)
    decayed = decayed.maximum(column([p.top_p_min for p in params], torch.float64, device))
    is_first_or_fixed = (position == since) | (column([p.top_p_decay for p in params], torch.float64, device) == 1)
    return torch.where(is_first_or_fixed, top_p, decayed)[:, 0]


def column(values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, 1]: one value per row."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)[:, None]
