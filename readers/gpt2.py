"""Hugging Face GPT-2: config.json → ModelConfig, tensors → FasterTransformer's table.

GPT-2's linears are Conv1D modules, stored [in, out] as FasterTransformer wants them: nothing is transposed. Its
converter is examples/pytorch/gpt/utils/huggingface_gpt_convert.py.
"""

from __future__ import annotations

import re
from typing import Any

from readers.huggingface import HEAD, HuggingFaceReader, Recipe, as_stored, split_name
from weights.table import WeightSpec

_OUTER_NAMES = {"wte": "wte.weight", "wpe": "wpe.weight", HEAD: HEAD}


class GPT2Reader(HuggingFaceReader):
    """Reads a GPT-2 checkpoint, saved with or without its language-model head."""

    architecture = "a GPT-2"
    embedding = "wte.weight"
    prefix = re.compile(r"^transformer\.")
    buffers = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which older versions saved
    defaults = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
    }
    aliases = {
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    # (reorder_and_upcast_attn is not among them: it changes rounding only.)
    required = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }

    layer_names = {
        "input_layernorm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }

    def shape(self) -> dict[str, Any]:
        return {
            **self._heads("n_head", "n_embd"),
            "inter_size": 4 * self._size("n_embd") if self._settings["n_inner"] is None else self._size("n_inner"),
            "num_layer": self._size("n_layer"),
            "max_pos_seq_len": self._size("n_positions"),
            "layernorm_eps": self._epsilon("layer_norm_epsilon"),
            **self._activation("activation_function"),
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        if spec.name in _OUTER_NAMES:
            return as_stored(_OUTER_NAMES[spec.name], spec.shape)
        layer, part, kind = split_name(spec)
        if not layer:
            return as_stored(f"ln_f.{kind}", spec.shape)
        name = f"h.{layer}.{self.layer_names[part]}.{kind}"
        if part == "attention.query_key_value":  # q, k and v side by side, where the table has an axis of 3
            *rows, three, hidden = spec.shape
            return Recipe({name: (*rows, three * hidden)}, lambda tensor: tensor.reshape(spec.shape))
        return as_stored(name, spec.shape)
