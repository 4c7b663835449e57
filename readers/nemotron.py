"""Hugging Face Nemotron and Minitron: a Llama with LayerNorm1P and without a gate (transformers/models/nemotron).

LayerNorm1P multiplies by 1 + weight: the files get the sum. The MLP's activation is squared ReLU. The position rotates
a part of each head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from readers.huggingface import Recipe
from readers.llama import LlamaReader
from readers.rotary import RotarySettings
from weights.table import WeightSpec


class NemotronReader(LlamaReader):
    """Reads a Nemotron checkpoint."""

    architecture = "a Nemotron"
    defaults = LlamaReader.defaults | {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    aliases = {"kv_channels": "head_dim"}  # in NVIDIA's own files, beside or instead of it
    required = {"quantization_config": None}
    layer_names = LlamaReader.layer_names | {"mlp.dense_h_to_4h": "mlp.up_proj"}
    rotated_part = None

    def shape(self) -> dict[str, Any]:
        part = RotarySettings(self._path, self._settings).part()
        for name in ("rope_percent", "rope_percentage"):  # NVIDIA's names, which transformers passes over
            if self._settings.get(name) not in (None, part):
                raise ValueError(
                    f"{self._path}: {name} is {self._settings[name]}; partial_rotary_factor is {part}, and only the "
                    f"same is supported"
                )
        return {
            **super().shape(),
            "layernorm_eps": self._epsilon("norm_eps"),
            "normalization_type": "layernorm",
            **self._activation("hidden_act"),
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        recipe = super().recipe(spec)
        if spec.name.endswith("layernorm.weight"):
            return replace(recipe, build=lambda weight: weight.float() + 1)
        return recipe
