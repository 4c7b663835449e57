"""The kernel of `decode_attention` for keys and values in fp8 and queries of 16 bits, a program per query head.

With one byte for each number, instructions limit it, not the memory: so a load takes eight numbers, two of them are
converted and multiplied at once, in fp16, and every few products are added to sums in fp32. fp8 is exact in fp16; the
query and the weights are rounded to it, which is finer than bf16. Its reference is kernels.decode_attention.reference.
Stateless.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.fp8 import FP8
from kernels.heads import HeadLayout

try:
    import triton
    import triton.language as tl

    from kernels.attention_parts import combine_splits, tokens_of_split
    from kernels.dependent_launch import start_dependents, wait_for_predecessors
    from kernels.fp8 import cast_fp8
    from kernels.heads import load_rotated
except ImportError:  # a CPU-only torch comes without it
    triton = None

# Measured on an H200 with 48 heads of 128 at 84 to 256 rows of the contexts of a mix of requests: 4.1 TB/s, where the
# kernel for 16 bits, which converts fp8 to fp32, reads 3.1 to 3.2; with 32 heads of 64 3.3 to 3.5, and 2.2 to 2.8.
_BLOCK_TOKENS = 32  # that a program reads at once; a sum in fp16 has a product of each tile of them
_TILE_ELEMENTS = 512  # of the tokens that are multiplied at once: 16 bytes for each of a warp's lanes
_WORD_NUMBERS = 8  # that a load takes
_HAS_TUPLES = triton is not None and hasattr(tl, "tuple")  # Triton 3.2 has none in kernels


def fp8_fits(layout: HeadLayout, cache_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the kernel computes these heads: of a cache and queries of these dtypes."""
    is_fit = layout.group == 1 and layout.head_dim % _WORD_NUMBERS == 0
    return _HAS_TUPLES and is_fit and cache_dtype == FP8 and dtype in (torch.bfloat16, torch.float16)


def fp8_launch(layout: HeadLayout) -> tuple[Any, dict[str, Any]]:
    """The kernel and its own constants: for `decode_attention`'s launch."""
    dims = triton.next_power_of_2(layout.head_dim)
    tile = max(1, min(_BLOCK_TOKENS, _TILE_ELEMENTS // dims))
    return _fp8_decode_attention, dict(dims=dims, tile=tile, block=_BLOCK_TOKENS, num_warps=1)


if triton is not None:

    @triton.jit
    def _load_words(tensor, places, t, end, head_words, is_word):
        """[tokens, words] int64 of eight numbers each, zeros from `end` on."""
        is_element = (t < end)[:, None] & is_word[None, :]
        return tl.load(tensor + places[:, None] + head_words[None, :], mask=is_element, other=0)

    @triton.jit
    def _load_keys(
        key_words, places_of, first, end, place_words, head_words, is_word, tile: tl.constexpr, count: tl.constexpr
    ):
        """(keys, places in words): of the `count` tiles of tokens that begin with `first`."""
        k, places = (), ()
        for j in tl.static_range(count):
            t = first + j * tile + tl.arange(0, tile)
            place = tl.load(places_of + t, mask=t < end, other=0).to(tl.int64) * place_words
            places = places + (place,)  # type: ignore[assignment]
            k = k + (_load_words(key_words, place, t, end, head_words, is_word),)  # type: ignore[assignment]
        return k, places

    @triton.jit
    def _scores(
        k,
        q01,
        q23,
        q45,
        q67,
        first,
        end,
        position,
        scale,
        slope,
        has_slopes: tl.constexpr,
        tile: tl.constexpr,
        count: tl.constexpr,
    ):
        """(the tiles' scores, the largest one); of tokens from `end` on -inf."""
        scores = ()
        most = tl.full((tile,), -float("inf"), tl.float32)
        for j in tl.static_range(count):
            t = first + j * tile + tl.arange(0, tile)
            products = _products(k[j], q01[None, :], q23[None, :], q45[None, :], q67[None, :])
            score = tl.sum(products, 1) * scale
            if has_slopes:
                score += slope * (t - position).to(tl.float32)
            score = tl.where(t < end, score, -float("inf"))
            most = tl.maximum(most, score)
            scores = scores + (score,)  # type: ignore[assignment]
        return scores, tl.max(most, 0)

    @triton.jit
    def _packed(q):
        """[8 n] → four tensors [n] int32: of each eight neighbours the first two in fp16, the next two, and so on."""
        first, second = tl.split(q.to(tl.float16).to(tl.int16, bitcast=True).reshape(q.shape[0] // 2, 2))
        pairs = (second.to(tl.int32) << 16) | (first.to(tl.int32) & 0xFFFF)
        even, odd = tl.split(pairs.reshape(q.shape[0] // 4, 2))
        q01, q45 = tl.split(even.reshape(q.shape[0] // 8, 2))
        q23, q67 = tl.split(odd.reshape(q.shape[0] // 8, 2))
        return q01, q23, q45, q67

    @triton.jit
    def _joined(s0, s1, s2, s3, s4, s5, s6, s7):
        """Eight tensors [n] → [8 n], a number of each after another."""
        even = tl.join(tl.join(s0, s4), tl.join(s2, s6))
        odd = tl.join(tl.join(s1, s5), tl.join(s3, s7))
        return tl.join(even, odd).reshape(8 * s0.shape[0])

    @triton.jit
    def _products(words, q01, q23, q45, q67):
        """The sum of each word's eight numbers times q's, fp32; of four of them in fp16."""
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 w0, w1, w2, w3, low, high;
            .reg .b32 k, s;
            .reg .f32 a, b;
            mov.b64 {w0, w1, w2, w3}, $1;
            cvt.rn.f16x2.e4m3x2 k, w0;
            mul.rn.f16x2 s, k, $2;
            cvt.rn.f16x2.e4m3x2 k, w1;
            fma.rn.f16x2 s, k, $3, s;
            cvt.rn.f16x2.e4m3x2 k, w2;
            fma.rn.f16x2 s, k, $4, s;
            cvt.rn.f16x2.e4m3x2 k, w3;
            fma.rn.f16x2 s, k, $5, s;
            mov.b32 {low, high}, s;
            cvt.f32.f16 a, low;
            cvt.f32.f16 b, high;
            add.f32 $0, a, b;
            }""",
            "=r,l,r,r,r,r",
            [words, q01, q23, q45, q67],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _twice(x):
        """x in fp16, twice, as an int32."""
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def _add_values(words, weight, s01, s23, s45, s67):
        """Pairs of sums in fp16, plus weight · each word's eight numbers."""
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 w0, w1, w2, w3;
            .reg .b32 v;
            mov.b64 {w0, w1, w2, w3}, $4;
            cvt.rn.f16x2.e4m3x2 v, w0;
            fma.rn.f16x2 $0, v, $5, $6;
            cvt.rn.f16x2.e4m3x2 v, w1;
            fma.rn.f16x2 $1, v, $5, $7;
            cvt.rn.f16x2.e4m3x2 v, w2;
            fma.rn.f16x2 $2, v, $5, $8;
            cvt.rn.f16x2.e4m3x2 v, w3;
            fma.rn.f16x2 $3, v, $5, $9;
            }""",
            "=&r,=&r,=&r,=&r,l,r,r,r,r,r",
            [words, weight, s01, s23, s45, s67],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _halves(pair):
        """The two fp16 numbers of an int32, fp32."""
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.f32.f16 $0, low;
            cvt.f32.f16 $1, high;
            }""",
            "=r,=r,r",
            [pair],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _add_values_of_tiles(v, scores, largest, weight_sums, s0, s1, s2, s3, s4, s5, s6, s7, count: tl.constexpr):
        """The sums of weights and of weighted values, with the tiles' added; s0 to s7: of a word's eight numbers."""
        s01 = tl.zeros(s0.shape, tl.int32)
        s23, s45, s67 = s01, s01, s01
        for j in tl.static_range(count):
            weights = tl.exp2(scores[j] - largest)
            weight_sums += weights
            s01, s23, s45, s67 = _add_values(v[j], _twice(weights)[:, None], s01, s23, s45, s67)
        a, b = _halves(s01)
        s0, s1 = s0 + a, s1 + b
        a, b = _halves(s23)
        s2, s3 = s2 + a, s3 + b
        a, b = _halves(s45)
        s4, s5 = s4 + a, s5 + b
        a, b = _halves(s67)
        s6, s7 = s6 + a, s7 + b
        return weight_sums, s0, s1, s2, s3, s4, s5, s6, s7

    @triton.jit
    def _fp8_decode_attention(
        qkv,
        cosines,  # [rows, rotated_half] fp32
        sines,
        keys,
        values,
        key_scales,  # [heads] fp32
        value_scales,
        table,
        slots,
        positions,
        slopes,
        out,
        partials,
        workspace,
        row_stride,
        table_stride,
        place_stride,
        scale,
        group_stride: tl.constexpr,
        key_base: tl.constexpr,
        value_base: tl.constexpr,
        group: tl.constexpr,  # 1
        rotated_half: tl.constexpr,
        has_slopes: tl.constexpr,
        is_fp8: tl.constexpr,  # True
        window: tl.constexpr,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        tile: tl.constexpr,
        block: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One head of one row, or a split of its tokens; the last program to finish adds up the splits.

        As in kernels.decode_attention, the first keys are read before the wait, and the new token comes from qkv.
        """
        head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        d = tl.arange(0, dims)
        is_dim = d < head_dim
        if pdl:
            start_dependents()
        slot = tl.load(slots + row)
        position = tl.load(positions + row).to(tl.int32)
        first, beyond = tokens_of_split(position, position, split, window, num_splits, block)
        end = tl.minimum(beyond, position)
        places_of = table + slot * table_stride
        words = tl.arange(0, dims // 8)
        is_word = words < head_dim // 8
        head_words, place_words = head * (head_dim // 8) + words, place_stride // 8
        key_words, value_words = keys.to(tl.pointer_type(tl.int64)), values.to(tl.pointer_type(tl.int64))
        count: tl.constexpr = block // tile
        k, places = _load_keys(key_words, places_of, first, end, place_words, head_words, is_word, tile, count)
        slope = 0.0
        if has_slopes:
            slope = tl.load(slopes + head) * 1.4426950408889634
        key_scale, value_scale = tl.load(key_scales + head), tl.load(value_scales + head)
        own_place = tl.load(places_of + position).to(tl.int64) * place_stride + head * head_dim + d
        if pdl:
            wait_for_predecessors()
        kv_at = qkv + row * row_stride + head * group_stride * head_dim
        row_cosines, row_sines = cosines + row * rotated_half, sines + row * rotated_half
        q = load_rotated(kv_at, row_cosines, row_sines, d, is_dim, rotated_half).to(tl.float32)
        scale *= key_scale
        largest = -float("inf")
        own_weight = 0.0
        own_sums = tl.zeros((dims,), tl.float32)
        if (position >= first) & (position < beyond):
            own_k = load_rotated(kv_at + key_base * head_dim, row_cosines, row_sines, d, is_dim, rotated_half)
            own_v = tl.load(kv_at + value_base * head_dim + d, mask=is_dim, other=0.0)
            own_k, own_v = cast_fp8(own_k, key_scale), cast_fp8(own_v, value_scale)
            tl.store(keys + own_place, own_k, mask=is_dim)
            tl.store(values + own_place, own_v, mask=is_dim)
            largest = tl.sum(q * own_k.to(tl.float32), 0) * scale
            own_weight = 1.0
            own_sums = own_v.to(tl.float32)
        q_size = tl.maximum(tl.max(tl.abs(q), 0), 1e-30)  # q / q_size cannot overflow in fp16
        q01, q23, q45, q67 = _packed(q / q_size)
        scale *= q_size
        # Each place of a tile has sums of its own; s0 to s7 are those of a word's eight numbers.
        weight_sums = tl.zeros((tile,), tl.float32)
        s0 = tl.zeros((tile, dims // 8), tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        for start in range(first, end, block):
            v = ()
            for j in tl.static_range(count):
                t = start + j * tile + tl.arange(0, tile)
                v = v + (_load_words(value_words, places[j], t, end, head_words, is_word),)  # type: ignore[assignment]
            scores, new_largest = _scores(
                k, q01, q23, q45, q67, start, end, position, scale, slope, has_slopes, tile, count
            )
            if new_largest > largest:  # only then what was summed shrinks
                shrink = tl.exp2(largest - new_largest)
                largest = new_largest
                own_weight, own_sums, weight_sums = own_weight * shrink, own_sums * shrink, weight_sums * shrink
                s0, s1, s2, s3 = s0 * shrink, s1 * shrink, s2 * shrink, s3 * shrink
                s4, s5, s6, s7 = s4 * shrink, s5 * shrink, s6 * shrink, s7 * shrink
            weight_sums, s0, s1, s2, s3, s4, s5, s6, s7 = _add_values_of_tiles(
                v, scores, largest, weight_sums, s0, s1, s2, s3, s4, s5, s6, s7, count
            )
            k, places = _load_keys(
                key_words, places_of, start + block, end, place_words, head_words, is_word, tile, count
            )
        weight_sum = own_weight + tl.sum(weight_sums, 0)
        s0, s1, s2, s3 = tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0)
        s4, s5, s6, s7 = tl.sum(s4, 0), tl.sum(s5, 0), tl.sum(s6, 0), tl.sum(s7, 0)
        sums = own_sums + _joined(s0, s1, s2, s3, s4, s5, s6, s7)
        line = row * tl.num_programs(0) + head
        is_last = True
        if num_splits > 1:
            is_last, weight_sum, sums = combine_splits(
                partials, workspace, line, split, largest, weight_sum, sums, d, is_dim, num_splits, head_dim
            )
        if is_last:
            result = sums * value_scale / weight_sum
            tl.store(out + line * head_dim + d, result.to(out.dtype.element_ty), mask=is_dim)
