"""Causal attention of a ragged batch over the block cache; positions by ALiBi, by rotation, or none.

On a GPU two kernels: one for decode rows, one for pieces of prompts. On a CPU torch's sparse operators for decode rows,
and its scaled_dot_product_attention, chunk by chunk, for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.config import ParallelConfig
from executor.kv_cache import PrefillChunk
from executor.rope import rotary_cos_sin, rotary_inv_freq
from kernels.decode_attention import DecodeMetadata, decode_attention
from kernels.heads import CosSin, HeadLayout, rotated_heads
from kernels.layer_cache import LayerCache
from kernels.prompt_attention import PromptMetadata, prompt_attention
from kernels.ragged_attention import RaggedRows, ragged_attention, ragged_rows
from kernels.store_kv import store_kv
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


@dataclass(frozen=True)
class AttentionStep:
    """One step's metadata, the same for every layer.

    Its rows are `decodes`, then `prompts`; without kernels `ragged`, then `chunks`. `ragged` and `masks` are there for
    each of the layers' windows, 0 for none.

    masks: one per chunk; None means plain causality. With ALiBi it is [1, heads_local, length, seen], slope · (key's
    position − query's), and -inf for keys that the query does not see; torch's fast attention accepts two axes or four.
    Without ALiBi it is [length, seen] bool, for a chunk that continues a prompt, or is longer than the window. seen:
    keys from the first one on that the chunk's first query sees.
    """

    kv_locs: torch.Tensor | None  # [tokens after `decodes`] int64: locations of their keys and values
    decodes: DecodeMetadata | None  # rows for the decode kernel
    prompts: PromptMetadata | None  # rows for the prompt kernel
    ragged: Mapping[int, RaggedRows] | None
    chunks: Sequence[PrefillChunk]
    masks: Mapping[int, list[torch.Tensor | None]]
    cos_sin: CosSin | None


class Attention:
    """Attention of one rank: holds the model's constants; layers share one object."""

    def __init__(self, config: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """dtype, device: of the computation."""
        heads, kv_heads = config.head_num // parallel.tp, config.kv_heads_local(parallel.tp)
        self.layout = HeadLayout(heads, kv_heads, config.size_per_head, config.kv_head_num != config.head_num)
        self.windows = sorted({config.window(layer) for layer in range(config.num_layer)})
        self.slopes = None  # ALiBi's, [heads_local] fp32
        if config.use_attention_linear_bias:
            self.slopes = alibi_slopes(config.head_num).chunk(parallel.tp)[parallel.tp_rank].to(device)
        self.inv_freq = rotary_inv_freq(config).to(device)  # [rotary_embedding / 2]
        self.rotary_factor = config.rotary_attention_factor
        self.dtype = dtype
        self.device = device

    def step(
        self,
        positions: torch.Tensor,
        kv_locs: torch.Tensor | None,
        decodes: DecodeMetadata | None,
        prompts: PromptMetadata | None,
        ragged: Mapping[int, RaggedRows] | None,
        chunks: Sequence[PrefillChunk],
    ) -> AttentionStep:
        """The metadata of one step. positions: [tokens] int64, within each request; the others as StepInput has."""
        masks = {window: [self._score_mask(chunk, window) for chunk in chunks] for window in self.windows}
        cos_sin = rotary_cos_sin(positions, self.inv_freq, self.rotary_factor)
        return AttentionStep(kv_locs, decodes, prompts, ragged, chunks, masks, cos_sin)

    def ragged_rows(
        self, table: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, num_locs: int
    ) -> dict[int, RaggedRows]:
        """Decode rows of one step, for a CPU, by window; arguments as kernels.ragged_attention takes them."""
        return {
            window: ragged_rows(table, slots, positions, self.layout, num_locs, self.slopes, window)
            for window in self.windows
        }

    def __call__(self, qkv: torch.Tensor, cache: LayerCache, step: AttentionStep, window: int = 0) -> torch.Tensor:
        """Store the new tokens' keys and values, then attend. window: the layer's.

        qkv: [tokens, width of query_key_value's shard] → [tokens, heads_local · head_dim].
        """
        layout, slopes = self.layout, self.slopes
        num_decodes, parts = 0, []
        if step.decodes is not None:
            num_decodes = len(step.decodes.slots)
            own = _rows(step.cos_sin, slice(num_decodes))
            parts.append(decode_attention(qkv[:num_decodes], layout, cache, step.decodes, slopes, own, window))
        if step.kv_locs is not None:
            rest = qkv[num_decodes:]
            own = _rows(step.cos_sin, slice(num_decodes, None))
            if step.prompts is not None:
                store_kv(rest, layout, cache, step.kv_locs, own)
                parts.append(prompt_attention(rest, layout, cache, step.prompts, slopes, own, window))
            else:
                query, key, value = rotated_heads(rest, layout, own)
                cache.write(key, value, step.kv_locs)
                parts += self._attend_in_torch(query, cache, step, window)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_in_torch(
        self, query: torch.Tensor, cache: LayerCache, step: AttentionStep, window: int
    ) -> list[torch.Tensor]:
        """softmax(q · kᵀ / √head_dim + mask) · v for each row over its request's tokens so far, or the window's.

        query: [tokens, heads_local, head_dim]. Consecutive heads_local / kv_heads_local query heads share a KV head.
        Returns parts of [tokens, heads_local · head_dim].
        """
        parts = []
        if step.ragged is not None:
            ragged = step.ragged[window]
            parts.append(ragged_attention(query[: ragged.num_rows], cache.keys, cache.values, ragged))
        for chunk, mask in zip(step.chunks, step.masks[window], strict=True):
            rows = slice(chunk.first_row, chunk.first_row + chunk.length)
            parts.append(_attend_chunk(query[rows], *cache.read(chunk.seen_locs(window), query.dtype), mask))
        return [part.flatten(1) for part in parts]

    def _score_mask(self, chunk: PrefillChunk, window: int) -> torch.Tensor | None:
        slopes, device = self.slopes, self.device
        first = chunk.first_seen(window)
        reaches = not window or chunk.kv_len - first <= window  # whether the last query sees the first key
        if slopes is None and (chunk.length == 1 or chunk.start == 0 and reaches):
            return None
        keys = torch.arange(first, chunk.kv_len, dtype=torch.float32, device=device)
        distances = keys - keys[chunk.start - first :, None]  # [length, seen]
        is_hidden = distances > 0 if reaches else (distances > 0) | (distances <= -window)
        if slopes is None:
            return ~is_hidden
        if chunk.length > 1:
            distances.masked_fill_(is_hidden, -torch.inf)
        mask = slopes[:, None, None] * distances  # [heads_local, length, seen]
        return (mask if device.type == "cpu" else mask.to(self.dtype))[None]  # a CPU adds fp32 to scores of any dtype


def _rows(cos_sin: CosSin | None, index: slice) -> CosSin | None:
    return None if cos_sin is None else (cos_sin[0][index], cos_sin[1][index])


def _attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """[length, heads_local, head_dim] over [seen, kv_heads_local, head_dim] → as query"""
    q, k, v = (part.transpose(0, 1)[None] for part in (query, keys, values))  # [1, heads, length or seen, head_dim]
    is_grouped = q.shape[1] != k.shape[1]
    if is_grouped and q.device.type == "cuda":
        # Flash attention supports groups, but neither masks nor fp32, and torch's fallback may hold all scores at once:
        # 37 GiB for 8192 tokens over 16384 with 32 heads.
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        is_grouped = False
    is_causal = mask is None and len(query) > 1
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
