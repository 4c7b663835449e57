"""Causal attention of pieces of prompts over all of their sequences' tokens, at any locations of the cache.

One launch for all pieces of a step: first pieces, later pieces, and pieces of one token, which are decode rows.
Stateless: `PromptMetadata.tiles` says which rows belong to which slot; table[slot] holds the slot's KV locations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from kernels import dependent_launch, runs_on
from kernels.heads import CosSin, HeadLayout, rotated_heads
from kernels.layer_cache import LayerCache

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import query_for_fp8
    from kernels.heads import load_rotated
except ImportError:  # a CPU-only torch comes without it
    triton = None

TILE_ROWS = 64  # queries of a program
_BLOCK_KEYS = 64  # keys that a program reads at once; fewer of wide heads or in fp32, so that they fit


class PromptMetadata(NamedTuple):
    """The rows of a step's pieces, the same for every layer. Contiguous, and written before the step."""

    table: torch.Tensor  # [slots, max_seq_len] int32: each slot's KV locations
    tiles: torch.Tensor  # [tiles, 4] int64 of `make_tiles`


def make_tiles(pieces: Iterable[tuple[int, int, int]], count: int | None = None) -> np.ndarray:
    """[count, 4] int64: per tile its first row, number of rows, slot, and first row's position.

    pieces: (slot, first token's position, length) in the order of the rows. count: with padding, tiles of no rows;
    None: as many as the pieces have. Raises ValueError where they have more.
    """
    tiles: list[tuple[int, int, int, int]] = []
    row = 0
    for slot, start, length in pieces:
        for first in range(0, length, TILE_ROWS):
            tiles.append((row + first, min(TILE_ROWS, length - first), slot, start + first))
        row += length
    if count is not None:
        if len(tiles) > count:
            raise ValueError(f"the pieces have {len(tiles)} tiles; at most {count} fit")
        tiles += [(0, 0, 0, 0)] * (count - len(tiles))
    return np.array(tiles, dtype=np.int64).reshape(-1, 4)


def reference(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    prompts: PromptMetadata,
    slopes: torch.Tensor | None = None,
    cos_sin: CosSin | None = None,
    window: int = 0,
) -> torch.Tensor:
    """The same in plain torch, on any device, tile by tile, in fp32."""
    query = rotated_heads(qkv, layout, cos_sin)[0]
    out = torch.zeros_like(query)
    for row, count, slot, position in prompts.tiles.tolist():
        kv_locs = prompts.table[slot, : position + count].long()
        kept = cache.read(kv_locs, torch.float32)
        k, v = (part.float().repeat_interleave(layout.group, 1) for part in kept)  # [kv_len, heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", query[row : row + count].float(), k) * layout.head_dim**-0.5
        places = torch.arange(position + count, device=qkv.device)
        distances = places - places[position:, None]  # [count, kv_len]
        if slopes is not None:
            scores += slopes[:, None, None] * distances
        scores = scores.masked_fill(distances > 0, float("-inf"))
        if window:
            scores = scores.masked_fill(distances <= -window, float("-inf"))
        out[row : row + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out.flatten(1)


def prompt_attention(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    prompts: PromptMetadata,
    slopes: torch.Tensor | None = None,
    cos_sin: CosSin | None = None,
    window: int = 0,
) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim + slope · (key's position − query's)) · v over keys up to the query's own.

    qkv: [rows, width] contiguous rows, not yet rotated, in `layout`; cache: contiguous, the rows' own keys and values
    already there; slopes: [heads] fp32; cos_sin: of the rows' positions; window: tokens that a row sees, itself
    included, 0 for all.
    Returns [rows, heads · head_dim] as qkv; rows of no tile are undefined. Sums are in fp32; their order depends on
    the tile only.
    """
    if not runs_on(qkv.device):
        return reference(qkv, layout, cache, prompts, slopes, cos_sin, window)
    table, tiles = prompts
    keys, values, key_scales, value_scales = cache
    heads, head_dim = layout.heads, layout.head_dim
    dims = max(16, triton.next_power_of_2(head_dim))
    is_wide, is_wide_head = qkv.dtype == torch.float32, dims > 128
    out = torch.empty(len(qkv), heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    cosines, sines = (out, out) if cos_sin is None else cos_sin
    places = layout.places()
    _prompt_attention[(len(tiles), heads)](
        qkv,
        cosines,
        sines,
        keys,
        values,
        out if key_scales is None else key_scales,
        out if value_scales is None else value_scales,
        table,
        tiles,
        out if slopes is None else slopes,
        out,
        qkv.stride(0),
        table.stride(0),
        keys.stride(0),
        head_dim**-0.5 * 1.4426950408889634,  # the kernel's exponentials are powers of two
        group_stride=places["group_stride"],
        group=layout.group,
        rotated_half=0 if cos_sin is None else cosines.shape[-1],
        has_slopes=slopes is not None,
        is_fp8=key_scales is not None,
        window=window,
        precision="ieee" if is_wide else "tf32",
        head_dim=head_dim,
        dims=dims,
        block_m=TILE_ROWS,
        # A tile's queries and the blocks on their way fit into 99 KiB of shared memory: many a GPU has no more.
        block_n=_BLOCK_KEYS >> (is_wide + is_wide_head),
        num_warps=8 if is_wide else 4,
        num_stages=3 - is_wide - (is_wide and is_wide_head),
        **dependent_launch.options(qkv.device),
    )
    return out


if triton is not None:

    @triton.jit
    def _weights(
        q,
        k,
        distances,
        slope,
        scale,
        largest,
        weight_sum,
        has_slopes: tl.constexpr,
        window: tl.constexpr,
        precision: tl.constexpr,
    ):
        """A block of keys' weights, the running maximum and sum with them, and by how much earlier sums shrink."""
        scores = tl.dot(q, k, input_precision=precision) * scale
        if has_slopes:
            scores += slope * distances.to(tl.float32)
        is_seen = distances <= 0
        if window:
            is_seen &= distances > -window
        scores = tl.where(is_seen, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        return weights, new_largest, weight_sum * shrink + tl.sum(weights, 1), shrink

    @triton.jit
    def _prompt_attention(
        qkv,
        cosines,  # [rows, rotated_half] fp32
        sines,
        keys,
        values,
        key_scales,  # [kv_heads] fp32, of fp8
        value_scales,
        table,
        tiles,
        slopes,
        out,
        row_stride,
        table_stride,
        place_stride,
        scale,
        group_stride: tl.constexpr,
        group: tl.constexpr,
        rotated_half: tl.constexpr,
        has_slopes: tl.constexpr,
        is_fp8: tl.constexpr,
        window: tl.constexpr,
        precision: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        block_m: tl.constexpr,
        block_n: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One head of one tile."""
        head = tl.program_id(1)
        tile = tiles + tl.program_id(0) * 4
        d = tl.arange(0, dims)
        is_dim = d < head_dim
        if pdl:
            start_dependents()
        first_row, count = tl.load(tile), tl.load(tile + 1).to(tl.int32)
        slot, first = tl.load(tile + 2), tl.load(tile + 3).to(tl.int32)
        slope = 0.0
        if has_slopes:
            slope = tl.load(slopes + head) * 1.4426950408889634
        value_scale = 1.0
        if is_fp8:  # keys and values are multiplied as stored
            scale *= tl.load(key_scales + head // group)
            value_scale = tl.load(value_scales + head // group)
        if pdl:
            wait_for_predecessors()
        if count > 0:
            m = tl.arange(0, block_m)
            is_row = m < count
            ms = first_row + m
            query = qkv + ((head // group) * group_stride + head % group) * head_dim
            is_q = is_row[:, None] & is_dim[None, :]
            angles = ms[:, None] * rotated_half
            q = load_rotated(
                query + ms[:, None] * row_stride, cosines + angles, sines + angles, d[None, :], is_q, rotated_half
            )
            score_scale = scale
            if is_fp8:
                q, score_scale = query_for_fp8(q, scale)
            places_of = table + slot * table_stride
            head_offset = (head // group) * head_dim + d
            # A row may see nothing of the first blocks: -inf would give nan there.
            largest = tl.full((block_m,), -1e30 if window else -float("inf"), tl.float32)
            weight_sum = tl.zeros((block_m,), tl.float32)
            sums = tl.zeros((block_m, dims), tl.float32)
            end = first + count
            begin = 0
            if window:
                begin = tl.maximum(first + 1 - window, 0) // block_n * block_n
            for start in range(begin, end, block_n):
                t = start + tl.arange(0, block_n)
                place = tl.load(places_of + t, mask=t < end, other=0).to(tl.int64) * place_stride
                is_k = is_dim[:, None] & (t < end)[None, :]
                k = tl.load(keys + place[None, :] + head_offset[:, None], mask=is_k, other=0.0)
                if is_fp8:
                    k = k.to(q.dtype)
                distances = t[None, :] - (first + m)[:, None]
                weights, largest, weight_sum, shrink = _weights(
                    q, k, distances, slope, score_scale, largest, weight_sum, has_slopes, window, precision
                )
                is_v = (t < end)[:, None] & is_dim[None, :]
                v = tl.load(values + place[:, None] + head_offset[None, :], mask=is_v, other=0.0)
                if is_fp8:
                    v = v.to(q.dtype)
                sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=precision)
            places = out + ms[:, None] * (tl.num_programs(1) * head_dim) + head * head_dim + d[None, :]
            result = sums / weight_sum[:, None]
            if is_fp8:
                result *= value_scale
            tl.store(places, result.to(out.dtype.element_ty), mask=is_q)
