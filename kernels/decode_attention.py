"""Attention of one new token per sequence over all of its tokens, at any locations of the cache.

Stateless: a row is (slot, position); table[slot] holds the KV locations of the slot's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

# Measured on an H200 at 1 to 32 rows, 16 to 48 heads, 200 to 2000 tokens: programs of one warp, and many of them.
_WANTED_PROGRAMS = 1024
_MOST_SPLITS = 32
_BLOCK_ELEMENTS = 4096  # of keys that a program reads at once


class DecodeMetadata(NamedTuple):
    """Rows of one new token each, the same for every layer. All tensors are contiguous."""

    table: torch.Tensor  # [slots, max_seq_len] int32: each slot's KV locations
    slots: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64, each query's own
    workspace: torch.Tensor  # of `make_workspace` for as many rows and heads


def make_workspace(num_rows: int, num_heads: int, device: torch.device) -> torch.Tensor:
    """The split-k workspace of `decode_attention`: a count of finished splits per row and head, int32.

    It is zeros before a call, and the call leaves it zeros.
    """
    return torch.zeros(num_rows * num_heads, dtype=torch.int32, device=device)


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decodes: DecodeMetadata,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, on any device, row by row, in fp32. It needs no workspace."""
    out = torch.empty_like(query)
    group = query.shape[1] // keys.shape[1]
    for row, (slot, position) in enumerate(zip(decodes.slots.tolist(), decodes.positions.tolist(), strict=True)):
        kv_locs = decodes.table[slot, : position + 1].long()
        k = keys[kv_locs].float().repeat_interleave(group, 1)  # [kv_len, heads, head_dim]
        v = values[kv_locs].float().repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", query[row].float(), k) * query.shape[-1] ** -0.5
        if slopes is not None:
            scores += slopes[:, None] * (torch.arange(position + 1, device=query.device) - position)
        out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
    return out


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decodes: DecodeMetadata,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim + slope · (key's position − query's)) · v, one query per sequence.

    query: [rows, heads, head_dim], strided in all axes but the last; keys, values: [kv_locs, kv_heads, head_dim]
    contiguous; decodes: the queries' rows; slopes: [heads] fp32.
    Returns [rows, heads, head_dim] as query. Sums are in fp32; their order depends on rows, heads and positions only.
    """
    if not runs_on(query.device):
        return reference(query, keys, values, decodes, slopes)
    table, slots, positions, workspace = decodes
    rows, heads, head_dim = query.shape
    wanted = max(1, min(_MOST_SPLITS, _WANTED_PROGRAMS // (rows * heads)))
    splits = 1 << wanted.bit_length() - 1  # a power of two: few variants of the kernel
    dims = triton.next_power_of_2(head_dim)
    out = torch.empty(rows, heads, head_dim, dtype=query.dtype, device=query.device)
    partials = out
    if splits > 1:
        partials = torch.empty(rows * heads, splits, head_dim + 2, dtype=torch.float32, device=query.device)
    _kernel[(rows, heads, splits)](
        query,
        keys,
        values,
        table,
        slots,
        positions,
        out if slopes is None else slopes,
        out,
        partials,
        workspace,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        keys.stride(0),
        head_dim**-0.5,
        heads // keys.shape[1],
        slopes is not None,
        splits,
        head_dim,
        dims,
        max(16, _BLOCK_ELEMENTS // dims),
        num_warps=1,
        num_stages=2,
    )
    return out


if triton is not None:

    @triton.jit
    def _kernel(
        query,
        keys,
        values,
        table,
        slots,
        positions,
        slopes,
        out,
        partials,  # [rows · heads, splits, head_dim + 2] fp32: the weighted values, the largest score, the weights' sum
        workspace,
        query_stride,
        head_stride,
        table_stride,
        place_stride,
        scale,
        group: tl.constexpr,
        has_slopes: tl.constexpr,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
        dims: tl.constexpr,
        block: tl.constexpr,
    ):
        """One head of one sequence, or a split of its tokens; the last program to finish adds up the splits."""
        row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        d = tl.arange(0, dims)
        is_dim = d < head_dim
        slot = tl.load(slots + row)
        kv_len = tl.load(positions + row).to(tl.int32) + 1
        split_len = tl.cdiv(tl.cdiv(kv_len, block), num_splits) * block
        first = split * split_len
        end = tl.minimum(first + split_len, kv_len)
        q = tl.load(query + row * query_stride + head * head_stride + d, mask=is_dim, other=0.0).to(tl.float32) * scale
        places_of = table + slot * table_stride
        slope = 0.0
        if has_slopes:
            slope = tl.load(slopes + head)
        head_offset = (head // group) * head_dim + d[None, :]
        largest = -float("inf")
        weight_sum = 0.0
        sums = tl.zeros((dims,), dtype=tl.float32)
        for start in range(first, end, block):
            t = start + tl.arange(0, block)
            is_token = t < end
            place = tl.load(places_of + t, mask=is_token, other=0).to(tl.int64)
            offset = place[:, None] * place_stride + head_offset
            is_element = is_token[:, None] & is_dim[None, :]
            k = tl.load(keys + offset, mask=is_element, other=0.0).to(tl.float32)
            v = tl.load(values + offset, mask=is_element, other=0.0).to(tl.float32)
            scores = tl.sum(q[None, :] * k, 1)
            if has_slopes:
                scores += slope * (t - kv_len + 1).to(tl.float32)
            scores = tl.where(is_token, scores, -float("inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 0))
            weights = tl.exp(scores - new_largest)
            shrink = tl.exp(largest - new_largest)
            weight_sum = weight_sum * shrink + tl.sum(weights, 0)
            sums = sums * shrink + tl.sum(weights[:, None] * v, 0)
            largest = new_largest
        line = row * tl.num_programs(1) + head
        is_last = True
        if num_splits > 1:
            part = partials + (line * num_splits + split) * (head_dim + 2)
            tl.store(part + d, sums, mask=is_dim)
            tl.store(part + head_dim, largest)
            tl.store(part + head_dim + 1, weight_sum)
            tl.debug_barrier()  # all of the program's part is there before it counts
            is_last = tl.atomic_add(workspace + line, 1, sem="acq_rel") == num_splits - 1
            if is_last:
                lines = partials + (line * num_splits + tl.arange(0, num_splits)) * (head_dim + 2)
                maxima = tl.load(lines + head_dim, cache_modifier=".cg")
                shares = tl.exp(maxima - tl.max(maxima, 0))  # of an empty part 0: its maximum is -inf
                weight_sum = tl.sum(shares * tl.load(lines + head_dim + 1, cache_modifier=".cg"), 0)
                kv_locs = lines[:, None] + d[None, :]
                parts = tl.load(kv_locs, mask=is_dim[None, :], other=0.0, cache_modifier=".cg")
                sums = tl.sum(shares[:, None] * parts, 0)
                tl.store(workspace + line, 0)
        if is_last:
            tl.store(out + line * head_dim + d, (sums / weight_sum).to(out.dtype.element_ty), mask=is_dim)
