"""The kernel of decode steps against attention by its definition, in fp64, on the cache's own kv_locs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor.attention import alibi_slopes
from kernels.decode_attention import DecodeMetadata, decode_attention, make_workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MAX_LEN = 3000


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """q: [heads, d]; k, v: [kv_len, heads, d] → [heads, d]"""
    scores = np.einsum("hd,khd->hk", q, k) / np.sqrt(q.shape[-1])
    scores += slopes[:, None] * (np.arange(len(k)) - len(k) + 1)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), v)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "has_slopes"),
    [(16, 16, 64, False), (6, 2, 96, True), (8, 1, 128, False), (48, 48, 128, True), (2, 2, 8, False)],
)
@pytest.mark.parametrize("lens", [[1], [130], [MAX_LEN], [1, 2, 31, 32, 33, 700, 2049], [77] * 40], ids=str)
def test_attention_by_definition(lens: list[int], heads: int, kv_heads: int, head_dim: int, has_slopes: bool) -> None:
    rng = np.random.default_rng(0)
    num_places = 20000
    keys, values = (torch.tensor(rng.standard_normal((num_places, kv_heads, head_dim))).cuda() for _ in range(2))
    slots = rng.permutation(len(lens) + 3)[: len(lens)]
    table = np.full((len(lens) + 3, MAX_LEN), num_places - 1, dtype=np.int32)
    for slot, length in zip(slots, lens, strict=True):
        table[slot, :length] = rng.integers(0, num_places, length)
    whole = torch.tensor(rng.standard_normal((len(lens), 3, heads, head_dim))).cuda()
    slopes = alibi_slopes(heads).cuda() if has_slopes else None
    expected = np.stack(
        [
            by_definition(
                q,
                *(
                    part[torch.tensor(table[slot, :length]).long().cuda()]
                    .repeat_interleave(heads // kv_heads, 1)
                    .cpu()
                    .numpy()
                    for part in (keys, values)
                ),
                alibi_slopes(heads).numpy() if has_slopes else np.zeros(heads),
            )
            for q, slot, length in zip(whole[:, 0].cpu().numpy(), slots, lens, strict=True)
        ]
    )
    workspace = make_workspace(len(lens), heads, torch.device("cuda"))
    positions = torch.tensor(lens).cuda() - 1
    decodes = DecodeMetadata(torch.tensor(table).cuda(), torch.tensor(slots).cuda(), positions, workspace)
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        query, k, v = (tensor.to(dtype) for tensor in (whole, keys, values))
        for _ in range(2):  # the workspace is zeros again
            ours = decode_attention(query[:, 0], k, v, decodes, slopes).double().cpu().numpy()
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error < limit, (dtype, error)
