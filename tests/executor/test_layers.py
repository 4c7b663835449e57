"""Layers against their definition in numpy; how many collectives a forward pass makes, and the bias once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf

from engine.config import ParallelConfig
from engine.plan import NewSequences
from engine.request import SamplingParams
from executor.attention import Attention
from executor.kv_cache import CacheShape, KVCache
from executor.layers import Linear, LMHead, RowParallelLinear, VocabEmbedding
from executor.matmul import PackedMatmul, PlainMatmul, can_pack, make_matmul, padded_rows
from executor.model import GPT, StepInput
from executor.slots import SlotState
from kernels.activation import ACTIVATIONS
from weights.model_config import ModelConfig
from weights.reader import ShardReader

CPU = torch.device("cpu")


class CountingComm:
    """A fake of Comm for one rank of a group: counts the calls and returns the rank's own part."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.parallel = parallel
        self.calls: list[str] = []

    def peers_for(self, tensor: torch.Tensor) -> None:
        return None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append("all_reduce")
        return tensor

    def all_gather_last(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append("all_gather")
        return torch.cat([tensor] * self.parallel.tp, dim=-1)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append("all_to_all")
        return torch.cat([tensor[: len(tensor) // self.parallel.tp]] * self.parallel.tp, dim=-1)

    def send_forward(self, tensor: torch.Tensor) -> None:
        self.calls.append("send")

    def receive_forward(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append("receive")
        return tensor.zero_()


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_x_w_plus_b(rows: int, is_packed: bool, dtype: torch.dtype) -> None:
    if is_packed and not can_pack(dtype, CPU):
        pytest.skip(f"oneDNN cannot pack {dtype} here")
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 48), (48, 33), (33,)))
    for b in (bias, None):
        exact = x.double().numpy() @ weight.double().numpy() + (0 if b is None else b.double().numpy())
        ours = Linear(PackedMatmul(weight) if is_packed else PlainMatmul(weight), b)(x).double().numpy()
        assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [PackedMatmul, PlainMatmul])
def test_activations_by_definition(kind: type[PackedMatmul] | type[PlainMatmul], activation: str) -> None:
    """At a product's end, or after it, and into a given tensor."""
    if kind is PackedMatmul and not can_pack(torch.float32, CPU):
        pytest.skip("oneDNN cannot pack here")
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((5, 24)), rng.standard_normal((24, 32)), rng.standard_normal(32)
    y = x @ weight + bias
    half = y.shape[1] // 2
    expected = {
        "none": y,
        "gelu_tanh": 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
        "gelu_erf": 0.5 * y * (1 + erf(y / np.sqrt(2))),
        "relu": np.maximum(y, 0),
        "squared_relu": np.maximum(y, 0) ** 2,
        "swiglu": y[:, :half] / (1 + np.exp(-y[:, :half])) * y[:, half:],
    }[activation]
    matmul = kind(torch.tensor(weight).float())
    out = torch.empty(expected.shape)
    found = matmul(torch.tensor(x).float(), torch.tensor(bias).float(), activation, out)
    assert found is out
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5, rtol=1e-5)


def test_the_factory_packs_where_one_dnn_can() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = PackedMatmul if can_pack(dtype, CPU) else PlainMatmul
        assert type(make_matmul(torch.zeros(4, 3, dtype=dtype))) is expected
    assert not can_pack(torch.float16, CPU) and not can_pack(torch.float32, torch.device("cuda"))


def test_a_cpu_multiplies_few_numbers_of_rows() -> None:
    """oneDNN keeps 0.5 MB for each, for ever."""
    padded = [padded_rows(rows) for rows in range(1, 513)]
    assert padded[:18] == [*range(1, 17), 18, 18] and padded[299] == 304
    assert all(rows <= more <= 1.125 * rows for rows, more in enumerate(padded, 1))
    assert len(set(padded)) == 64


def test_row_parallel_shards_add_up_with_the_bias_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = torch.randn(5, 12, generator=generator), torch.randn(12, 7), torch.randn(7)
    parts = []
    for rank in range(4):
        shard = slice(3 * rank, 3 * rank + 3)
        parts.append(RowParallelLinear(PlainMatmul(weight[shard]), bias, rank)(x[:, shard]))
    torch.testing.assert_close(sum(parts), x @ weight + bias)


def test_vocabulary_shards_add_up_and_padding_is_cut() -> None:
    table = torch.randn(10, 6)  # 10 rows over 4 ranks: 3, 3, 3 and 1 with 2 rows of padding
    padded = torch.cat([table, torch.zeros(2, 6)])
    token_ids = torch.tensor([[0, 9, 3, 5], [5, 8, 0, 0]])
    slots, positions = torch.tensor([1, 0, 0, 1]), torch.tensor([0, 2, 1, 1])
    shards = [padded[3 * r : 3 * r + 3] for r in range(4)]
    parts = [
        VocabEmbedding(rows, None, 3 * r, CountingComm(ParallelConfig(4, 1, r)))(token_ids, slots, positions)
        for r, rows in enumerate(shards)
    ]
    torch.testing.assert_close(sum(parts), table[[5, 3, 9, 8]])
    position_rows = torch.randn(4, 6)
    for tp in (1, 4):  # position embeddings are added once, after the sum
        embedding = VocabEmbedding(table, position_rows, 0, CountingComm(ParallelConfig(tp, 1, 0)))
        expected = table[[5, 3, 9, 8]] + position_rows[[0, 2, 1, 1]]
        torch.testing.assert_close(embedding(token_ids, slots, positions), expected)
    head = LMHead(PlainMatmul(padded.t()), None, 10, CountingComm(ParallelConfig(4, 1, 0)))
    hidden = torch.randn(2, 6)
    torch.testing.assert_close(head.gather(head(hidden)), hidden @ table.t())


def attention_by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """[length, heads, dim] queries, the last of [kv_len, heads, dim]: softmax(q kᵀ / √dim) v, causal, in fp64."""
    out = np.empty_like(q)
    for i in range(len(q)):
        end = len(k) - len(q) + i + 1
        seen = slice(max(0, end - window) if window else 0, end)
        for h in range(q.shape[1]):
            scores = k[seen, h] @ q[i, h] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[i, h] = (weights / weights.sum()) @ v[seen, h]
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 8, 14])
@pytest.mark.parametrize("is_scattered", [False, True])
def test_attention_of_a_ragged_batch(is_scattered: bool, window: int) -> None:
    """A decode, a whole prompt and the second piece of a prompt in one batch, each over its own tokens only."""
    rng = np.random.default_rng(0)
    cache = KVCache(CacheShape(1, 4, 2, 8, torch.float32), 12, CPU)
    slots = SlotState(3, 16, 4, 12, CPU)
    kv_lens, lengths = [9, 5, 14], [1, 5, 6]
    blocks = [[7, 0, 11], [3, 1], [10, 2, 9, 4]] if is_scattered else [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    rows, own_locs, expected, chunks, row = [], [], [], [], 0
    for slot, (kv_len, length) in enumerate(zip(kv_lens, lengths, strict=True)):
        k, v = rng.standard_normal((2, kv_len, 2, 8))
        q = rng.standard_normal((length, 2, 8))
        slots.start([NewSequences([slot], [0], SamplingParams(1), (), [blocks[slot]])])
        kv_locs = slots.kv_loc_table[slot, :kv_len].long()
        cache.layers[0].write(torch.tensor(k).float(), torch.tensor(v).float(), kv_locs)
        chunks.append(slots.chunk(slot, row, kv_len - length, length))
        rows.append(np.stack([q, k[-length:], v[-length:]], 1))
        own_locs.append(kv_locs[-length:])
        expected.append(attention_by_definition(q, k, v, window).reshape(length, 16))
        row += length
    assert isinstance(chunks[0].kv_locs, slice) != is_scattered
    config = ModelConfig(2, 8, 1, 9, 8, 8, max_pos_seq_len=9, sliding_window=window)
    attention = Attention(config, ParallelConfig(), torch.float32, CPU)
    step = attention.step(torch.zeros(row).long(), torch.cat(own_locs), None, None, None, chunks)
    ours = attention(torch.tensor(np.concatenate(rows)).float().flatten(1), cache.layers[0], step, window)
    np.testing.assert_allclose(ours.numpy(), np.concatenate(expected), atol=2e-6)


@pytest.mark.parametrize(
    ("parallel", "num_chosen", "expected"),
    [
        (ParallelConfig(2, 1, 0), 32, {"all_reduce": 1 + 2 * 4, "all_gather": 1}),  # embedding, two a layer; LM head
        (ParallelConfig(2, 1, 0), 33, {"all_reduce": 1 + 2 * 4, "all_to_all": 1, "all_gather": 1}),
        (ParallelConfig(2, 2, 0), 0, {"all_reduce": 1 + 2 * 2, "send": 1}),
        (ParallelConfig(2, 2, 3), 1, {"all_reduce": 2 * 2, "receive": 1, "all_gather": 1}),
    ],
    ids=["whole", "many rows", "first stage", "last stage"],
)
def test_number_of_collectives(
    parallel: ParallelConfig, num_chosen: int, expected: dict[str, int], converted: Callable[[int], Path]
) -> None:
    folder = converted(2)
    config = ModelConfig.read(folder / "config.ini")
    comm = CountingComm(parallel)
    reader = ShardReader(folder, config, parallel.tp_rank, torch.float32)
    model = GPT(comm, reader, CPU, lambda: None)
    cache = KVCache(CacheShape(len(parallel.layers(4)), 4, 2, 16, torch.float32), 4, CPU)
    slots = SlotState(1, 16, 4, 4, CPU)
    slots.start([NewSequences([0], [0], SamplingParams(1), (), [[0, 1]])])
    slots.token_ids[0, :3] = torch.tensor([5, 6, 7])
    kv_locs = slots.kv_loc_table[0, :3].long()
    x = model.forward(
        StepInput(slots.token_ids, torch.zeros(3).long(), torch.arange(3), kv_locs, chunks=[slots.chunk(0, 0, 0, 3)]),
        cache,
    )
    if x is not None:
        logits = model.local_logits(x[2:].expand(num_chosen, -1))
        model.lm_head.choose(logits, lambda whole, rows: whole.new_zeros(2, len(whole)))
    assert {name: comm.calls.count(name) for name in comm.calls} == expected
