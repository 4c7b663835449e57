"""Causal attention of a ragged batch over the block cache, request by request, with or without ALiBi."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.cache import Segment


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] fp32: how much each head's score falls with every token of distance.

    2^(-8/p), 2^(-16/p), … for the first p heads, p the largest power of two not above num_heads; the odd powers of
    2^(-4/p) for the others (BLOOM's modeling_bloom.py and FasterTransformer's generate_alibi_slopes: it matters
    where num_heads is no power of two).
    """
    power = 1 << num_heads.bit_length() - 1
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [4 * (2 * i + 1) / power for i in range(num_heads - power)]
    return 2.0 ** -torch.tensor(exponents)


def score_masks(
    segments: list[Segment], slopes: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor | None]:
    """What each segment's scores are masked with, the same in every layer; None: nothing beyond plain causality.

    With ALiBi's slopes [heads_local] fp32, it is slope · (key's position − query's), to be added, -inf for a key that
    follows: [1, heads_local, length, kv_len], as torch's fast attention takes four axes or two. Without, it is
    [length, kv_len] bool for a later piece of a long prompt.
    """
    return [_score_mask(segment, slopes, dtype, device) for segment in segments]


def _score_mask(
    segment: Segment, slopes: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if slopes is None and (segment.length == 1 or segment.start == 0):
        return None
    keys = torch.arange(segment.kv_len, dtype=torch.float32, device=device)
    distances = keys - keys[segment.start :, None]  # [length, kv_len]
    if slopes is None:
        return distances <= 0
    if segment.length > 1:
        distances.masked_fill_(distances > 0, -torch.inf)
    mask = slopes[:, None, None] * distances
    return (mask if device.type == "cpu" else mask.to(dtype))[None]  # a CPU adds fp32 to scores of any dtype


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segments: list[Segment],
    masks: list[torch.Tensor | None],
) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim + mask) · v for each request's new tokens over all of its tokens so far.

    query: [tokens, heads_local, head_dim]; keys, values: this layer's flat cache
    [places, heads_local, head_dim], the new tokens' entries written already; masks: of `score_masks`. Returns
    [tokens, heads_local · head_dim].
    """
    out = torch.empty_like(query)
    for segment, mask in zip(segments, masks, strict=True):
        rows = slice(segment.first_row, segment.first_row + segment.length)
        q = query[rows].transpose(0, 1)[None]  # [1, heads_local, length, head_dim]
        k = keys[segment.places].transpose(0, 1)[None]  # [1, heads_local, kv_len, head_dim]
        v = values[segment.places].transpose(0, 1)[None]
        is_causal = mask is None and segment.length > 1
        out[rows] = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)[0].transpose(0, 1)
    return out.flatten(1)
