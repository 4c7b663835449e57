"""Hugging Face BLOOM: config.json → ModelConfig, tensors → FasterTransformer's table.

Peculiar to BLOOM (see examples/pytorch/gpt/utils/huggingface_bloom_convert.py): q, k and v are interleaved head by
head; a layernorm follows the embedding; positions are ALiBi's, so there is no position table and no limit to the
length. That converter calls apply_residual_connection_post_layernorm post_layernorm, which is something else; here it
has a key of its own.
"""

from __future__ import annotations

import re
from typing import Any

from readers.huggingface import HEAD, HuggingFaceReader, Recipe, as_stored, by_head, split_name, transposed
from weights.table import WeightSpec

_OUTER_NAMES = {"pre_decoder_layernorm": "word_embeddings_layernorm", "final_layernorm": "ln_f"}


class BloomReader(HuggingFaceReader):
    """Reads a BLOOM checkpoint, saved with or without its language-model head."""

    architecture = "a BLOOM"
    embedding = "word_embeddings.weight"
    prefix = re.compile(r"^transformer\.")
    buffers = re.compile(r"h\.\d+\.self_attention\.scale_mask_softmax\.causal_mask")  # which older versions saved
    defaults = {
        "vocab_size": 250880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "seq_length": 2048,  # tokens that it was trained with; transformers makes no use of it
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    aliases = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

    def shape(self) -> dict[str, Any]:
        return {
            **self._heads("n_head", "hidden_size"),
            "inter_size": 4 * self._size("hidden_size"),
            "num_layer": self._size("n_layer"),
            "max_pos_seq_len": self._size("seq_length"),
            "layernorm_eps": self._epsilon("layer_norm_epsilon"),
            "activation_type": "gelu",
            "gelu_form": "tanh",
            "has_positional_encoding": False,
            "has_pre_decoder_layernorm": True,
            "has_post_decoder_layernorm": True,
            "use_attention_linear_bias": True,
            "apply_residual_connection_post_layernorm": self._is("apply_residual_connection_post_layernorm"),
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        if spec.name in ("wte", HEAD):
            return as_stored(self.embedding if spec.name == "wte" else HEAD, spec.shape)
        layer, part, kind = split_name(spec)
        if not layer:
            return as_stored(f"{_OUTER_NAMES[part]}.{kind}", spec.shape)
        name = f"h.{layer}.{part.replace('attention.', 'self_attention.')}.{kind}"
        if part == "attention.query_key_value":
            return by_head(name, spec, self._size("hidden_size") // self._size("n_head"))
        return (transposed if len(spec.shape) == 2 else as_stored)(name, spec.shape)
