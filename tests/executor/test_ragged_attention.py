"""Decode rows of a step on a CPU against attention by its definition, and each of them against itself alone."""

from __future__ import annotations

import warnings

import pytest
import torch

from executor.attention import alibi_slopes
from executor.kv_cache import CacheShape, KVCache
from kernels.decode_attention import DecodeMetadata, make_workspace, reference
from kernels.heads import HeadLayout
from kernels.layer_cache import LayerCache
from kernels.ragged_attention import can_batch, ragged_attention, ragged_rows

CPU = torch.device("cpu")
HEAD_DIM = 16


def scattered(lengths: list[int], kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerCache]:
    """(table, slots, positions, cache): slots in any order, each token at any location."""
    generator = torch.Generator().manual_seed(0)
    num_slots, longest = len(lengths) + 2, max(lengths)
    cache = KVCache(CacheShape(1, num_slots * longest, kv_heads, HEAD_DIM, torch.float32), 1, CPU)
    for part in cache.layers[0][:2]:
        part.copy_(torch.randn(part.shape, generator=generator))
    table = torch.randperm(num_slots * longest, generator=generator).int().view(num_slots, longest)
    slots = torch.randperm(num_slots, generator=generator)[: len(lengths)]
    return table, slots, torch.tensor(lengths) - 1, cache.layers[0]


def queries(rows: int, heads: int) -> torch.Tensor:
    """[rows, heads, HEAD_DIM], strided as a part of query_key_value's output is."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, heads, HEAD_DIM, generator=generator).unbind(1)[0]


def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As query_key_value gives them: [rows, width]"""
    if query.shape[1] == key.shape[1]:
        return torch.stack([query, key, value], 1).flatten(1)
    grouped = query.unflatten(1, (key.shape[1], -1))
    return torch.cat([grouped, key[:, :, None], value[:, :, None]], 2).flatten(1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1), (1, 1)])
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [7, 7, 7], [1, 300, 2, 33, 64, 5]], ids=str)
@pytest.mark.parametrize("window", [0, 1, 33])
def test_rows_of_any_length(heads: int, kv_heads: int, has_slopes: bool, lengths: list[int], window: int) -> None:
    table, slots, positions, cache = scattered(lengths, kv_heads)
    slopes = alibi_slopes(heads) if has_slopes else None
    query = queries(len(lengths), heads)
    layout = HeadLayout(heads, kv_heads, HEAD_DIM, heads != kv_heads)
    rows = ragged_rows(table, slots, positions, layout, len(cache.keys), slopes, window)
    decodes = DecodeMetadata(table, slots, positions, make_workspace(0, 0, CPU))
    own_locs = table[slots, positions].long()  # the reference stores the new tokens' keys and values: the same again
    qkv = packed(query, cache.keys[own_locs], cache.values[own_locs]).double()
    doubled = LayerCache(cache.keys.double(), cache.values.double())
    expected = reference(qkv, layout, doubled, decodes, slopes, None, window)
    for _ in range(2):  # the scores of one layer leave nothing behind for the next
        ours = ragged_attention(query, cache.keys, cache.values, rows)
        assert ours.dtype == torch.float32
        error = torch.linalg.norm(ours.flatten(1) - expected) / torch.linalg.norm(expected)
        assert error < 1e-6


def test_a_row_is_the_same_alone() -> None:
    """To the last bit: a long row beside it changes no sum's order."""
    table, slots, positions, cache = scattered([5, 200, 31], 2)
    query = queries(3, 4)
    together = ragged_attention(query, cache.keys, cache.values, _rows(table, slots, positions, cache))
    for row in range(3):
        part = slice(row, row + 1)
        alone = _rows(table, slots[part], positions[part], cache)
        assert torch.equal(ragged_attention(query[part], cache.keys, cache.values, alone), together[part])


def test_large_scores_neither_overflow_nor_spread() -> None:
    table, slots, positions, cache = scattered([9, 4], 2)
    query = 1e4 * queries(2, 2)
    query[1] = torch.nan  # a broken row harms no other
    rows = _rows(table, slots, positions, cache, heads=2)
    for _ in range(2):
        ours = ragged_attention(query, cache.keys, cache.values, rows)
        scores = torch.einsum("hd,khd->hk", query[0], cache.keys[table[slots[0], :9].long()])
        torch.testing.assert_close(ours[0, 0], cache.values[table[slots[0], scores[0].argmax()].long(), 0])
        assert ours[1].isnan().all()


def test_other_layouts_are_refused() -> None:
    table, slots, positions, cache = scattered([2], 2)
    rows = _rows(table, slots, positions, cache)
    with pytest.raises(ValueError, match="contiguous per head; their strides are"):
        ragged_attention(queries(1, 4), cache.keys.contiguous(), cache.values, rows)
    assert can_batch(torch.float32, CPU) and not can_batch(torch.bfloat16, CPU)
    assert not can_batch(torch.float32, torch.device("cuda"))


def test_no_warning_of_torch_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _rows(*scattered([3], 2))


def _rows(table, slots, positions, cache, heads=4):
    layout = HeadLayout(heads, cache.keys.shape[1], HEAD_DIM, heads != cache.keys.shape[1])
    return ragged_rows(table, slots, positions, layout, len(cache.keys))
