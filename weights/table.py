"""FasterTransformer's weight files: names, shapes, split axes, order.

The converter, the torch executor and the FasterTransformer driver share this table. The layout is that of
FasterTransformer's own converters (examples/pytorch/gpt/utils/*_convert.py): raw little-endian arrays without
headers; every linear is stored [in, out]. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from weights.model_config import ModelConfig


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the whole model: its name without `model.` and `.bin`, whole shape and split axis."""

    name: str
    shape: tuple[int, ...]
    split_axis: int | None = None  # None: every rank reads the same, whole file

    @property
    def is_matrix(self) -> bool:
        """Whether it is a linear's weight, or a vocabulary's table."""
        return len(self.shape) > 1 and not self.name.endswith(".bias")

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        """The shape of one file when tp ranks share the weight."""
        if self.split_axis is None:
            return self.shape
        shape = list(self.shape)
        shape[self.split_axis] //= tp
        return tuple(shape)

    def file_name(self, tp_rank: int) -> str:
        """The name of the file that holds this weight for one tp rank."""
        return f"model.{self.name}.bin" if self.split_axis is None else f"model.{self.name}.{tp_rank}.bin"


# Parts of a layer in the order in which FasterTransformer's op takes them.
_LAYER_PARTS = (
    "input_layernorm.weight",
    "input_layernorm.bias",
    "attention.query_key_value.weight",
    "attention.query_key_value.bias",
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
    """The twelve weights of one layer, in the op's order; ten with rmsnorm, which has no bias.

    What FasterTransformer's op does not know is laid out as Megatron-core has it, so that ranks share it evenly:
    grouped queries by their head of keys, its queries first, then the key, then the value; of a gated MLP's two
    matrices the one under the activation first.
    """
    h, i = config.hidden, config.inter_size
    qkv: tuple[tuple[int, ...], int] = ((3, h), -1)
    if config.kv_head_num != config.head_num:
        group = config.head_num // config.kv_head_num + 2
        qkv = (config.kv_head_num, group * config.size_per_head), -2
    up = (2, i) if config.is_gated else (i,)
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "attention.query_key_value.weight": ((h, *qkv[0]), qkv[1]),
        "attention.query_key_value.bias": qkv,
        "attention.dense.weight": ((h, h), 0),
        "mlp.dense_h_to_4h.weight": ((h, *up), -1),
        "mlp.dense_h_to_4h.bias": (up, -1),
        "mlp.dense_4h_to_h.weight": ((i, h), 0),
    }
    return [
        WeightSpec(f"layers.{layer}.{part}", *shapes.get(part, ((h,), None)))
        for part in _LAYER_PARTS
        if config.normalization_type == "layernorm" or not part.endswith("layernorm.bias")
    ]


def outer_specs(config: ModelConfig) -> list[WeightSpec]:
    """The weights outside the layers, in the op's order; `lm_head.weight` may be absent on disk (tied)."""
    h = config.hidden
    specs = []
    kinds = ("weight", "bias") if config.normalization_type == "layernorm" else ("weight",)
    if config.has_pre_decoder_layernorm:
        specs += [WeightSpec(f"pre_decoder_layernorm.{kind}", (h,)) for kind in kinds]
    if config.has_post_decoder_layernorm:
        specs += [WeightSpec(f"final_layernorm.{kind}", (h,)) for kind in kinds]
    if config.has_positional_encoding:
        specs.append(WeightSpec("wpe", (config.max_pos_seq_len, h)))
    return [
        *specs,
        WeightSpec("wte", (config.vocab_size, h)),
        WeightSpec("lm_head.weight", (config.vocab_size, h)),
    ]


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Every weight of the model; `lm_head.weight` comes last."""
    layers = [spec for layer in range(config.num_layer) for spec in layer_specs(config, layer)]
    return layers + outer_specs(config)
