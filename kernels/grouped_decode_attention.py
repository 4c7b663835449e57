"""The kernel of `decode_attention` for query heads that share a KV head: a program reads its keys once for all of them.

The queries are the rows of a tile, so that the matrix units multiply; with one program per query head, the keys come as
often from the L2 cache. Its reference is kernels.decode_attention.reference. Stateless.
"""

from __future__ import annotations

from typing import Any

from kernels.heads import HeadLayout

try:
    import triton
    import triton.language as tl

    from kernels.attention_parts import tokens_of_split
    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import cast_fp8, query_for_fp8
    from kernels.heads import load_rotated
except ImportError:  # a CPU-only torch comes without it
    triton = None

# Measured on an H200 with 32 query and 8 KV heads of 128 at 69 to 235 rows of the contexts that a mix of requests has:
# the loop over the keys alone reads 3.2 to 3.9 TB/s, programs per query head 0.9 to 1.4.
_WANTED_PROGRAMS = 512
_LEAST_TILE = 16  # rows that a product of the matrix units has at least
_BLOCK_KEYS = 64  # keys that a program reads at once


def grouped_launch(layout: HeadLayout, is_stored: bool) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the programs that it wants, and its own constants: for `decode_attention`'s launch.

    is_stored: the cache has the rows' own keys and values already.
    """
    dims, group_rows = max(16, triton.next_power_of_2(layout.head_dim)), triton.next_power_of_2(layout.group)
    block = _BLOCK_KEYS if dims <= 128 else _BLOCK_KEYS // 2
    tile = max(_LEAST_TILE, group_rows)
    constants = dict(is_stored=is_stored, group_rows=group_rows, tile=tile, dims=dims, block=block, num_warps=2)
    return _grouped_decode_attention, _WANTED_PROGRAMS, constants


if triton is not None:

    @triton.jit
    def _add_splits(
        partials,
        counter,
        split,
        largest,
        weight_sum,
        sums,
        is_query,
        group: tl.constexpr,
        group_rows: tl.constexpr,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        tile: tl.constexpr,
        dims: tl.constexpr,
    ):
        """(is_last, result [group_rows, dims]): the last of a KV head's programs gets the result of all its splits.

        partials: of this row and KV head. The splits are always added in the same order.
        """
        row_len: tl.constexpr = head_dim + 2
        g, d = tl.arange(0, tile), tl.arange(0, dims)
        part = partials + (split * group + g) * row_len
        tl.store(part[:, None] + d[None, :], sums, mask=is_query)
        tl.store(part + head_dim, largest, mask=g < group)
        tl.store(part + head_dim + 1, weight_sum, mask=g < group)
        tl.debug_barrier()  # all of the program's part is there before it counts
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1
        result = tl.zeros((group_rows, dims), tl.float32)
        if is_last:
            n = tl.arange(0, group_rows)
            is_row = n < group
            s = tl.arange(0, num_splits)
            lines = partials + (s[:, None] * group + n[None, :]) * row_len  # [splits, group_rows]
            maxima = tl.load(lines + head_dim, mask=is_row[None, :], other=0.0, cache_modifier=".cg")
            most = tl.max(maxima, 0)
            shares = tl.exp2(maxima - most[None, :])  # of an empty part 0: its maximum is -inf
            part_sums = tl.load(lines + head_dim + 1, mask=is_row[None, :], other=1.0, cache_modifier=".cg")
            total = tl.sum(shares * part_sums, 0)
            for number in range(num_splits):
                line = partials + (number * group + n) * row_len
                most_here = tl.load(line + head_dim, mask=is_row, other=0.0, cache_modifier=".cg")
                is_element = is_row[:, None] & (d < head_dim)[None, :]
                values = tl.load(line[:, None] + d[None, :], mask=is_element, other=0.0, cache_modifier=".cg")
                result += tl.exp2(most_here - most)[:, None] * values
            result = result / total[:, None]
            tl.store(counter, 0)
        return is_last, result

    @triton.jit
    def _grouped_decode_attention(
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
        partials,  # [rows · kv_heads, splits, group, head_dim + 2] fp32: weighted values, largest score, weights' sum
        workspace,
        row_stride,
        table_stride,
        place_stride,
        scale,
        group_stride: tl.constexpr,
        key_base: tl.constexpr,
        value_base: tl.constexpr,
        group: tl.constexpr,
        group_rows: tl.constexpr,
        rotated_half: tl.constexpr,
        has_slopes: tl.constexpr,
        is_fp8: tl.constexpr,
        is_stored: tl.constexpr,
        window: tl.constexpr,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        tile: tl.constexpr,
        block: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """The queries of one KV head of one row, or a split of its tokens; the last program adds up the splits.

        is_stored: the cache has the row's own key and value already.
        """
        kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        g, d = tl.arange(0, tile), tl.arange(0, dims)
        is_dim = d < head_dim
        is_query = (g < group)[:, None] & is_dim[None, :]
        if pdl:
            start_dependents()
        slot = tl.load(slots + row)
        position = tl.load(positions + row).to(tl.int32)
        first, beyond = tokens_of_split(position, position, split, window, num_splits, block)
        end = tl.minimum(beyond, position + (1 if is_stored else 0))
        places_of = table + slot * table_stride
        head_offset = kv_head * head_dim + d
        slope = tl.zeros((tile,), tl.float32)
        if has_slopes:
            slope = tl.load(slopes + kv_head * group + g, mask=g < group, other=0.0) * 1.4426950408889634
        key_scale, value_scale = 1.0, 1.0
        if is_fp8:  # keys and values are multiplied as stored
            key_scale, value_scale = tl.load(key_scales + kv_head), tl.load(value_scales + kv_head)
            scale *= key_scale
        own_place = tl.load(places_of + position).to(tl.int64) * place_stride + head_offset
        if pdl:
            wait_for_predecessors()
        kv_at = qkv + row * row_stride + kv_head * group_stride * head_dim
        row_cosines, row_sines = cosines + row * rotated_half, sines + row * rotated_half
        query = kv_at + g[:, None] * head_dim
        q = load_rotated(query, row_cosines, row_sines, d[None, :], is_query, rotated_half)
        largest = tl.full((tile,), -float("inf"), tl.float32)
        weight_sum = tl.zeros((tile,), tl.float32)
        sums = tl.zeros((tile, dims), tl.float32)
        if not is_stored:
            if (position >= first) & (position < beyond):
                own_k = load_rotated(kv_at + key_base * head_dim, row_cosines, row_sines, d, is_dim, rotated_half)
                own_v = tl.load(kv_at + value_base * head_dim + d, mask=is_dim, other=0.0)
                if is_fp8:
                    own_k, own_v = cast_fp8(own_k, key_scale), cast_fp8(own_v, value_scale)
                tl.store(keys + own_place, own_k, mask=is_dim)
                tl.store(values + own_place, own_v, mask=is_dim)
                largest = tl.sum(q.to(tl.float32) * own_k.to(tl.float32)[None, :], 1) * scale
                weight_sum = tl.full((tile,), 1.0, tl.float32)
                sums = tl.zeros((tile, dims), tl.float32) + own_v.to(tl.float32)[None, :]
        score_scale = scale
        if is_fp8:
            q, score_scale = query_for_fp8(q, scale)
        for start in range(first, end, block):
            t = start + tl.arange(0, block)
            is_token = t < end
            place = tl.load(places_of + t, mask=is_token, other=0).to(tl.int64) * place_stride
            k = tl.load(
                keys + place[None, :] + head_offset[:, None], mask=is_dim[:, None] & is_token[None, :], other=0.0
            )
            scores = tl.dot(q, k.to(q.dtype)) * score_scale
            if has_slopes:
                scores += slope[:, None] * (t - position).to(tl.float32)[None, :]
            scores = tl.where(is_token[None, :], scores, -float("inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            weight_sum = weight_sum * shrink + tl.sum(weights, 1)
            v = tl.load(
                values + place[:, None] + head_offset[None, :], mask=is_token[:, None] & is_dim[None, :], other=0.0
            )
            sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * shrink[:, None])
            largest = new_largest
        line = row * tl.num_programs(0) + kv_head
        places = out + line * group * head_dim + d[None, :]
        if num_splits == 1:
            result = sums * value_scale / weight_sum[:, None]
            tl.store(places + g[:, None] * head_dim, result.to(out.dtype.element_ty), mask=is_query)
        else:
            is_last, result = _add_splits(
                partials + line * num_splits * group * (head_dim + 2),
                workspace + line,
                split,
                largest,
                weight_sum,
                sums,
                is_query,
                group,
                group_rows,
                num_splits,
                head_dim,
                tile,
                dims,
            )
            if is_last:
                n = tl.arange(0, group_rows)
                is_place = (n < group)[:, None] & is_dim[None, :]
                tl.store(places + n[:, None] * head_dim, (result * value_scale).to(out.dtype.element_ty), mask=is_place)
