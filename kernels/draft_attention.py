"""The kernel of `decode_attention` for steps with drafts: a program reads a slot's keys once for all rows of the slot.

The rows of a slot are the rows of a tile, which the matrix units multiply. With a program for each row, a slot's keys
come once for every draft. For heads without groups: kernels.grouped_decode_attention has tiles of another kind. Its
reference is kernels.decode_attention.reference. Stateless.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.heads import HeadLayout

try:
    import triton
    import triton.language as tl

    from kernels.attention_parts import tokens_of_split
    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import query_for_fp8
    from kernels.heads import load_rotated
except ImportError:  # a CPU-only torch comes without it
    triton = None

# Measured on an H100 with 32 heads of 128, 9 rows of one slot: at 300, 2000, 8000 and 32 000 tokens 18, 31, 73 and 241
# us; with a program for each row 15, 77, 290 and 1136. Nine slots of one row each: 51, 119 and 405 us at 300, 2000 and
# 8000 tokens, instead of 27, 117 and 442. With groups of four, tiles of all rows are slower at 2000 tokens.
_WANTED_PROGRAMS = 512
_SLOT_ROWS = 16  # of a slot in a program, and rows that a product of the matrix units has at least
_BLOCK_KEYS = 64  # keys that a program reads at once; fewer of wide heads or in fp32, so that they fit


def draft_launch(layout: HeadLayout, rows: int, dtype: torch.dtype) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the programs that it wants, and its own constants: for `decode_attention`'s launch.

    rows: of the step; dtype: of qkv. The programs are counted as if each row had its own: that is how
    `decode_attention` divides them.
    """
    dims, is_wide = max(16, triton.next_power_of_2(layout.head_dim)), dtype == torch.float32
    constants = dict(
        rows=rows,
        slot_rows=_SLOT_ROWS,
        dims=dims,
        block=max(16, _BLOCK_KEYS >> (is_wide + (dims > 128))),
        precision="ieee" if is_wide else "tf32",
        num_warps=2,
    )
    return _draft_attention, _WANTED_PROGRAMS * min(rows, _SLOT_ROWS), constants


if triton is not None:

    @triton.jit
    def _add_splits(
        partials,  # pointers to each row's parts [slot_rows]
        counter,
        split,
        largest,
        weight_sum,
        sums,
        is_query,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        slot_rows: tl.constexpr,
        dims: tl.constexpr,
    ):
        """(is_last, weight_sum, sums): the last of a head's programs gets the sums of all its splits.

        The splits are always added in the same order.
        """
        part_len: tl.constexpr = head_dim + 2
        d = tl.arange(0, dims)
        is_element = is_query[:, None] & (d < head_dim)[None, :]
        part = partials + split * part_len
        tl.store(part[:, None] + d[None, :], sums, mask=is_element)
        tl.store(part + head_dim, largest, mask=is_query)
        tl.store(part + head_dim + 1, weight_sum, mask=is_query)
        tl.debug_barrier()  # all of the program's part is there before it counts
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1
        if is_last:
            largest = tl.full((slot_rows,), -float("inf"), tl.float32)
            for number in range(num_splits):
                part = partials + number * part_len
                largest = tl.maximum(largest, tl.load(part + head_dim, mask=is_query, other=0.0, cache_modifier=".cg"))
            weight_sum = tl.zeros((slot_rows,), tl.float32)
            sums = tl.zeros((slot_rows, dims), tl.float32)
            for number in range(num_splits):
                part = partials + number * part_len
                part_largest = tl.load(part + head_dim, mask=is_query, other=0.0, cache_modifier=".cg")
                share = tl.exp2(part_largest - largest)  # of an empty part 0: its maximum is -inf
                part_weights = tl.load(part + head_dim + 1, mask=is_query, other=1.0, cache_modifier=".cg")
                values = tl.load(part[:, None] + d[None, :], mask=is_element, other=0.0, cache_modifier=".cg")
                weight_sum += share * part_weights
                sums += share[:, None] * values
            tl.store(counter, 0)
        return is_last, weight_sum, sums

    @triton.jit
    def _draft_attention(
        qkv,
        cosines,  # [rows, rotated_half] fp32
        sines,
        keys,
        values,
        key_scales,  # [heads] fp32, of fp8
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
        rows,
        group_stride: tl.constexpr,
        key_base: tl.constexpr,
        value_base: tl.constexpr,
        group: tl.constexpr,
        slot_rows: tl.constexpr,
        rotated_half: tl.constexpr,
        has_slopes: tl.constexpr,
        is_fp8: tl.constexpr,
        window: tl.constexpr,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        block: tl.constexpr,
        precision: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One head of up to slot_rows rows of one slot, or a split of their tokens.

        The program of the first of these rows computes them all. The cache has the rows' own keys and values already.
        """
        head, first_row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        d = tl.arange(0, dims)
        is_dim = d < head_dim
        if pdl:
            start_dependents()
        slot = tl.load(slots + first_row)
        # The rows of a slot lie one after another: how many are before this one?
        earlier = first_row - 1 - tl.arange(0, slot_rows)
        num_before = tl.zeros((), tl.int32)
        while tl.max(earlier, 0) >= 0:
            same = tl.load(slots + earlier, mask=earlier >= 0, other=-1) == slot
            num_before += tl.sum(same.to(tl.int32), 0)
            earlier -= slot_rows
        if num_before % slot_rows == 0:
            query_row = first_row + tl.arange(0, slot_rows)
            is_query = query_row < rows
            is_query = is_query & (tl.load(slots + query_row, mask=is_query, other=-1) == slot)
            position = tl.load(positions + query_row, mask=is_query, other=-1).to(tl.int32)
            last = tl.max(position, 0)
            oldest = tl.min(tl.where(is_query, position, last), 0)
            first, beyond = tokens_of_split(oldest, last, split, window, num_splits, block)
            end = tl.minimum(beyond, last + 1)
            places_of = table + slot * table_stride
            head_offset = head * head_dim + d
            slope = 0.0
            if has_slopes:
                slope = tl.load(slopes + head) * 1.4426950408889634
            value_scale = 1.0
            if is_fp8:  # keys and values are multiplied as stored
                scale *= tl.load(key_scales + head)
                value_scale = tl.load(value_scales + head)
            is_element = is_query[:, None] & is_dim[None, :]
            line = query_row.to(tl.int64)
            if pdl:
                wait_for_predecessors()
            q = load_rotated(
                (qkv + line * row_stride + head * group_stride * head_dim)[:, None],
                (cosines + line * rotated_half)[:, None],
                (sines + line * rotated_half)[:, None],
                d[None, :],
                is_element,
                rotated_half,
            )
            score_scale = scale
            if is_fp8:
                q, score_scale = query_for_fp8(q, scale)
            largest = tl.full((slot_rows,), -float("inf"), tl.float32)
            weight_sum = tl.zeros((slot_rows,), tl.float32)
            sums = tl.zeros((slot_rows, dims), tl.float32)
            for start in range(first, end, block):
                t = start + tl.arange(0, block)
                is_token = t < end
                place = tl.load(places_of + t, mask=is_token, other=0).to(tl.int64) * place_stride
                k = tl.load(
                    keys + place[None, :] + head_offset[:, None], mask=is_dim[:, None] & is_token[None, :], other=0.0
                )
                scores = tl.dot(q, k.to(q.dtype), input_precision=precision) * score_scale
                distance = t[None, :] - position[:, None]
                if has_slopes:
                    scores += slope * distance.to(tl.float32)
                is_seen = is_token[None, :] & (distance <= 0)
                if window:
                    is_seen = is_seen & (distance > -window)
                scores = tl.where(is_seen, scores, -float("inf"))
                new_largest = tl.maximum(largest, tl.max(scores, 1))
                base = tl.where(new_largest == -float("inf"), 0.0, new_largest)  # a row may see none of the block
                weights = tl.exp2(scores - base[:, None])
                shrink = tl.exp2(largest - base)
                weight_sum = weight_sum * shrink + tl.sum(weights, 1)
                v = tl.load(
                    values + place[:, None] + head_offset[None, :], mask=is_token[:, None] & is_dim[None, :], other=0.0
                )
                sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * shrink[:, None], input_precision=precision)
                largest = new_largest
            query = line * tl.num_programs(0) + head
            is_last = True
            if num_splits > 1:
                is_last, weight_sum, sums = _add_splits(
                    partials + query * num_splits * (head_dim + 2),
                    workspace + first_row * tl.num_programs(0) + head,
                    split,
                    largest,
                    weight_sum,
                    sums,
                    is_query,
                    num_splits,
                    head_dim,
                    slot_rows,
                    dims,
                )
            if is_last:
                result = sums * value_scale / weight_sum[:, None]
                places = out + query[:, None] * head_dim + d[None, :]
                tl.store(places, result.to(out.dtype.element_ty), mask=is_element)
