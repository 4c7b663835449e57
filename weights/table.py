"""FasterTransformer's weight files: names, shapes, split axes, order.

The converter, the torch executor and the FasterTransformer driver share this table. The layout is that of
FasterTransformer's own converters (examples/pytorch/gpt/utils/*_convert.py): raw little-endian arrays without
headers; every linear is stored [in, out]. Imports no torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weights.model_config import ModelConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the whole model: its name without `model.` and `.bin`, whole shape and split axis.

    head_dim: set for grouped queries, whose last two axes are [kv_heads, (group + 2) · head_dim]. With tp above
    kv_heads, tp / kv_heads ranks copy each KV head and share its queries.
    """

    name: str
    shape: tuple[int, ...]
    split_axis: int | None = None  # None: every rank reads the same, whole file
    head_dim: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether it is a linear's weight, or a vocabulary's table."""
        return len(self.shape) > 1 and not self.name.endswith(".bias")

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        """The shape of one file when tp ranks share the weight."""
        if self.split_axis is None:
            return self.shape
        if copies := self._kv_copies(tp):
            return (*self.shape[:-2], 1, (self._group // copies + 2) * self.head_dim)
        shape = list(self.shape)
        shape[self.split_axis] //= tp
        return tuple(shape)

    def shard(self, whole: torch.Tensor, tp: int, tp_rank: int) -> torch.Tensor:
        """One rank's part of the whole tensor: a view, or a copy where ranks copy a KV head."""
        if self.split_axis is None:
            return whole
        if copies := self._kv_copies(tp):
            num_queries = self._group // copies
            first = tp_rank % copies * num_queries
            elements = [*range(first, first + num_queries), self._group, self._group + 1]  # queries, key, value
            heads = whole.unflatten(-1, (self._group + 2, self.head_dim)).narrow(-3, tp_rank // copies, 1)
            return heads[..., elements, :].flatten(-2)  # [..., 1, (num_queries + 2) · head_dim]
        return whole.chunk(tp, self.split_axis)[tp_rank]

    def num_elements(self, tp: int) -> int:
        """Elements of all files together when tp ranks share the weight."""
        return prod(self.shard_shape(tp)) * (1 if self.split_axis is None else tp)

    def file_name(self, tp_rank: int) -> str:
        """The name of the file that holds this weight for one tp rank."""
        return f"model.{self.name}.bin" if self.split_axis is None else f"model.{self.name}.{tp_rank}.bin"

    @property
    def _group(self) -> int:
        """Queries of a KV head."""
        return self.shape[-1] // self.head_dim - 2

    def _kv_copies(self, tp: int) -> int:
        """The number of ranks that copy each KV head; 0 where none does."""
        return tp // self.shape[-2] if self.head_dim and tp > self.shape[-2] else 0


# Parts of a layer in the order in which FasterTransformer's op takes them; it has no norm of q and k.
_LAYER_PARTS = (
    "input_layernorm.weight",
    "input_layernorm.bias",
    "attention.query_key_value.weight",
    "attention.query_key_value.bias",
    "attention.q_norm.weight",
    "attention.q_norm.bias",
    "attention.k_norm.weight",
    "attention.k_norm.bias",
    "attention.dense.weight",
    "attention.dense.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
    "mlp.dense_4h_to_h.weight",
    "mlp.dense_4h_to_h.bias",
)


def layer_specs(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """The weights of one layer, in the op's order: its twelve, less those that the model does not have, and norms of q
    and k where it has them.

    FasterTransformer's op has no layout for two of them; they follow Megatron-core, which lets ranks share them evenly.
    Grouped queries: for each KV head its queries, the key, the value. A gated MLP: the matrix under the activation
    first, then the other.
    """
    h, head_dim = config.hidden_size, config.size_per_head
    i, attention = config.inter_size, config.attention_size
    qkv: tuple[int, ...] = (3, attention)
    qkv_split = (-1, 0)
    if config.kv_head_num != config.head_num:
        group = config.head_num // config.kv_head_num
        qkv = (config.kv_head_num, (group + 2) * head_dim)
        qkv_split = (-2, head_dim)
    up = (2, i) if config.is_gated else (i,)
    shapes: dict[str, tuple[tuple[int, ...], int | None, int]] = {
        "attention.query_key_value.weight": ((h, *qkv), *qkv_split),
        "attention.query_key_value.bias": (qkv, *qkv_split),
        **{f"attention.{x}_norm.{kind}": ((head_dim,), None, 0) for x in "qk" for kind in ("weight", "bias")},
        "attention.dense.weight": ((attention, h), 0, 0),
        "mlp.dense_h_to_4h.weight": ((h, *up), -1, 0),
        "mlp.dense_h_to_4h.bias": (up, -1, 0),
        "mlp.dense_4h_to_h.weight": ((i, h), 0, 0),
    }
    absent = set() if config.qk_layernorm else {"attention.q_norm", "attention.k_norm"}
    if not config.has_post_attention_layernorm:
        absent.add("post_attention_layernorm")
    has_norm_bias = config.normalization_type == "layernorm"
    has_bias = {
        "input_layernorm": has_norm_bias,
        "attention.q_norm": has_norm_bias,
        "attention.k_norm": has_norm_bias,
        "attention.query_key_value": config.has_qkv_bias,
        "attention.dense": config.has_dense_bias,
        "post_attention_layernorm": has_norm_bias,
        "mlp.dense_h_to_4h": config.has_mlp_bias,
        "mlp.dense_4h_to_h": config.has_mlp_bias,
    }
    return [
        WeightSpec(f"layers.{layer}.{part}", *shapes.get(part, ((h,), None)))
        for part in _LAYER_PARTS
        if part.rpartition(".")[0] not in absent
        if part.endswith(".weight") or has_bias[part.removesuffix(".bias")]
    ]


def outer_specs(config: ModelConfig) -> list[WeightSpec]:
    """The weights outside the layers, in the op's order; `lm_head.weight` may be absent on disk (tied)."""
    h = config.hidden_size
    specs = []
    kinds = ("weight", "bias") if config.normalization_type == "layernorm" else ("weight",)
    if config.has_pre_decoder_layernorm:
        specs += [WeightSpec(f"pre_decoder_layernorm.{kind}", (h,)) for kind in kinds]
    if config.has_post_decoder_layernorm:
        specs += [WeightSpec(f"final_layernorm.{kind}", (h,)) for kind in kinds]
    if config.has_positional_encoding:
        specs.append(WeightSpec("wpe", (config.max_pos_seq_len, h)))
    specs.append(WeightSpec("wte", (config.vocab_size, h)))
    if config.has_lm_head_bias:
        specs.append(WeightSpec("lm_head.bias", (config.vocab_size,)))
    return [*specs, WeightSpec("lm_head.weight", (config.vocab_size, h))]


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Every weight of the model; `lm_head.weight` comes last."""
    layers = [spec for layer in range(config.num_layer) for spec in layer_specs(config, layer)]
    return layers + outer_specs(config)
