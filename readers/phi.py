"""Hugging Face Phi-1, Phi-1.5 and Phi-2 (transformers/models/phi).

Beside a Llama: attention and MLP read the same LayerNorm of the residual; the MLP has no gate; the position rotates a
part of each head; all linears have biases, the head too; each head's queries and keys may have norms.
"""

from __future__ import annotations

from typing import Any

from readers.llama import LlamaReader


class PhiReader(LlamaReader):
    """Reads a Phi checkpoint."""

    architecture = "a Phi"
    defaults = LlamaReader.defaults | {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
    }
    required = {"quantization_config": None}
    names = LlamaReader.names | {"final_layernorm": "final_layernorm"}
    layer_names = LlamaReader.layer_names | {
        "attention.q_norm": "self_attn.q_layernorm",
        "attention.k_norm": "self_attn.k_layernorm",
        "attention.dense": "self_attn.dense",
        "mlp.dense_h_to_4h": "mlp.fc1",
        "mlp.dense_4h_to_h": "mlp.fc2",
    }
    rotated_part = None

    def biases(self) -> dict[str, bool]:
        return dict.fromkeys(("has_qkv_bias", "has_dense_bias", "has_mlp_bias", "has_lm_head_bias"), True)

    def shape(self) -> dict[str, Any]:
        return {
            **super().shape(),
            "layernorm_eps": self._epsilon("layer_norm_eps"),
            "normalization_type": "layernorm",
            "use_parallel_residual": True,
            "has_post_attention_layernorm": False,
            "qk_layernorm": self._is("qk_layernorm"),
            **self._activation("hidden_act"),
        }
