"""Hugging Face Qwen2 and Qwen2.5: a Llama with biases of q, k and v (transformers/models/qwen2).

Its attention may have Mistral's window; use_sliding_window says whether.
"""

from __future__ import annotations

from readers.mistral import MistralReader


class Qwen2Reader(MistralReader):
    """Reads a Qwen2 checkpoint."""

    architecture = "a Qwen2"
    defaults = MistralReader.defaults | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }

    def biases(self) -> dict[str, bool]:
        return {"has_qkv_bias": True, "has_dense_bias": False, "has_mlp_bias": False}

    def window(self) -> int:
        return self._window if self._is("use_sliding_window") else 0
