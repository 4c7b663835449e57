"""Hugging Face GPT-NeoX and Pythia: config.json → ModelConfig, tensors → the table.

Format: transformers/models/gpt_neox. Peculiar to GPT-NeoX: attention and MLP read the same residual, with a norm for
each, unless use_parallel_residual is false; the position rotates a part of each head; q, k and v are interleaved head
by head; the LM head is called embed_out.
"""

from __future__ import annotations

import re
from typing import Any

from readers.huggingface import HEAD, HuggingFaceReader, Recipe, as_stored, by_head, split_name, transposed
from readers.rotary import RotarySettings
from weights.table import WeightSpec


class GPTNeoXReader(HuggingFaceReader):
    """Reads a GPT-NeoX checkpoint, saved with or without its language-model head."""

    architecture = "a GPT-NeoX"
    embedding = "embed_in.weight"
    prefix = re.compile(r"^gpt_neox\.")
    buffers = re.compile(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")  # of older versions
    renamed = {"embed_out.weight": HEAD}
    defaults = {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    aliases = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    required = {"quantization_config": None}

    def shape(self) -> dict[str, Any]:
        heads, has_biases = self._heads("num_attention_heads", "hidden_size"), self._is("attention_bias")
        return {
            **heads,
            "inter_size": self._size("intermediate_size"),
            "num_layer": self._size("num_hidden_layers"),
            "max_pos_seq_len": self._size("max_position_embeddings"),
            "layernorm_eps": self._epsilon("layer_norm_eps"),
            "has_positional_encoding": False,
            "use_parallel_residual": self._is("use_parallel_residual"),
            "has_qkv_bias": has_biases,
            "has_dense_bias": has_biases,
            **RotarySettings(self._path, self._settings).fields(heads["size_per_head"]),
            **self._activation("hidden_act"),
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        if spec.name in ("wte", HEAD):
            return as_stored(self.embedding if spec.name == "wte" else HEAD, spec.shape)
        layer, part, kind = split_name(spec)
        if not layer:
            return as_stored(f"final_layer_norm.{kind}", spec.shape)
        name = f"layers.{layer}.{part}.{kind}"  # the table's names are these
        if part == "attention.query_key_value":
            return by_head(name, spec, self._heads("num_attention_heads", "hidden_size")["size_per_head"])
        return (transposed if len(spec.shape) == 2 else as_stored)(name, spec.shape)
