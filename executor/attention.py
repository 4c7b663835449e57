"""Causal attention of a ragged batch over the block cache, request by request; positions by ALiBi or by cos_sin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from executor.kv_cache import DecodeMetadata, PrefillChunk
from kernels.decode_attention import decode_attention
from weights.model_config import ModelConfig

CosSin = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [tokens, 1, rotary_embedding / 2] fp32


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


def rotary_inv_freq(config: ModelConfig) -> torch.Tensor:
    """[rotary_embedding / 2] fp32: radians per position, rotary_base^(-2i / rotary_embedding), from Su et al. 2021."""
    size = config.rotary_embedding
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / max(size, 1)
    return config.rotary_base**-exponents / config.rotary_interpolation_factor


def rotate(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Turn each pair (i, i + rotary_embedding / 2) of the heads' first elements; x: [tokens, heads, head_dim].

    These are the pairs of GPT-NeoX, Megatron and Hugging Face (GPT-J's are neighbours).
    """
    cosines, sines = cos_sin
    half = cosines.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1).to(x.dtype)


def has_flash(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's flash attention takes such heads on this device: from compute capability 8.0 on, in 16 bits."""
    if device.type != "cuda" or dtype == torch.float32 or torch.version.hip is not None:
        return False
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return head_dim % 8 == 0 and head_dim <= 256


class Prompts(NamedTuple):
    """Whole prompts, one after another, that torch's flash attention takes all at once."""

    first_row: int
    cu_seqlens: torch.Tensor  # [prompts + 1] int32: 0, then how many tokens there are up to each one's end
    longest: int


@dataclass(frozen=True)
class AttentionStep:
    """What attention needs of one step, the same in every layer: its rows are `decodes`, `chunks`, `prompts`.

    masks: what each chunk's scores are masked with; None: nothing beyond plain causality. With ALiBi's slopes
    [heads_local] fp32 it is slope · (key's position − query's), to be added, -inf for a key that follows:
    [1, heads_local, length, kv_len], as torch's fast attention takes four axes or two. Without, it is
    [length, kv_len] bool for a later piece of a long prompt.
    """

    kv_locs: torch.Tensor  # [tokens] int64, where the tokens' keys and values go in the flat cache
    decodes: DecodeMetadata | None  # where a kernel takes them
    chunks: list[PrefillChunk]
    masks: list[torch.Tensor | None]
    prompts: Prompts | None
    cos_sin: CosSin | None
    slopes: torch.Tensor | None

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,
        kv_locs: torch.Tensor,
        decodes: DecodeMetadata | None,
        chunks: list[PrefillChunk],
        slopes: torch.Tensor | None,
        inv_freq: torch.Tensor,
        dtype: torch.dtype,
        has_flash: bool = False,
    ) -> AttentionStep:
        """positions: [tokens] int64, each token's in its own request; inv_freq: of `rotary_inv_freq`;
        has_flash: of the function of this name."""
        prompts = None
        if has_flash and slopes is None:
            chunks, prompts = _split_prompts(chunks, positions.device)
        masks = [_score_mask(chunk, slopes, dtype, positions.device) for chunk in chunks]
        cos_sin = None
        if len(inv_freq):
            angles = positions[:, None, None] * inv_freq
            cos_sin = angles.cos(), angles.sin()
        return cls(kv_locs, decodes, chunks, masks, prompts, cos_sin, slopes)


def _split_prompts(chunks: list[PrefillChunk], device: torch.device) -> tuple[list[PrefillChunk], Prompts | None]:
    """The chunks before the last ones that are whole prompts, and those."""
    count = 0
    while count < len(chunks) and chunks[-count - 1].start == 0:
        count += 1
    if count == 0:
        return chunks, None
    rest, whole = chunks[:-count], chunks[-count:]
    lengths = [chunk.length for chunk in whole]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return rest, Prompts(whole[0].first_row, cu_seqlens, max(lengths))


def _score_mask(
    chunk: PrefillChunk, slopes: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if slopes is None and (chunk.length == 1 or chunk.start == 0):
        return None
    keys = torch.arange(chunk.kv_len, dtype=torch.float32, device=device)
    distances = keys - keys[chunk.start :, None]  # [length, kv_len]
    if slopes is None:
        return distances <= 0
    if chunk.length > 1:
        distances.masked_fill_(distances > 0, -torch.inf)
    mask = slopes[:, None, None] * distances
    return (mask if device.type == "cpu" else mask.to(dtype))[None]  # a CPU adds fp32 to scores of any dtype


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: AttentionStep,
) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim + mask) · v for each request's new tokens over all of its tokens so far.

    query: [tokens, heads_local, head_dim]; key, value: [tokens, kv_heads_local, head_dim]; keys, values: this layer's
    flat cache [kv_locs, kv_heads_local, head_dim], the new tokens' entries written already. Each head of keys serves
    the queries of heads_local / kv_heads_local heads that follow one another. Returns [tokens, heads_local · head_dim].
    """
    parts = []
    if step.decodes is not None:
        parts.append(decode_attention(query[: len(step.decodes.slots)], keys, values, *step.decodes, step.slopes))
    for chunk, mask in zip(step.chunks, step.masks, strict=True):
        rows = slice(chunk.first_row, chunk.first_row + chunk.length)
        parts.append(_attend_chunk(query[rows], keys[chunk.kv_locs], values[chunk.kv_locs], mask))
    if step.prompts is not None:
        first, cu_seqlens, longest = step.prompts
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        own = (part[first:] for part in (query, key, value))
        parts.append(torch.ops.aten._flash_attention_forward.default(*own, *lengths, 0.0, True, False)[0])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[length, heads_local, head_dim] over [kv_len, kv_heads_local, head_dim] → as query"""
    q, k, v = (part.transpose(0, 1)[None] for part in (query, keys, values))  # [1, heads, length or kv_len, head_dim]
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and q.device.type == "cuda":
        # Flash attention takes groups, but neither masks nor fp32, and what torch falls back to may hold all scores at
        # once: 37 GiB for 8192 tokens over 16384 with 32 heads.
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        is_grouped = False
    is_causal = mask is None and len(query) > 1
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
