"""The table of weight files: shapes for each tp, biases that a model does not have, shards of copied KV heads."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch

from weights.model_config import ModelConfig
from weights.table import WeightSpec, layer_specs, outer_specs, weight_specs

BASE = dict(size_per_head=8, num_layer=2, vocab_size=100, start_id=98, end_id=99, max_pos_seq_len=64)
PLAIN = ModelConfig(head_num=8, **BASE)
WIDE = ModelConfig(head_num=8, hidden_size=40, inter_size=96, **BASE)
GROUPED = ModelConfig(head_num=8, kv_head_num=2, hidden_size=40, inter_size=96, activation_type="swiglu", **BASE)


def shapes(config: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    return {spec.name.removeprefix("layers.1."): spec.shard_shape(tp) for spec in layer_specs(config, 1)}


@pytest.mark.parametrize(
    ("config", "tp", "expected"),
    [
        (PLAIN, 1, [(64, 3, 64), (3, 64), (64, 64), (64,), (64, 256), (256,), (256, 64), (64,)]),
        (PLAIN, 4, [(64, 3, 16), (3, 16), (16, 64), (64,), (64, 64), (64,), (64, 64), (64,)]),
        (WIDE, 2, [(40, 3, 32), (3, 32), (32, 40), (40,), (40, 48), (48,), (48, 40), (40,)]),
        (GROUPED, 1, [(40, 2, 48), (2, 48), (64, 40), (40,), (40, 2, 96), (2, 96), (96, 40), (40,)]),
        (GROUPED, 2, [(40, 1, 48), (1, 48), (32, 40), (40,), (40, 2, 48), (2, 48), (48, 40), (40,)]),
        (GROUPED, 4, [(40, 1, 32), (1, 32), (16, 40), (40,), (40, 2, 24), (2, 24), (24, 40), (40,)]),
        (GROUPED, 8, [(40, 1, 24), (1, 24), (8, 40), (40,), (40, 2, 12), (2, 12), (12, 40), (40,)]),
    ],
)
def test_shapes_of_a_layers_files(config: ModelConfig, tp: int, expected: list[tuple[int, ...]]) -> None:
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    found = shapes(config, tp)
    assert [found[f"{part}.{kind}"] for part in parts for kind in ("weight", "bias")] == expected
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert found[f"{norm}.weight"] == found[f"{norm}.bias"] == (config.hidden_size,)


def test_shapes_outside_the_layers() -> None:
    found = {spec.name: spec.shard_shape(4) for spec in outer_specs(WIDE)}
    assert found == {
        "final_layernorm.weight": (40,),
        "final_layernorm.bias": (40,),
        "wpe": (64, 40),
        "wte": (100, 40),
        "lm_head.weight": (100, 40),
    }


@pytest.mark.parametrize(
    ("flag", "absent"),
    [
        ("has_qkv_bias", ["attention.query_key_value.bias"]),
        ("has_dense_bias", ["attention.dense.bias"]),
        ("has_mlp_bias", ["mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.bias"]),
    ],
)
def test_biases_that_a_model_does_not_have(flag: str, absent: list[str]) -> None:
    lacking = ModelConfig(head_num=8, **BASE, **{flag: False})
    assert [part for part in shapes(PLAIN, 1) if part not in shapes(lacking, 1)] == absent


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("config", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_shards_have_the_tables_shapes_and_sizes(config: ModelConfig, tp: int) -> None:
    for spec in weight_specs(config):
        whole = torch.arange(prod(spec.shape)).reshape(spec.shape)
        shards = [spec.shard(whole, tp, rank) for rank in range(1 if spec.split_axis is None else tp)]
        assert all(tuple(shard.shape) == spec.shard_shape(tp) for shard in shards)
        assert sum(shard.numel() for shard in shards) == spec.num_elements(tp)
        if spec.split_axis is not None and not (spec.head_dim and tp > 2):
            assert torch.equal(torch.cat(shards, spec.split_axis), whole)


@pytest.mark.parametrize("tp", [4, 8])
def test_ranks_copy_a_kv_head_and_share_its_queries(tp: int) -> None:
    """Each rank has its part of all queries in order, and the key and value of the KV head that they read."""
    spec = WeightSpec("qkv", (5, 2, 6 * 8), -2, 8)  # 8 heads of queries, 2 of keys
    queries, keys, values = (np.random.default_rng(n).standard_normal((5, n, 8)) for n in (8, 2, 3))
    values = values[:, :2]
    grouped = [
        np.concatenate([queries[:, 4 * kv : 4 * kv + 4].reshape(5, -1), keys[:, kv], values[:, kv]], -1)
        for kv in range(2)
    ]
    whole = torch.tensor(np.stack(grouped, 1))
    per_rank = 8 // tp
    for rank in range(tp):
        heads, kv = slice(rank * per_rank, (rank + 1) * per_rank), rank * per_rank // 4
        expected = np.concatenate([queries[:, heads].reshape(5, -1), keys[:, kv], values[:, kv]], -1)
        assert np.array_equal(spec.shard(whole, tp, rank).numpy(), expected[:, None])
