"""Causal attention of a ragged batch over the block cache, request by request."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.cache import Segment


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim) · v for each request's new tokens over all of its tokens so far.

    query: [tokens, heads_local, head_dim]; keys, values: this layer's flat cache
    [places, heads_local, head_dim], the new tokens' entries written already. Returns
    [tokens, heads_local · head_dim].
    """
    out = torch.empty_like(query)
    for segment in segments:
        rows = slice(segment.first_row, segment.first_row + segment.length)
        q = query[rows].transpose(0, 1)[None]  # [1, heads_local, length, head_dim]
        k = keys[segment.places].transpose(0, 1)[None]  # [1, heads_local, kv_len, head_dim]
        v = values[segment.places].transpose(0, 1)[None]
        mask = None
        if segment.length > 1 and segment.start > 0:  # a later piece of a long prompt
            mask = torch.ones(segment.length, segment.kv_len, dtype=torch.bool, device=q.device)
            mask = mask.tril(diagonal=segment.start)
        is_causal = segment.length > 1 and segment.start == 0
        out[rows] = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)[0].transpose(0, 1)
    return out.flatten(1)
