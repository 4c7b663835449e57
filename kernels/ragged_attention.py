"""Attention of one new token per sequence on a CPU: all rows of a step at once, however long each one is.

torch's scaled_dot_product_attention takes sequences of one length. A call for each row and layer costs more than the
arithmetic, and copies padded to one length cost more than the calls. Torch's sparse operators take ragged rows: the
scores are a product q · kᵀ of which only some elements are wanted (sampled_addmm), the results are weighted sums of
rows of a table (embedding_bag). Both read keys and values where they lie, in any order, and use all threads. Each
row's result depends on that row only, to the last bit.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch

from kernels.heads import HeadLayout

# Fewer rows are faster one by one. Measured at 4 to 12 heads of 64, 160 to 192 tokens.
MIN_ROWS = 2
_SUM = 0  # embedding_bag's mode


class RaggedRows(NamedTuple):
    """Rows of one new token each, the same for every layer. A query is a head of a row.

    Queries are in order of their KV head, then of their row, so that those of one KV head read its keys one after
    another. Each has as many keys as its sequence has tokens, or the window: `keys` in all.
    """

    scores: torch.Tensor  # sparse CSR [queries, kv_heads · num_locs] fp32: where the scores are, and room for them
    values: torch.Tensor  # [keys] fp32: the same numbers
    offsets: torch.Tensor  # [queries + 1] int64: where each query's keys begin
    places: torch.Tensor  # [keys] int64, in the cache seen as [kv_heads · num_locs, head_dim]
    query_ids: torch.Tensor  # [keys] int64: the query of each key
    bias: torch.Tensor | None  # [keys] fp32, ALiBi's
    num_rows: int


def can_batch(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `ragged_attention` computes this dtype here; torch's sampled_addmm has no 16-bit dtypes."""
    return device.type == "cpu" and dtype == torch.float32


def ragged_rows(
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    layout: HeadLayout,
    num_locs: int,
    slopes: torch.Tensor | None = None,
    window: int = 0,
) -> RaggedRows:
    """Lay out one step's rows.

    table: [slots, max_seq_len] int32, the KV locations of each slot; slots, positions: [rows] int64; num_locs: of the
    cache; slopes: [heads] fp32; window: the number of tokens that a query sees, itself included, 0 for all.
    """
    group, num_kv_heads = layout.group, layout.kv_heads
    rows = torch.arange(len(slots)).repeat_interleave(group)  # of the queries of one KV head
    lasts = positions[rows]
    lengths = (lasts + 1).clamp(max=window) if window else lasts + 1
    ends = lengths.cumsum(0)
    starts, total = ends - lengths, int(ends[-1])
    ids = torch.arange(len(rows)).repeat_interleave(lengths, output_size=total)  # [total]
    shifts = slots[rows] * table.shape[1] + lasts + 1 - ends
    locs = table.flatten().index_select(0, shifts.index_select(0, ids).add_(torch.arange(total)))
    kv_heads = torch.arange(num_kv_heads)[:, None]
    places = (locs + kv_heads * num_locs).flatten()
    offsets = torch.cat([(starts + kv_heads * total).flatten(), torch.tensor([num_kv_heads * total])])
    query_ids = (ids + kv_heads * len(rows)).flatten()
    bias = None
    if slopes is not None:
        distances = torch.arange(total) - (ends - 1).index_select(0, ids)
        per_query = slopes.view(num_kv_heads, 1, group).expand(-1, len(slots), -1).flatten(1)  # [kv_heads, queries]
        bias = (per_query.index_select(1, ids) * distances).flatten()
    _accept_csr()
    values = torch.zeros(len(places))
    size = (num_kv_heads * len(rows), num_kv_heads * num_locs)
    scores = torch.sparse_csr_tensor(offsets, places, values, size, check_invariants=False)
    return RaggedRows(scores, values, offsets, places, query_ids, bias, len(slots))


def ragged_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: RaggedRows) -> torch.Tensor:
    """softmax(q · kᵀ / √head_dim + slope · (key's position − query's)) · v, one query per sequence.

    query: [rows, heads, head_dim]; keys, values: [num_locs, kv_heads, head_dim], each KV head's locations contiguous;
    all fp32. Returns [rows, heads, head_dim]. Its reference is kernels.decode_attention.reference.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    tables = [part.transpose(0, 1) for part in (keys, values)]
    if not all(table.is_contiguous() for table in tables):
        raise ValueError(f"keys and values must be contiguous per head; their strides are {keys.stride()}")
    k, v = (table.flatten(0, 1) for table in tables)  # [kv_heads · num_locs, head_dim]
    q = query.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)  # [kv_heads, rows, group, head_dim]
    scores, weights = rows.scores, rows.values
    torch.sparse.sampled_addmm(scores, q.reshape(-1, head_dim), k.t(), beta=0.0, alpha=head_dim**-0.5, out=scores)
    if rows.bias is not None:
        weights.add_(rows.bias)
    most = torch.segment_reduce(weights, "max", offsets=rows.offsets, unsafe=True)  # [queries]
    weights.sub_(most.index_select(0, rows.query_ids)).exp_()
    sums = torch.segment_reduce(weights, "sum", offsets=rows.offsets, unsafe=True)
    out = torch._embedding_bag_forward_only(v, rows.places, rows.offsets[:-1], False, _SUM, False, weights)[0]
    out = out.div_(sums[:, None]).view(num_kv_heads, num_rows, -1, head_dim)
    return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


@functools.cache
def _accept_csr() -> None:
    """Let torch say once, unheard, that its CSR tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
