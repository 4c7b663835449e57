"""Hugging Face Qwen2 and Qwen2.5: a Llama with biases of q, k and v (transformers/models/qwen2).

Its attention may have Mistral's window, if use_sliding_window says so, in the layers from max_window_layers on, or in
those that layer_types names.
"""

from __future__ import annotations

import reprlib
from typing import Any

from readers.mistral import MistralReader

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Qwen2Reader(MistralReader):
    """Reads a Qwen2 checkpoint."""

    architecture = "a Qwen2"
    defaults = MistralReader.defaults | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "layer_types": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }

    def biases(self) -> dict[str, bool]:
        return {"has_qkv_bias": True, "has_dense_bias": False, "has_mlp_bias": False}

    def windows(self) -> dict[str, Any]:
        windows = super().windows()
        if not windows or not self._is("use_sliding_window"):
            return {}
        types, num_layer = self._settings["layer_types"], self._size("num_hidden_layers")
        first = self._settings["max_window_layers"]
        if types is None and (not isinstance(first, int) or isinstance(first, bool)):
            raise ValueError(f"{self._path}: max_window_layers is {reprlib.repr(first)}; a whole number is expected")
        if types is None:
            types = [_FULL if layer < first else _SLIDING for layer in range(num_layer)]
        if (
            not isinstance(types, list)
            or len(types) != num_layer
            or any(kind not in (_FULL, _SLIDING) for kind in types)
        ):
            raise ValueError(
                f"{self._path}: layer_types is {reprlib.repr(types)}; {_FULL} or {_SLIDING} is expected for each "
                f"of the {num_layer} layers"
            )
        full = tuple(layer for layer, kind in enumerate(types) if kind == _FULL)
        return windows | {"full_attention_layers": full} if len(full) < num_layer else {}
