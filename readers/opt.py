"""Hugging Face OPT: config.json → ModelConfig, tensors → FasterTransformer's table.

Peculiar to OPT (see examples/pytorch/gpt/utils/huggingface_opt_convert.py): q, k and v are three linears; the position
table has two unused rows; opt-350m normalizes after the residual sum, has no last layernorm, and embeds in fewer
dimensions, so its two projections are multiplied into wte and lm_head; lm_head.weight is always written. Beyond that
converter: models without biases, without layernorm weights, with another activation and with an untied head.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch

from readers.huggingface import HEAD, HuggingFaceReader, Recipe, as_stored, split_name, transposed
from weights.table import WeightSpec

_UNUSED_POSITIONS = 2  # OPTLearnedPositionalEmbedding.offset
_EPSILON = 1e-5  # OPT leaves torch.nn.LayerNorm's default
_VOCABULARY = {"wte": ("embed_tokens.weight", "project_in"), HEAD: (HEAD, "project_out")}
_LAYER_NAMES = {
    "input_layernorm": "self_attn_layer_norm",
    "attention.dense": "self_attn.out_proj",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.dense_h_to_4h": "fc1",
    "mlp.dense_4h_to_h": "fc2",
}


class OPTReader(HuggingFaceReader):
    """Reads an OPT checkpoint, saved with or without its language-model head."""

    architecture = "an OPT"
    embedding = "embed_tokens.weight"
    prefix = re.compile(r"^(model\.)?decoder\.")
    buffers = re.compile(r"version")  # which older versions saved
    repeats_head = True
    defaults = {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "layer_norm_elementwise_affine": True,
        "enable_bias": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }

    def shape(self) -> dict[str, Any]:
        is_pre = self._is("do_layer_norm_before")
        return {
            **self._heads("num_attention_heads", "hidden_size"),
            "inter_size": self._size("ffn_dim"),
            "num_layer": self._size("num_hidden_layers"),
            "max_pos_seq_len": self._size("max_position_embeddings"),
            "layernorm_eps": _EPSILON,
            "layernorm_type": "pre_layernorm" if is_pre else "post_layernorm",
            "has_post_decoder_layernorm": is_pre and not self._is("_remove_final_layer_norm"),
            **self._activation("activation_function"),
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        if spec.name in _VOCABULARY:
            return self._vocabulary(spec)
        if spec.name == "wpe":
            positions, hidden = spec.shape
            shape = (positions + _UNUSED_POSITIONS, hidden)
            return Recipe({"embed_positions.weight": shape}, lambda table: table[_UNUSED_POSITIONS:])
        layer, part, kind = split_name(spec)
        if "layernorm" in part and not self._is("layer_norm_elementwise_affine"):
            fill = torch.ones if kind == "weight" else torch.zeros
            return Recipe({}, partial(fill, spec.shape), "layer_norm_elementwise_affine False")
        if "layernorm" not in part and kind == "bias" and not self._is("enable_bias"):
            return Recipe({}, partial(torch.zeros, spec.shape), "enable_bias False")
        if not layer:
            return as_stored(f"final_layer_norm.{kind}", spec.shape)
        if part == "attention.query_key_value":
            return self._query_key_value(f"layers.{layer}.self_attn", kind, spec.shape[-1])
        name = f"layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        return (transposed if len(spec.shape) == 2 else as_stored)(name, spec.shape)

    def _query_key_value(self, attention: str, kind: str, hidden: int) -> Recipe:
        shape = (hidden, hidden) if kind == "weight" else (hidden,)
        parts = {f"{attention}.{name}_proj.{kind}": shape for name in "qkv"}

        def build(*qkv: torch.Tensor) -> torch.Tensor:
            return torch.stack(qkv).movedim(-1, 0) if kind == "weight" else torch.stack(qkv)

        return Recipe(parts, build, " or ")

    def _vocabulary(self, spec: WeightSpec) -> Recipe:
        """The embedding or the head; with a projection, multiplied in fp32, as FasterTransformer's converter does."""
        name, projection = _VOCABULARY[spec.name]
        vocab_size, hidden = spec.shape
        embedded = self._size("hidden_size" if self._settings["word_embed_proj_dim"] is None else "word_embed_proj_dim")
        if embedded == hidden:
            return as_stored(name, spec.shape)
        parts = {name: (vocab_size, embedded)}
        if spec.name == "wte":
            parts[f"{projection}.weight"] = (hidden, embedded)
            return Recipe(parts, lambda table, matrix: table.float() @ matrix.float().t(), " · ")
        parts[f"{projection}.weight"] = (embedded, hidden)
        return Recipe(parts, lambda table, matrix: table.float() @ matrix.float(), " · ")
