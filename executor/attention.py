"""Causal attention of a ragged batch over the block cache; positions by ALiBi, by rotation, or none.

Three paths: a kernel for decode rows, flash attention for whole prompts on a GPU, torch's scaled_dot_product_attention
chunk by chunk for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.config import ParallelConfig
from executor.kv_cache import DecodeMetadata, LayerCache, PrefillChunk
from executor.rope import CosSin, rotary_cos_sin, rotary_inv_freq, rotate
from kernels.decode_attention import decode_attention
from weights.model_config import ModelConfig


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] fp32: the amount by which each head's score falls per token of distance.

    2^(-8/p), 2^(-16/p), … for the first p heads, p the largest power of two not above num_heads; the odd powers of
    2^(-4/p) for the others (BLOOM's modeling_bloom.py and FasterTransformer's generate_alibi_slopes).
    """
    power = 1 << num_heads.bit_length() - 1
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [4 * (2 * i + 1) / power for i in range(num_heads - power)]
    return 2.0 ** -torch.tensor(exponents)


def has_flash(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's flash attention supports these heads here: compute capability 8.0 or later, 16-bit dtypes."""
    if device.type != "cuda" or dtype == torch.float32 or torch.version.hip is not None:
        return False
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return head_dim % 8 == 0 and head_dim <= 256


class Prompts(NamedTuple):
    """Whole prompts, one after another, for a single call of torch's flash attention."""

    first_row: int
    cu_seqlens: torch.Tensor  # [prompts + 1] int32: 0, then the number of tokens up to the end of each prompt
    max_seqlen: int


@dataclass(frozen=True)
class AttentionStep:
    """One step's metadata, the same for every layer. Its rows are `decodes`, then `chunks`, then `prompts`.

    masks: one per chunk; None means plain causality. With ALiBi it is [1, heads_local, length, kv_len], slope · (key's
    position − query's), and -inf for later keys; torch's fast attention accepts two axes or four. Without ALiBi it is
    [length, kv_len] bool, for a chunk that continues a prompt.
    """

    kv_locs: torch.Tensor  # [tokens] int64: locations of the tokens' keys and values in the flat cache
    decodes: DecodeMetadata | None  # rows for the decode kernel
    chunks: list[PrefillChunk]
    masks: list[torch.Tensor | None]
    prompts: Prompts | None
    cos_sin: CosSin | None


class Attention:
    """Attention of one rank: holds the model's constants; layers share one object."""

    def __init__(self, config: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """dtype, device: of the computation."""
        self.head_dim = config.size_per_head
        self.is_grouped = config.kv_head_num != config.head_num  # decides the layout of query_key_value
        self.group = config.head_num // parallel.tp // config.kv_heads_local(parallel.tp)  # queries of a KV head, here
        self.slopes = None  # ALiBi's, [heads_local] fp32
        if config.use_attention_linear_bias:
            self.slopes = alibi_slopes(config.head_num).chunk(parallel.tp)[parallel.tp_rank].to(device)
        self.inv_freq = rotary_inv_freq(config).to(device)  # [rotary_embedding / 2]
        self.has_flash = has_flash(self.head_dim, dtype, device)
        self.dtype = dtype
        self.device = device

    def step(
        self,
        positions: torch.Tensor,
        kv_locs: torch.Tensor,
        decodes: DecodeMetadata | None,
        chunks: list[PrefillChunk],
    ) -> AttentionStep:
        """The metadata of one step. positions, kv_locs: [tokens] int64, positions within each token's request."""
        prompts = None
        if self.has_flash and self.slopes is None:
            chunks, prompts = _split_prompts(chunks, self.device)
        masks = [self._score_mask(chunk) for chunk in chunks]
        return AttentionStep(kv_locs, decodes, chunks, masks, prompts, rotary_cos_sin(positions, self.inv_freq))

    def __call__(self, qkv: torch.Tensor, cache: LayerCache, step: AttentionStep) -> torch.Tensor:
        """Store the new tokens' keys and values, then attend.

        qkv: [tokens, width of query_key_value's shard] → [tokens, heads_local · head_dim].
        """
        query, key, value = self.split(qkv)
        if step.cos_sin is not None:
            query, key = rotate(query, step.cos_sin), rotate(key, step.cos_sin)
        cache.write(key, value, step.kv_locs)
        return self.attend(query, key, value, cache, step)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [tokens, heads_local, head_dim], keys and values [tokens, kv_heads_local, head_dim]."""
        if not self.is_grouped:
            query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(1)
            return query, key, value
        grouped = qkv.unflatten(-1, (-1, self.group + 2, self.head_dim))  # [tokens, kv_heads_local, group + 2, …]
        query, key, value = grouped.split([self.group, 1, 1], 2)
        return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        step: AttentionStep,
    ) -> torch.Tensor:
        """softmax(q · kᵀ / √head_dim + mask) · v for each request's new tokens over all of its tokens so far.

        query: [tokens, heads_local, head_dim]; key, value: [tokens, kv_heads_local, head_dim], already in the cache.
        Consecutive heads_local / kv_heads_local query heads share a KV head. Returns
        [tokens, heads_local · head_dim].
        """
        parts = []
        if step.decodes is not None:
            decoding = query[: len(step.decodes.slots)]
            parts.append(decode_attention(decoding, cache.keys, cache.values, step.decodes, self.slopes))
        for chunk, mask in zip(step.chunks, step.masks, strict=True):
            rows = slice(chunk.first_row, chunk.first_row + chunk.length)
            parts.append(_attend_chunk(query[rows], cache.keys[chunk.kv_locs], cache.values[chunk.kv_locs], mask))
        if step.prompts is not None:
            first, cu_seqlens, max_seqlen = step.prompts
            lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            own = (part[first:] for part in (query, key, value))
            parts.append(torch.ops.aten._flash_attention_forward.default(*own, *lengths, 0.0, True, False)[0])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _score_mask(self, chunk: PrefillChunk) -> torch.Tensor | None:
        slopes, device = self.slopes, self.device
        if slopes is None and (chunk.length == 1 or chunk.start == 0):
            return None
        keys = torch.arange(chunk.kv_len, dtype=torch.float32, device=device)
        distances = keys - keys[chunk.start :, None]  # [length, kv_len]
        if slopes is None:
            return distances <= 0
        if chunk.length > 1:
            distances.masked_fill_(distances > 0, -torch.inf)
        mask = slopes[:, None, None] * distances  # [heads_local, length, kv_len]
        return (mask if device.type == "cpu" else mask.to(self.dtype))[None]  # a CPU adds fp32 to scores of any dtype


def _split_prompts(chunks: list[PrefillChunk], device: torch.device) -> tuple[list[PrefillChunk], Prompts | None]:
    """Separate the whole prompts at the end of the list from the chunks before them."""
    count = 0
    while count < len(chunks) and chunks[-count - 1].start == 0:
        count += 1
    if count == 0:
        return chunks, None
    rest, whole = chunks[:-count], chunks[-count:]
    lengths = [chunk.length for chunk in whole]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return rest, Prompts(whole[0].first_row, cu_seqlens, max(lengths))


def _attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[length, heads_local, head_dim] over [kv_len, kv_heads_local, head_dim] → as query"""
    q, k, v = (part.transpose(0, 1)[None] for part in (query, keys, values))  # [1, heads, length or kv_len, head_dim]
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and q.device.type == "cuda":
        # Flash attention supports groups, but neither masks nor fp32, and torch's fallback may hold all scores at once:
        # 37 GiB for 8192 tokens over 16384 with 32 heads.
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        is_grouped = False
    is_causal = mask is None and len(query) > 1
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
