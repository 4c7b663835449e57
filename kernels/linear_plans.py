"""How `linear` cuts a product into programs, for each shape, as measured on an H200."""

from __future__ import annotations

from typing import NamedTuple

SPLIT_COUNTERS = 4096  # output tiles that may be split; a launch has fewer
# The most rows for a plan, by the weight's format. Beyond: cuBLAS, which is as quick; for int8, widened weights and
# cuBLAS; for fp8, rounded rows and cuBLAS. Where a GPU can, fp8 has `plan_fp8_rows` from two rows on.
_FEW_ROWS = {"plain": 32, "int8": 256, "fp8": 32}
_MOST_FP8_ROWS = 256  # that were measured
_MOST_SPLITS = 4
_VOCABULARY = 32768  # outputs of an LM head
_LARGE = 96 << 20  # elements of W from which cuBLAS is as quick for more than 16 rows
_LONG = 24576  # ins whose sum is always split
_MULTIPROCESSORS = 132  # of an H200
_MOST_GATED_PROGRAMS = 3 * _MULTIPROCESSORS  # of tiles of 32 outputs
_WANTED_PROGRAMS = 160  # of tiles of 64 outputs: at least one for each multiprocessor


class TilePlan(NamedTuple):
    """How a launch cuts its work into programs."""

    block_m: int  # rows of a tile; 1: the kernel for one row
    block_n: int  # outs of a tile
    block_k: int  # ins that a program reads at once
    splits: int  # of the in axis
    warps: int
    stages: int  # of the pipeline; of one row's bytes: blocks on their way
    unroll: int = 1  # of one row's bytes: the most blocks that a loop takes in one turn


def plan(rows: int, num_out: int, num_in: int, weight_format: str, is_gated: bool) -> TilePlan | None:
    """The plan for x [rows, num_in] and weight [num_out, num_in], as measured on an H200; None: cuBLAS.

    weight_format: a key of _FEW_ROWS. fp8 has int8's plans where several rows stay as they are.
    """
    if not 0 < rows <= _FEW_ROWS[weight_format]:
        return None
    if rows == 1:
        if weight_format == "plain":
            return _plan_one_row(num_out, num_in)
        return _plan_byte_row(num_out, num_in, weight_format == "int8", is_gated)
    if weight_format != "plain":
        return _plan_bytes(rows, num_out, num_in, is_gated)
    return _plan_tiles(rows, num_out, num_in, is_gated)


def _plan_tiles(rows: int, num_out: int, num_in: int, is_gated: bool) -> TilePlan | None:
    """For 2 to 32 rows, weights in x's dtype."""
    block_m = 16 if rows <= 16 else 32
    if is_gated:  # two tiles of W each
        block_n, stages = (32, 4) if num_out // 64 <= _MOST_GATED_PROGRAMS else (64, 3)
        return TilePlan(block_m, block_n, 128, 1, 4, stages)
    is_vocabulary = num_out >= _VOCABULARY
    if rows > 16 and (is_vocabulary or num_out * num_in >= _LARGE):
        return None
    if is_vocabulary:
        return TilePlan(block_m, 128, 64, 1, 4, 5)
    tiles = -(-num_out // 64)
    if tiles < 48 and rows <= 16:
        return TilePlan(block_m, 64, 256, min(_MOST_SPLITS, max(1, num_in // 256)), 4, 3)
    # With a few programs more than multiprocessors, some of these have two, and the rest waits. In the next three plans
    # a multiprocessor holds three programs: their stages are fewer or smaller.
    if 2 * tiles > _MULTIPROCESSORS and tiles < 96 and num_in >= 3072:
        return TilePlan(block_m, 64, 128, 3, 4, 3)
    if rows <= 16 and _MULTIPROCESSORS < tiles <= 1.5 * _MULTIPROCESSORS:
        return TilePlan(block_m, 64, 64, 1, 4, 6)
    if rows > 16 and _MULTIPROCESSORS < tiles <= 2 * _MULTIPROCESSORS:
        return TilePlan(block_m, 64, 128, 1, 4, 3)
    splits = 1
    while splits < _MOST_SPLITS and (tiles * splits * 2 <= _WANTED_PROGRAMS or num_in >= _LONG):
        splits *= 2
    stages = 4 if num_in >= _LONG or num_out >= 4 * num_in >= 16384 else 5
    least = 1024 if tiles >= 48 else 512  # ins of a split
    return TilePlan(block_m, 64, 128, min(splits, max(1, num_in // least)), 4, stages)


def _plan_one_row(num_out: int, num_in: int) -> TilePlan:
    if num_out >= _VOCABULARY:
        block_n, block_k, warps = (4, 1024, 4) if num_in <= 2048 else (2, 2048, 4)
    elif num_in == 2048 and num_out == 6144:
        block_n, block_k, warps = 4, 1024, 4
    elif num_in >= 8192:
        block_n, block_k, warps = (4, 1024, 4) if num_out >= 6144 else (2, 1024, 4)
    elif num_in >= 4096 or num_in == num_out == 2048:
        block_n, block_k, warps = (2, 2048, 4) if num_in % 2048 == 0 else (1, 1024, 4)
    else:
        block_n, block_k, warps = (4, 1024, 4) if num_out <= 1024 else (2, 1024, 2)
    return TilePlan(1, block_n, _whole_block(num_in, block_k), 1, warps, 1)


def _plan_byte_row(num_out: int, num_in: int, is_int8: bool, is_gated: bool) -> TilePlan | None:
    """For one row and weights of one byte; it reads four at once."""
    if num_in % 4:
        return None
    is_whole = num_in % (512 if num_in < 8192 else 1024) == 0  # else a large block is quicker, the last one masked
    block_n, block_k, warps, stages, unroll = 4, 2048, 4, 1, 12
    if (num_out, num_in, is_int8, is_gated) == (4096, 16384, True, False):
        warps, unroll = 2, 4  # 127 registers a thread: all of its 1024 programs run at once
    elif is_gated or (is_whole and num_in >= 8192):  # gated: two tiles of W each
        block_n, warps = 2, 2
    elif num_in <= 2048 and num_out > 4096:
        block_k, warps = 1024, 2
    elif 4096 <= num_in < 6144 and num_out > 4096:
        warps = 2
    elif 6144 <= num_in < 8192:
        block_k, warps = 1024, 2
        stages, unroll = (2, 12) if num_out > 8192 else (1, 4)
    block_k = _whole_block(num_in, block_k) if is_whole else min(block_k, 1 << (num_in - 1).bit_length())
    return TilePlan(1, block_n, block_k, 1, warps, stages, unroll)


def _whole_block(num_in: int, block_k: int) -> int:
    """A block that divides num_in, if a large one does, so that nothing is masked."""
    divisor = num_in & -num_in  # the largest power of two that divides it
    return divisor if 128 <= divisor < block_k else block_k


def _plan_bytes(rows: int, num_out: int, num_in: int, is_gated: bool) -> TilePlan:
    """For weights of one byte. `wanted` programs keep the H200's 132 multiprocessors busy; with fewer tiles the in axis
    is split.
    """
    if rows <= 16:
        block_m, block_n, block_k, warps, stages, wanted = 16, 32, 256, 2, 3, 512
    elif rows <= 32:
        block_m, block_n, block_k, warps, stages, wanted = 32, 64, 128, 2, 3, 512
    elif rows <= 64:
        block_m, block_n, block_k, warps, stages, wanted = 64, 64, 128, 4, 3, 256
    elif rows <= 128 or is_gated:
        block_m, block_n, block_k, warps, stages, wanted = 128, 64, 128, 4, 3, 256
    else:
        block_m, block_n, block_k, warps, stages, wanted = 128, 128, 64, 8, 4, 256
    if is_gated:  # two tiles of W each
        return TilePlan(block_m, block_n // 2, block_k, 1, warps, stages)
    tiles = -(-num_out // block_n) * -(-rows // block_m)
    splits = min(round(wanted / tiles), num_in // (2 * block_k)) if tiles <= SPLIT_COUNTERS else 1
    return TilePlan(block_m, block_n, block_k, max(1, splits), warps, stages)


def plan_fp8_rows(rows: int, num_out: int, num_in: int) -> TilePlan | None:
    """For x and weight in fp8, more than one row; None: cuBLAS, whose tiles are larger, and which splits no in axis.

    So cuBLAS leaves multiprocessors idle where there are few tiles. On an H200, us of cuBLAS and of this for 16, 64,
    128 and 256 rows: 2048 outs of 8192 ins (none) and 8, 23 and 10, 23 and 13, 23 and 15; 4096 of 16384 (none) and 21,
    43 and 26, 44 and 33, 44 and 40; 24576 of 6144 47 and 42. `plan` for weights in fp8 takes 13, 38 and 57 for 16 rows.
    """
    block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    tiles = -(-num_out // 64) * -(-rows // block_m)
    if rows > _MOST_FP8_ROWS or (rows > 32 and tiles > _MULTIPROCESSORS):
        return None
    if tiles > _MULTIPROCESSORS:  # a multiprocessor holds two of the larger programs, or three of the smaller
        block_k, stages = (128, 5) if 2 * _MULTIPROCESSORS < tiles <= 3 * _MULTIPROCESSORS else (256, 3)
        return TilePlan(block_m, 64, block_k, 1, 4, stages)
    is_long = num_in > 8192
    block_k, stages = (256, 4) if rows <= 32 else (128, 5) if is_long else (256, 3)
    programs = _MULTIPROCESSORS * (2 if rows <= 16 or (32 < rows <= 64 and is_long) else 1)
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * tiles <= programs and num_in >= 4 * splits * block_k:
        splits *= 2
    return TilePlan(block_m, 64, block_k, splits, 4, stages)
