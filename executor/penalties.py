"""From a step's logits to those that a token is chosen from: biases, penalties, bans, and top_p after its decay.

Each row depends on its own request only. Formulas: engine.request.SamplingParams.
"""

from __future__ import annotations

import numpy as np
import torch

from executor.sampling_rows import SamplingRows
from kernels.slot_parameters import Parameter


def add_bias(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Add each row's logit_bias. Returns [rows, vocab] fp32, the argument itself where no row has one."""
    index = np.flatnonzero(rows.state.has_bias[rows.seq_slots])
    if not len(index):
        return logits
    biases = [bias for row in index.tolist() if (bias := rows.requests[row].logit_bias) is not None]
    token_ids, values = (torch.cat(parts) for parts in zip(*biases, strict=True))
    row_index = rows.state.tensor(np.repeat(index, [len(own_ids) for own_ids, _ in biases]))
    return logits.index_put((row_index, token_ids), values, accumulate=True)


def penalize(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Apply repetition, presence and frequency penalties.

    logits: [rows, vocab] fp32, not changed. Returns [rows, vocab] fp32, the argument itself where no row has a penalty.
    Presence and frequency penalties come as amounts to subtract before the temperature divides (slots._parameters).
    """
    state = rows.state
    index = np.flatnonzero(state.has_penalty[rows.seq_slots])
    if not len(index):
        return logits
    own = rows.part(index)
    on_device = state.tensor(index)
    history_len = int(own.positions.max())
    place = torch.arange(history_len, device=logits.device)
    slots, positions = own.on_device
    length = positions[:, None]
    history = state.token_ids[slots, :history_len]
    history = torch.where(place < length, history, history[:, :1])  # shorter rows repeat their first token
    is_output = (place >= own.column(Parameter.PROMPT_LEN, torch.int64)) & (place < length)
    values = logits[on_device]
    counts = torch.zeros_like(values).scatter_add_(1, history, is_output.float())
    repetition = own.column(Parameter.REPETITION_PENALTY, torch.float32)
    seen = values.gather(1, history)
    seen = torch.where(seen < 0, seen * repetition, seen / repetition)
    seen -= own.column(Parameter.PRESENCE_PENALTY, torch.float32)
    per_output = counts * own.column(Parameter.FREQUENCY_PENALTY, torch.float32)
    per_output += (counts > 0) * own.column(Parameter.OUTPUT_PRESENCE_PENALTY, torch.float32)
    values = values.scatter(1, history, seen) - per_output
    return logits.index_copy(0, on_device, values)


def ban(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """-inf for banned tokens, and for end tokens before min_length; the argument itself where there are none."""
    index: list[int] = []
    ids: list[int] = []
    always: list[tuple[int, torch.Tensor]] = []
    for i in rows.with_bans():
        request, seq_slot = rows.requests[i], int(rows.seq_slots[i])
        banned = list(rows.banned_ids.get(seq_slot, ()))
        if rows.positions[i] - request.prompt_len < request.params.min_length:
            banned += request.new.end_ids
        index += [i] * len(banned)
        ids += banned
        if request.always_banned is not None:
            always.append((i, request.always_banned))
    if not ids and not always:
        return logits
    logits = logits.clone()
    for i, banned_ids in always:
        logits[i].index_fill_(0, banned_ids, float("-inf"))
    at = tuple(rows.state.tensor([index, ids]))
    return logits.index_put_(at, logits.new_tensor(float("-inf")))


def current_top_p(rows: SamplingRows) -> torch.Tensor:
    """[rows] fp64: each row's top_p after its decay."""
    top_p = rows.column(Parameter.TOP_P)
    if all(request.params.top_p_decay == 1 for request in rows.requests):
        return top_p[:, 0]
    end = int(rows.positions.max())
    slots, positions = rows.on_device
    place = torch.arange(end, device=positions.device)
    history, position = rows.state.token_ids[slots, :end], positions[:, None]
    prompt_len = rows.column(Parameter.PROMPT_LEN, torch.int64)
    is_reset = history == rows.column(Parameter.TOP_P_RESET_ID, torch.int64)
    is_reset &= (place >= prompt_len) & (place < position)
    since = torch.where(is_reset, place + 1, prompt_len).amax(dim=1, keepdim=True)  # the first token that decay counts
    decay = rows.column(Parameter.TOP_P_DECAY)
    decayed = (top_p * decay ** (position - since)).maximum(rows.column(Parameter.TOP_P_MIN))
    return torch.where((position == since) | (decay == 1), top_p, decayed)[:, 0]
