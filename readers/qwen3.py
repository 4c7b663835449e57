"""Hugging Face Qwen3: a Qwen2 with norms of each head's queries and keys (transformers/models/qwen3).

The size of a head has a default of its own, and q, k and v have no biases unless attention_bias says so.
"""

from __future__ import annotations

from typing import Any

from readers.qwen2 import Qwen2Reader


class Qwen3Reader(Qwen2Reader):
    """Reads a Qwen3 checkpoint."""

    architecture = "a Qwen3"
    defaults = Qwen2Reader.defaults | {"head_dim": 128, "attention_bias": False}

    def biases(self) -> dict[str, bool]:
        attention = self._is("attention_bias")
        return {"has_qkv_bias": attention, "has_dense_bias": attention, "has_mlp_bias": False}

    def shape(self) -> dict[str, Any]:
        return super().shape() | {"qk_layernorm": True}
