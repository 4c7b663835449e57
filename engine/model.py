"""The GPT of one rank: its pipeline stage's layers, over its tensor-parallel shards.

Axis names: tokens - the rows of a step, all requests' new tokens end to end; hidden - head_num · size_per_head;
heads_local - head_num / tp; head_dim - size_per_head; inter_local - inter_size / tp; vocab_local - the
vocabulary's rows on this rank, ⌈vocab / tp⌉ (the last ranks' are padded); rows - tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention import attend
from engine.cache import KVCache, Segment
from engine.comm import Comm
from engine.config import ModelConfig
from engine.layers import Linear, LMHead, RowParallelLinear, VocabEmbedding, can_pack
from engine.weights import ShardReader, WeightSpec, layer_specs, outer_specs


def check_supported(config: ModelConfig) -> None:
    """Raise ValueError, naming the key, for a model that this executor does not compute."""
    expected = {
        "layernorm_type": "pre_layernorm",
        "activation_type": "gelu",
        "has_positional_encoding": True,
        "has_pre_decoder_layernorm": False,
        "has_post_decoder_layernorm": True,
        "use_attention_linear_bias": False,
        "has_adapters": False,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)}; the torch engine computes {value} only")


@dataclass(frozen=True)
class StepInput:
    """One step's tensors, the same on every rank but for the device."""

    token_ids: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64, in each token's own request
    places: torch.Tensor  # [tokens] int64, where the token's keys and values go in the flat cache
    segments: list[Segment]


class GPT:
    """A pipeline stage: token ids (first stage) or hidden states → hidden states; and logits (last stage)."""

    def __init__(self, comm: Comm, reader: ShardReader, device: torch.device, progress: Callable[[], None]) -> None:
        config = reader.config
        check_supported(config)
        self.config = config
        self.comm = comm
        self.device = device
        self.dtype = reader.dtype
        self._reader = reader
        self._is_packed = can_pack(reader.dtype, device)
        parallel = comm.parallel
        outer = {spec.name: spec for spec in outer_specs(config)}
        vocab_local = -(-config.vocab_size // parallel.tp)
        first_id = parallel.tp_rank * vocab_local
        wte = None
        if parallel.is_first_stage:
            wte = self._vocab_rows(outer["wte"], first_id, vocab_local)
            self.embedding = VocabEmbedding(wte, first_id, comm)
            self.position_table = self._load(outer["wpe"])  # [max_pos_seq_len, hidden]
            progress()
        self.layers = []
        for layer in parallel.layers(config.num_layer):
            self.layers.append(
                Layer(config, comm, [self._load(s) for s in layer_specs(config, layer)], self._is_packed)
            )
            progress()
        if parallel.is_last_stage:
            self.final_weight = self._load(outer["final_layernorm.weight"])
            self.final_bias = self._load(outer["final_layernorm.bias"])
            is_tied = not reader.has(outer["lm_head.weight"])
            if is_tied and wte is not None:
                rows = wte
            else:
                rows = self._vocab_rows(outer["wte" if is_tied else "lm_head.weight"], first_id, vocab_local)
            self.lm_head = LMHead(rows, config.vocab_size, self._is_packed, comm)
            progress()

    @staticmethod
    def num_load_steps(config: ModelConfig, comm: Comm) -> int:
        """How many times loading calls `progress` on this rank."""
        parallel = comm.parallel
        return len(parallel.layers(config.num_layer)) + parallel.is_first_stage + parallel.is_last_stage

    def _load(self, spec: WeightSpec) -> torch.Tensor:
        return self._reader.read(spec).to(self.device)

    def _vocab_rows(self, spec: WeightSpec, first_id: int, count: int) -> torch.Tensor:
        """Rows [first_id, first_id + count) of a vocabulary table; rows past its end are zeros."""
        rows = self._reader.map(spec)[first_id : first_id + count].to(self.dtype)
        if rows.shape[0] < count:
            rows = F.pad(rows, (0, 0, 0, count - rows.shape[0]))
        return rows.to(self.device)

    def forward(self, step: StepInput, cache: KVCache) -> torch.Tensor | None:
        """Run this stage. Returns hidden states [tokens, hidden] on the last stage, None on the others."""
        parallel = self.comm.parallel
        num_tokens = step.positions.shape[0]
        if parallel.is_first_stage:
            x = self.embedding(step.token_ids) + F.embedding(step.positions, self.position_table)
        else:
            x = torch.empty(num_tokens, self.config.hidden, dtype=self.dtype, device=self.device)
            self.comm.receive_forward(x)
        for index, layer in enumerate(self.layers):
            x = layer.forward(x, step, cache.keys[index], cache.values[index])
        if not parallel.is_last_stage:
            self.comm.send_forward(x)
            return None
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] of the last stage's hidden states → logits [rows, vocab] fp32."""
        hidden = (self.config.hidden,)
        x = F.layer_norm(x, hidden, self.final_weight, self.final_bias, self.config.layernorm_eps)
        return self.lm_head(x)


class Layer:
    """A pre-layernorm transformer layer: x + attention(ln(x)), then x + mlp(ln(x))."""

    def __init__(self, config: ModelConfig, comm: Comm, weights: list[torch.Tensor], is_packed: bool) -> None:
        (ln1, ln1_bias, qkv, qkv_bias, dense, dense_bias, ln2, ln2_bias, up, up_bias, down, down_bias) = weights
        self.hidden = (config.hidden,)
        self.eps = config.layernorm_eps
        self.head_dim = config.size_per_head
        self.input_layernorm = (ln1, ln1_bias)
        self.post_attention_layernorm = (ln2, ln2_bias)
        self.query_key_value = Linear(qkv.flatten(1), qkv_bias.flatten(), is_packed)
        self.dense = RowParallelLinear(dense, dense_bias, is_packed, comm)
        self.up = Linear(up, up_bias, is_packed)
        self.down = RowParallelLinear(down, down_bias, is_packed, comm)

    def forward(self, x: torch.Tensor, step: StepInput, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] → [tokens, hidden]; writes the tokens' keys and values into the cache."""
        normed = F.layer_norm(x, self.hidden, *self.input_layernorm, self.eps)
        qkv = self.query_key_value(normed).unflatten(-1, (3, -1, self.head_dim))  # [tokens, 3, heads_local, head_dim]
        query, key, value = qkv.unbind(1)
        keys[step.places] = key
        values[step.places] = value
        x = x + self.dense(attend(query, keys, values, step.segments))
        normed = F.layer_norm(x, self.hidden, *self.post_attention_layernorm, self.eps)
        return x + self.down(F.gelu(self.up(normed), approximate="tanh"))
