"""Hugging Face Mistral: a Llama whose attention may see a window only (transformers/models/mistral)."""

from __future__ import annotations

from typing import Any

from readers.llama import LlamaReader


class MistralReader(LlamaReader):
    """Reads a Mistral checkpoint."""

    architecture = "a Mistral"
    defaults = LlamaReader.defaults | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    }

    def biases(self) -> dict[str, bool]:
        return dict.fromkeys(("has_qkv_bias", "has_dense_bias", "has_mlp_bias"), False)

    def windows(self) -> dict[str, Any]:
        if self._settings["sliding_window"] is None:
            return {}
        return {"sliding_window": self._size("sliding_window"), "full_attention_layers": ()}
