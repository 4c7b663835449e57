"""FasterTransformer's weight files: names, shapes, split axes, order; and reading one rank's shards.

One table (`weight_specs`) serves the converter, the torch executor and the FasterTransformer driver. The
layout is that of FasterTransformer's own converters (examples/pytorch/gpt/utils/*_convert.py): raw
little-endian arrays without headers, every linear stored [in, out].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import ModelConfig

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


class ShardReader:
    """Reads one tp rank's weights from a converted folder, checking each file's size.

    Tensors come memory-mapped where nothing has to be converted: a caller that takes rows of the embedding
    reads those rows only.
    """

    def __init__(self, folder: Path, config: ModelConfig, tp_rank: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.config = config
        self.tp_rank = tp_rank
        self.dtype = dtype
        self.file_dtype = TORCH_DTYPES[config.weight_data_type]

    def has(self, spec: WeightSpec) -> bool:
        """Whether the folder has a file for this weight."""
        return (self.folder / spec.file_name(self.tp_rank)).exists()

    def read(self, spec: WeightSpec) -> torch.Tensor:
        """This rank's shard in the computation's dtype, on the CPU. Raises ValueError on a wrong file."""
        return self.map(spec).to(self.dtype)

    def map(self, spec: WeightSpec, tp_rank: int | None = None) -> torch.Tensor:
        """This rank's shard, or another's, in the file's dtype, memory-mapped, read-only by convention."""
        path = self.folder / spec.file_name(self.tp_rank if tp_rank is None else tp_rank)
        shape = spec.shard_shape(self.config.tensor_para_size)
        count = math.prod(shape)
        expected = count * self.file_dtype.itemsize
        try:
            actual = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: the file is missing") from None
        if actual != expected:
            raise ValueError(
                f"{path}: {actual} bytes, but shape {list(shape)} in {self.config.weight_data_type} takes {expected}"
            )
        return torch.from_file(str(path), size=count, dtype=self.file_dtype).view(shape)
