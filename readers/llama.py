"""Hugging Face Llama 2 and 3, and derivatives of the same model_type: config.json → ModelConfig, tensors → the table.

Format: transformers/models/llama/modeling_llama.py. Peculiar to Llama: no learned positions; q, k and v are three
linears, of which k and v may have fewer heads; the MLP has a gate beside its first matrix. Other families (their
modules) differ by a few settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from readers.huggingface import HuggingFaceReader, Recipe, as_stored, split_name, transposed
from readers.rotary import RotarySettings
from weights.table import WeightSpec


class LlamaReader(HuggingFaceReader):
    """Reads a Llama checkpoint."""

    architecture = "a Llama"
    embedding = "embed_tokens.weight"
    prefix = re.compile(r"^model\.")
    buffers = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # which older versions saved
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    required = {"hidden_act": "silu", "quantization_config": None}

    names = {"lm_head": "lm_head", "final_layernorm": "norm"}
    layer_names = {
        "input_layernorm": "input_layernorm",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.dense": "self_attn.o_proj",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    rotated_part: float | None = 1.0  # the share of a head that the architecture rotates; None: the configuration's

    def biases(self) -> dict[str, bool]:
        """ModelConfig's has_…_bias."""
        attention = self._is("attention_bias")
        return {"has_qkv_bias": attention, "has_dense_bias": attention, "has_mlp_bias": self._is("mlp_bias")}

    def windows(self) -> dict[str, Any]:
        """ModelConfig's sliding_window and full_attention_layers, where they are not its defaults."""
        return {}

    def shape(self) -> dict[str, Any]:
        if self._settings["head_dim"] is None:
            heads = self._heads("num_attention_heads", "hidden_size")
        else:
            heads = {"head_num": self._size("num_attention_heads"), "size_per_head": self._size("head_dim")}
        has_groups = self._settings["num_key_value_heads"] is not None
        return {
            **heads,
            "kv_head_num": self._size("num_key_value_heads") if has_groups else heads["head_num"],
            "hidden_size": self._size("hidden_size"),
            "inter_size": self._size("intermediate_size"),
            "num_layer": self._size("num_hidden_layers"),
            "max_pos_seq_len": self._size("max_position_embeddings"),
            **self.windows(),
            "layernorm_eps": self._epsilon("rms_norm_eps"),
            "normalization_type": "rmsnorm",
            "activation_type": "swiglu",
            "has_positional_encoding": False,
            **RotarySettings(self._path, self._settings).fields(heads["size_per_head"], self.rotated_part),
            **self.biases(),
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        layer, part, kind = split_name(spec)
        if spec.name == "wte":
            return as_stored(self.embedding, spec.shape)
        if not layer:
            return as_stored(f"{self.names[part]}.{kind}", spec.shape)
        if part == "attention.query_key_value":
            return query_key_value(f"layers.{layer}.self_attn", kind, spec)
        if part not in self.layer_names:
            return _gate_and_up(f"layers.{layer}.mlp", kind, spec)
        name = f"layers.{layer}.{self.layer_names[part]}.{kind}"
        return (transposed if len(spec.shape) == 2 else as_stored)(name, spec.shape)


def query_key_value(
    attention: str,
    kind: str,
    spec: WeightSpec,
    turn: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> Recipe:
    """q, k and v in the table's order: one after the other, or for each KV head its queries, the key, the value.

    turn: applied to the rows of q and to those of k, [out] or [out, in].
    """
    inputs = spec.shape[:-2]  # of a weight
    if spec.head_dim:
        kv_heads, group = spec.shape[-2], spec.shape[-1] // spec.head_dim - 2
        widths = (kv_heads * group * spec.head_dim, *(kv_heads * spec.head_dim,) * 2)
    else:
        widths = (spec.shape[-1],) * 3
    parts = {f"{attention}.{name}_proj.{kind}": (width, *inputs) for name, width in zip("qkv", widths, strict=True)}

    def build(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qkv = turn(q), turn(k), v
        if spec.head_dim:
            heads = [part.unflatten(0, (kv_heads, -1, spec.head_dim)) for part in qkv]
            whole = torch.cat(heads, 1).flatten(1, 2)  # [kv_heads, (group + 2) · head_dim, …]
        else:
            whole = torch.stack(qkv)
        return whole.movedim(-1, 0) if inputs else whole

    return Recipe(parts, build, " or ")


def _gate_and_up(mlp: str, kind: str, spec: WeightSpec) -> Recipe:
    shape = (spec.shape[-1], *spec.shape[:-2])
    parts = {f"{mlp}.{name}_proj.{kind}": shape for name in ("gate", "up")}

    def build(*matrices: torch.Tensor) -> torch.Tensor:
        whole = torch.stack(matrices)
        return whole.movedim(-1, 0) if kind == "weight" else whole

    return Recipe(parts, build, " or ")
