"""Hugging Face GPT-J: config.json → ModelConfig, tensors → the table.

Format: transformers/models/gptj; config.json has GPT-2's keys. Peculiar to GPT-J: attention and MLP read the same norm
of the residual; the position rotates neighbours, (0, 1), (2, 3) and so on, of a part of each head. The other families
pair the halves of that part: q's and k's rows are put into that order, which leaves their products as they are. The
head has a bias.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from readers.gpt2 import GPT2Reader
from readers.huggingface import Recipe, as_stored, split_name, transposed
from readers.llama import query_key_value
from weights.table import WeightSpec


class GPTJReader(GPT2Reader):
    """Reads a GPT-J checkpoint."""

    architecture = "a GPT-J"
    buffers = re.compile(r"h\.\d+\.attn\.(bias|masked_bias|embed_positions)")  # which older versions saved
    defaults = GPT2Reader.defaults | {
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
    }
    required = {"quantization_config": None}
    layer_names = {
        "input_layernorm": "ln_1",
        "attention.dense": "attn.out_proj",
        "mlp.dense_h_to_4h": "mlp.fc_in",
        "mlp.dense_4h_to_h": "mlp.fc_out",
    }

    def shape(self) -> dict[str, Any]:
        return super().shape() | {
            "has_positional_encoding": False,
            "rotary_embedding": self._size("rotary_dim"),
            "use_parallel_residual": True,
            "has_post_attention_layernorm": False,
            "has_qkv_bias": False,
            "has_dense_bias": False,
            "has_lm_head_bias": True,
        }

    def recipe(self, spec: WeightSpec) -> Recipe:
        layer, part, kind = split_name(spec)
        if not layer:
            name = {"wte": self.embedding, "final_layernorm": f"ln_f.{kind}"}.get(part or spec.name, spec.name)
            return as_stored(name, spec.shape)
        if part == "attention.query_key_value":
            return query_key_value(f"h.{layer}.attn", kind, spec, self._halves)
        name = f"h.{layer}.{self.layer_names[part]}.{kind}"
        return (transposed if len(spec.shape) == 2 else as_stored)(name, spec.shape)

    def _halves(self, rows: torch.Tensor) -> torch.Tensor:
        """[heads · head_dim, in], each head's rotated rows reordered: the first of each pair, then the second."""
        num_rotated = self._size("rotary_dim")
        heads = rows.unflatten(0, (self._size("n_head"), -1))
        pairs = [heads[:, :num_rotated:2], heads[:, 1:num_rotated:2], heads[:, num_rotated:]]
        return torch.cat(pairs, 1).flatten(0, 1)
