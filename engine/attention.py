"""Causal attention of a ragged batch over the block cache, request by request; positions by ALiBi or by rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.cache import Segment
from engine.config import ModelConfig

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [tokens, 1, rotary_embedding / 2] fp32


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


def rotation_frequencies(config: ModelConfig) -> torch.Tensor:
    """[rotary_embedding / 2] fp32: radians per position, rotary_base^(-2i / rotary_embedding), from Su et al. 2021."""
    size = config.rotary_embedding
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / max(size, 1)
    return config.rotary_base**-exponents / config.rotary_interpolation_factor


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn each pair (i, i + rotary_embedding / 2) of the heads' first elements; x: [tokens, heads, head_dim].

    These are the pairs of GPT-NeoX, Megatron and Hugging Face (GPT-J's are neighbours).
    """
    cosines, sines = rotation
    half = cosines.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1).to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


@dataclass(frozen=True)
class AttentionStep:
    """What attention needs of one step, the same in every layer.

    masks: what each segment's scores are masked with; None: nothing beyond plain causality. With ALiBi's slopes
    [heads_local] fp32 it is slope · (key's position − query's), to be added, -inf for a key that follows:
    [1, heads_local, length, kv_len], as torch's fast attention takes four axes or two. Without, it is
    [length, kv_len] bool for a later piece of a long prompt.
    """

    places: torch.Tensor  # [tokens] int64, where the tokens' keys and values go in the flat cache
    segments: list[Segment]
    masks: list[torch.Tensor | None]
    rotation: Rotation | None

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,
        places: torch.Tensor,
        segments: list[Segment],
        slopes: torch.Tensor | None,
        frequencies: torch.Tensor,
        dtype: torch.dtype,
    ) -> AttentionStep:
        """positions: [tokens] int64, each token's in its own request; frequencies: of `rotation_frequencies`."""
        masks = [_score_mask(segment, slopes, dtype, positions.device) for segment in segments]
        rotation = None
        if len(frequencies):
            angles = positions[:, None, None] * frequencies
            rotation = angles.cos(), angles.sin()
        return cls(places, segments, masks, rotation)


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


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: AttentionStep) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim + mask) · v for each request's new tokens over all of its tokens so far.

    query: [tokens, heads_local, head_dim]; keys, values: this layer's flat cache [places, kv_heads_local, head_dim],
    the new tokens' entries written already; each of its heads serves the queries of heads_local / kv_heads_local
    heads that follow one another. Returns [tokens, heads_local · head_dim].
    """
    out = torch.empty_like(query)
    is_grouped = query.shape[1] != keys.shape[1]
    for segment, mask in zip(step.segments, step.masks, strict=True):
        rows = slice(segment.first_row, segment.first_row + segment.length)
        q = query[rows].transpose(0, 1)[None]  # [1, heads_local, length, head_dim]
        k = keys[segment.places].transpose(0, 1)[None]  # [1, kv_heads_local, kv_len, head_dim]
        v = values[segment.places].transpose(0, 1)[None]
        is_causal = mask is None and segment.length > 1
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped)
        out[rows] = attended[0].transpose(0, 1)
    return out.flatten(1)
