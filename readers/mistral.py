"""Hugging Face Mistral: a Llama whose attention may see a window only (transformers/models/mistral).

Up to the window's length nothing is beyond it: so such a model is served up to it.
"""

from __future__ import annotations

import logging
from functools import cached_property

from readers.llama import LlamaReader

_LOG = logging.getLogger("convert")


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

    def window(self) -> int:
        return self._window

    @cached_property
    def _window(self) -> int:
        """As `window`; a line in the log says where it is less than the model's positions."""
        if self._settings["sliding_window"] is None:
            return 0
        window, positions = self._size("sliding_window"), self._size("max_position_embeddings")
        if window < positions:
            _LOG.warning("sliding_window is %d of %d positions: sequences are served up to it", window, positions)
        return window
