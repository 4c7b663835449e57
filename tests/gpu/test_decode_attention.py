"""The kernel of decode steps against attention by its definition, in fp64, on the cache's own kv_locs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor.attention import alibi_slopes
from kernels.decode_attention import DecodeMetadata, decode_attention, make_workspace
from kernels.heads import HeadLayout
from kernels.layer_cache import LayerCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MAX_LEN = 3000
LAYOUTS = [
    (16, 16, 64, False, 0),
    (6, 2, 96, True, 0),
    (8, 1, 128, False, 64),
    (48, 48, 128, True, 0),
    (2, 2, 8, False, 2),
    (12, 4, 80, False, 10),
]


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """q: [heads, d]; k, v: [kv_len, heads, d] → [heads, d]"""
    scores = np.einsum("hd,khd->hk", q, k) / np.sqrt(q.shape[-1])
    scores += slopes[:, None] * (np.arange(len(k)) - len(k) + 1)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), v)


def rotated(x: np.ndarray, positions: np.ndarray, half: int) -> np.ndarray:
    """Pairs (i, i + half) as complex numbers, turned by position / 100^(i / half); x: [rows, heads, d]"""
    if half == 0:
        return x
    turns = np.exp(1j * positions[:, None, None] * 100.0 ** (-np.arange(half) / half))
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turns
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def packed(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As query_key_value gives them: [rows, width]"""
    rows, kv_heads = len(q), k.shape[1]
    if q.shape[1] == kv_heads:
        return np.stack([q, k, v], 1).reshape(rows, -1)
    groups = q.reshape(rows, kv_heads, -1, q.shape[-1])
    return np.concatenate([groups, k[:, :, None], v[:, :, None]], 2).reshape(rows, -1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "has_slopes", "half", "window"),
    [(*layout, 0) for layout in LAYOUTS] + [(*layout, window) for layout in LAYOUTS[:2] for window in (1, 70, 1024)],
)
@pytest.mark.parametrize("lens", [[1], [130], [MAX_LEN], [1, 2, 31, 32, 33, 700, 2049], [77] * 40], ids=str)
def test_attention_by_definition(
    lens: list[int], heads: int, kv_heads: int, head_dim: int, has_slopes: bool, half: int, window: int
) -> None:
    """The new token's key and value are stored, rotated, and nothing else changes."""
    rng = np.random.default_rng(0)
    num_places, num_rows = 20000, len(lens)
    keys, values = (rng.standard_normal((num_places, kv_heads, head_dim)) for _ in range(2))
    slots = rng.permutation(num_rows + 3)[:num_rows]
    table = np.full((num_rows + 3, MAX_LEN), num_places - 1, dtype=np.int32)
    own_places = rng.permutation(num_rows)  # no other row reads them
    for slot, length, own in zip(slots, lens, own_places, strict=True):
        table[slot, :length] = rng.integers(num_rows, num_places, length)
        table[slot, length - 1] = own
    q, k, v = (rng.standard_normal((num_rows, n, head_dim)) for n in (heads, kv_heads, kv_heads))
    positions = np.array(lens) - 1
    slopes = alibi_slopes(heads).cuda() if has_slopes else None
    new_keys, new_values = keys.copy(), values.copy()
    new_keys[own_places], new_values[own_places] = rotated(k, positions, half), v
    expected = np.stack(
        [
            by_definition(
                row,
                *(part[table[slot, :length][-window:]].repeat(heads // kv_heads, 1) for part in (new_keys, new_values)),
                alibi_slopes(heads).numpy() if has_slopes else np.zeros(heads),
            )
            for row, slot, length in zip(rotated(q, positions, half), slots, lens, strict=True)
        ]
    )
    workspace = make_workspace(num_rows, heads, torch.device("cuda"))
    tensors = (torch.tensor(part).cuda() for part in (table, slots, positions))
    decodes = DecodeMetadata(*tensors, workspace)
    layout = HeadLayout(heads, kv_heads, head_dim, kv_heads != heads)
    angles = torch.tensor(positions[:, None, None] * 100.0 ** (-np.arange(half) / max(half, 1))).cuda()
    cos_sin = (angles.cos().float(), angles.sin().float()) if half else None
    for dtype, limit in ((torch.float32, 4e-6), (torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)):
        qkv, kept_k, kept_v = (torch.tensor(part).cuda().to(dtype) for part in (packed(q, k, v), keys, values))
        for _ in range(2):  # the workspace is zeros again
            ours = decode_attention(qkv, layout, LayerCache(kept_k, kept_v), decodes, slopes, cos_sin, window)
        error = np.linalg.norm(ours.double().cpu().numpy() - expected.reshape(num_rows, -1)) / np.linalg.norm(expected)
        assert error < limit, (dtype, error)
        assert not workspace.any()
        for kept, new in ((kept_k, new_keys), (kept_v, new_values)):
            error = np.linalg.norm(kept.double().cpu().numpy() - new, axis=(1, 2)) / np.linalg.norm(new, axis=(1, 2))
            assert error.max() < limit, dtype


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "has_slopes", "half"), LAYOUTS)
@pytest.mark.parametrize("window", [0, 5, 1024])
@pytest.mark.parametrize("first", [0, 30, 700, 2900])
def test_rows_of_a_slot_see_each_other(
    first: int, window: int, heads: int, kv_heads: int, head_dim: int, has_slopes: bool, half: int
) -> None:
    """More rows of a slot than a program takes, between others: all keys and values are there before they are read."""
    rng = np.random.default_rng(first)
    slots = np.array([4] + [2] * 20 + [0, 3, 3])
    positions = np.array([77, *range(first, first + 20), 2000, 64, 65])
    num_rows, num_places = len(slots), 5 * MAX_LEN
    table = rng.permutation(num_places).reshape(5, MAX_LEN)
    own_places = table[slots, positions]
    keys, values = (rng.standard_normal((num_places, kv_heads, head_dim)) for _ in range(2))
    q, k, v = (rng.standard_normal((num_rows, n, head_dim)) for n in (heads, kv_heads, kv_heads))
    new_keys, new_values = keys.copy(), values.copy()
    new_keys[own_places], new_values[own_places] = rotated(k, positions, half), v
    keys[own_places] = values[own_places] = 100.0  # of the step before: no row may count it
    no_slopes = np.zeros(heads)
    expected = np.stack(
        [
            by_definition(
                row,
                *(
                    part[table[slot, : position + 1][-window:]].repeat(heads // kv_heads, 1)
                    for part in (new_keys, new_values)
                ),
                alibi_slopes(heads).numpy() if has_slopes else no_slopes,
            )
            for row, slot, position in zip(rotated(q, positions, half), slots, positions, strict=True)
        ]
    )
    workspace = make_workspace(num_rows, heads, torch.device("cuda"))
    tensors = [torch.tensor(part).cuda() for part in (table.astype(np.int32), slots, positions)]
    decodes = DecodeMetadata(*tensors, workspace, torch.tensor(own_places).cuda())
    layout = HeadLayout(heads, kv_heads, head_dim, kv_heads != heads)
    slopes = alibi_slopes(heads).cuda() if has_slopes else None
    angles = torch.tensor(positions[:, None, None] * 100.0 ** (-np.arange(half) / max(half, 1))).cuda()
    cos_sin = (angles.cos().float(), angles.sin().float()) if half else None
    for dtype, limit in ((torch.float32, 4e-6), (torch.bfloat16, 1.2e-2), (torch.float16, 2e-3)):
        qkv, kept_k, kept_v = (torch.tensor(part).cuda().to(dtype) for part in (packed(q, k, v), keys, values))
        ours = decode_attention(qkv, layout, LayerCache(kept_k, kept_v), decodes, slopes, cos_sin, window)
        error = np.linalg.norm(ours.double().cpu().numpy() - expected.reshape(num_rows, -1)) / np.linalg.norm(expected)
        assert error < limit, (dtype, error)
        assert not workspace.any()
