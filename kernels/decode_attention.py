"""Attention of new tokens over all tokens of their sequences; the new keys and values are stored on the way.

Stateless: a row is (slot, position); table[slot] holds the KV locations of the slot's tokens. A slot has one row, or,
in a step with drafts, several rows that see each other's tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kernels import dependent_launch, runs_on
from kernels.draft_attention import draft_launch
from kernels.fp8_decode_attention import fp8_fits, fp8_launch
from kernels.grouped_decode_attention import grouped_launch
from kernels.heads import CosSin, HeadLayout, rotated_heads
from kernels.layer_cache import LayerCache
from kernels.store_kv import store_kv

try:
    import triton
    import triton.language as tl

    from kernels.attention_parts import combine_splits, tokens_of_split
    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import cast_fp8
    from kernels.heads import load_rotated
except ImportError:  # a CPU-only torch comes without it
    triton = None

# Measured on an H100 and an H200 at 1 to 256 rows, 16 to 48 heads, 200 to 2000 tokens: programs of one warp, and many
# of them; of small blocks where each reads all tokens of its sequence. More programs for many rows, which differ in
# length. The heads of a row start one after another: a token's heads lie side by side in memory. With the rows in the
# order of length, the longest first, that is 4.3 to 4.4 TB/s for the contexts of a mix of requests; 3.1 to 3.6 with
# the rows of a head one after another (H200, 160 to 235 rows).
_WANTED_PROGRAMS = 2048
_WANTED_PROGRAMS_OF_MANY = 5120
_FEW_ROWS = 32
_MOST_SPLITS = 16
_BLOCK_ELEMENTS = 2048  # of keys that a program reads at once; half of it without splits


class DecodeMetadata(NamedTuple):
    """Rows of one new token each, the same for every layer. All tensors are contiguous, and written before the step.

    kv_locs: table[slots, positions]. It is needed where a slot has several rows, one after another: then the new keys
    and values of all rows are stored first, with a launch of its own.
    """

    table: torch.Tensor  # [slots, max_seq_len] int32: each slot's KV locations
    slots: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64, of the new tokens
    workspace: torch.Tensor  # of `make_workspace` for as many rows and heads
    kv_locs: torch.Tensor | None = None  # [rows] int64; None: each row has a slot of its own


def make_workspace(num_rows: int, num_heads: int, device: torch.device) -> torch.Tensor:
    """The split-k workspace of `decode_attention`: a count of finished splits per row and head, int32.

    It is zeros before a call, and the call leaves it zeros.
    """
    return torch.zeros(num_rows * num_heads, dtype=torch.int32, device=device)


def reference(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    decodes: DecodeMetadata,
    slopes: torch.Tensor | None = None,
    cos_sin: CosSin | None = None,
    window: int = 0,
) -> torch.Tensor:
    """The same in plain torch, on any device, row by row, in fp32. It needs no workspace."""
    query, key, value = rotated_heads(qkv, layout, cos_sin)
    slots, positions = decodes.slots, decodes.positions
    kv_locs = decodes.table[slots, positions].long()
    cache.write(key, value, kv_locs)
    out = torch.empty_like(query)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        first = max(0, position + 1 - window) if window else 0
        kv_locs = decodes.table[slot, first : position + 1].long()
        kept = cache.read(kv_locs, torch.float32)
        k, v = (part.float().repeat_interleave(layout.group, 1) for part in kept)  # [seen, heads, head_dim]
        scores = torch.einsum("hd,khd->hk", query[row].float(), k) * layout.head_dim**-0.5
        if slopes is not None:
            scores += slopes[:, None] * (torch.arange(first, position + 1, device=query.device) - position)
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
    return out.flatten(1)


def decode_attention(
    qkv: torch.Tensor,
    layout: HeadLayout,
    cache: LayerCache,
    decodes: DecodeMetadata,
    slopes: torch.Tensor | None = None,
    cos_sin: CosSin | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Store each row's key and value, then softmax(q · kᵀ / √head_dim + slope · (key's position − query's)) · v.

    qkv: [rows, width] contiguous, not yet rotated, in `layout`; cache: contiguous; slopes: [heads] fp32; cos_sin: of
    the rows' positions; window: tokens that a row sees, itself included, 0 for all. Returns [rows, heads · head_dim] as
    qkv. Sums are in fp32; their order depends on rows, heads and positions only. With an fp8 cache the new token, too,
    counts as it is stored.
    """
    if not runs_on(qkv.device):
        return reference(qkv, layout, cache, decodes, slopes, cos_sin, window)
    rows, head_dim, is_stored = len(qkv), layout.head_dim, decodes.kv_locs is not None
    if decodes.kv_locs is not None:
        store_kv(qkv, layout, cache, decodes.kv_locs, cos_sin)
    is_grouped = layout.group > 1 and qkv.dtype != torch.float32
    if is_grouped:
        kernel, programs, constants = grouped_launch(layout, is_stored)
    elif is_stored and layout.group == 1:
        kernel, programs, constants = draft_launch(layout, rows, qkv.dtype)
    else:  # a program per query head
        programs = _WANTED_PROGRAMS if rows <= _FEW_ROWS else _WANTED_PROGRAMS_OF_MANY
        is_byte = fp8_fits(layout, cache.keys.dtype, qkv.dtype)
        kernel, constants = fp8_launch(layout) if is_byte else _launch(layout, is_stored)
    heads = layout.kv_heads if is_grouped else layout.heads  # each is a program, or several with splits
    wanted = max(1, min(_MOST_SPLITS, programs // (rows * heads)))
    splits = 1 << wanted.bit_length() - 1  # a power of two: few variants of the kernel
    constants.setdefault("block", max(16, (_BLOCK_ELEMENTS >> (splits == 1)) // constants["dims"]))
    keys, values, key_scales, value_scales = cache
    out = torch.empty(rows, layout.heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    partials = out
    if splits > 1:
        partials = torch.empty(rows * layout.heads, splits, head_dim + 2, dtype=torch.float32, device=qkv.device)
    cosines, sines = (out, out) if cos_sin is None else cos_sin
    kernel[(heads, rows, splits)](
        qkv,
        cosines,
        sines,
        keys,
        values,
        out if key_scales is None else key_scales,
        out if value_scales is None else value_scales,
        decodes.table,
        decodes.slots,
        decodes.positions,
        out if slopes is None else slopes,
        out,
        partials,
        decodes.workspace,
        qkv.stride(0),
        decodes.table.stride(0),
        keys.stride(0),
        head_dim**-0.5 * 1.4426950408889634,  # the kernels' exponentials are powers of two
        **layout.places(),
        group=layout.group,
        rotated_half=0 if cos_sin is None else cosines.shape[-1],
        has_slopes=slopes is not None,
        is_fp8=key_scales is not None,
        window=window,
        num_splits=splits,
        head_dim=head_dim,
        num_stages=2,
        **constants,
        **dependent_launch.options(qkv.device),
    )
    return out


def _launch(layout: HeadLayout, is_stored: bool) -> tuple[Any, dict[str, Any]]:
    """As `fp8_launch`."""
    return _decode_attention, dict(is_stored=is_stored, dims=triton.next_power_of_2(layout.head_dim), num_warps=1)


if triton is not None:

    @triton.jit
    def _load_block(places_of, t, end, keys, values, place_stride, head_offset, is_dim):
        """Keys and values [block, dims] of the tokens t, zeros from `end` on."""
        is_token = t < end
        place = tl.load(places_of + t, mask=is_token, other=0).to(tl.int64)
        offset = place[:, None] * place_stride + head_offset[None, :]
        is_element = is_token[:, None] & is_dim[None, :]
        k = tl.load(keys + offset, mask=is_element, other=0.0)
        v = tl.load(values + offset, mask=is_element, other=0.0)
        return k, v

    @triton.jit
    def _add_block(q, k, v, t, end, position, slope, largest, weight_sum, sums, has_slopes: tl.constexpr):
        """The running maximum, sum of weights and weighted values, with a block of keys and values added."""
        scores = tl.sum(q[None, :] * k.to(tl.float32), 1)
        if has_slopes:
            scores += slope * (t - position).to(tl.float32)
        scores = tl.where(t < end, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - new_largest)
        shrink = tl.exp2(largest - new_largest)
        weight_sum = weight_sum * shrink + tl.sum(weights, 0)
        sums = sums * shrink + tl.sum(weights[:, None] * v.to(tl.float32), 0)
        return new_largest, weight_sum, sums

    @triton.jit
    def _as_stored(k, v, key_scale, value_scale, is_fp8: tl.constexpr):
        """A key and a value in the cache's dtype."""
        if is_fp8:
            k, v = cast_fp8(k, key_scale), cast_fp8(v, value_scale)
        return k, v

    @triton.jit
    def _decode_attention(
        qkv,
        cosines,  # [rows, rotated_half] fp32
        sines,
        keys,
        values,
        key_scales,  # [kv_heads] fp32, of fp8
        value_scales,
        table,
        slots,
        positions,
        slopes,
        out,
        partials,  # [rows · heads, splits, head_dim + 2] fp32: the weighted values, the largest score, the weights' sum
        workspace,
        row_stride,
        table_stride,
        place_stride,
        scale,
        group_stride: tl.constexpr,
        key_base: tl.constexpr,
        value_base: tl.constexpr,
        group: tl.constexpr,
        rotated_half: tl.constexpr,
        has_slopes: tl.constexpr,
        is_fp8: tl.constexpr,
        is_stored: tl.constexpr,
        window: tl.constexpr,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        block: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One head of one row, or a split of its tokens; the last program to finish adds up the splits.

        The keys and values of earlier tokens were written by earlier steps, so their first block is read before the
        wait. The new token's come from qkv; the split that it belongs to counts it first, and stores it. With
        is_stored, this step wrote some of the earlier tokens', and the new one's too: all are read after the wait.
        """
        head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        d = tl.arange(0, dims)
        is_dim = d < head_dim
        if pdl:
            start_dependents()
        slot = tl.load(slots + row)
        position = tl.load(positions + row).to(tl.int32)
        first, beyond = tokens_of_split(position, position, split, window, num_splits, block)
        end = tl.minimum(beyond, position + (1 if is_stored else 0))
        places_of = table + slot * table_stride
        kv_head = head // group
        head_offset = kv_head * head_dim + d
        if pdl and is_stored:
            wait_for_predecessors()
        k, v = _load_block(places_of, first + tl.arange(0, block), end, keys, values, place_stride, head_offset, is_dim)
        slope = 0.0
        if has_slopes:
            slope = tl.load(slopes + head) * 1.4426950408889634
        key_scale, value_scale = 1.0, 1.0
        if is_fp8:
            key_scale, value_scale = tl.load(key_scales + kv_head), tl.load(value_scales + kv_head)
        own_place = tl.load(places_of + position).to(tl.int64) * place_stride + head_offset
        if pdl and not is_stored:
            wait_for_predecessors()
        kv_at = qkv + row * row_stride + kv_head * group_stride * head_dim
        row_cosines, row_sines = cosines + row * rotated_half, sines + row * rotated_half
        query = kv_at + (head % group) * head_dim
        q = load_rotated(query, row_cosines, row_sines, d, is_dim, rotated_half).to(tl.float32) * scale
        if is_fp8:
            q *= key_scale  # keys are multiplied as stored
        largest = -float("inf")
        weight_sum = 0.0
        sums = tl.zeros((dims,), dtype=tl.float32)
        if not is_stored:
            if (position >= first) & (position < beyond):
                own_k = load_rotated(kv_at + key_base * head_dim, row_cosines, row_sines, d, is_dim, rotated_half)
                own_v = tl.load(kv_at + value_base * head_dim + d, mask=is_dim, other=0.0)
                own_k, own_v = _as_stored(own_k, own_v, key_scale, value_scale, is_fp8)
                is_element = is_dim & (head % group == 0)
                tl.store(keys + own_place, own_k, mask=is_element)
                tl.store(values + own_place, own_v, mask=is_element)
                largest = tl.sum(q * own_k.to(tl.float32), 0)
                weight_sum = 1.0
                sums = own_v.to(tl.float32)
        for start in range(first, end, block):
            t = start + tl.arange(0, block)
            largest, weight_sum, sums = _add_block(
                q, k, v, t, end, position, slope, largest, weight_sum, sums, has_slopes
            )
            if start + block < end:
                k, v = _load_block(places_of, t + block, end, keys, values, place_stride, head_offset, is_dim)
        line = row * tl.num_programs(0) + head
        is_last = True
        if num_splits > 1:
            is_last, weight_sum, sums = combine_splits(
                partials, workspace, line, split, largest, weight_sum, sums, d, is_dim, num_splits, head_dim
            )
        if is_last:
            if is_fp8:
                sums *= value_scale
            tl.store(out + line * head_dim + d, (sums / weight_sum).to(out.dtype.element_ty), mask=is_dim)
