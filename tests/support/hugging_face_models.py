"""Tiny random checkpoints of Hugging Face's families, written by transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.checkpoints import make_tokenizer

VOCAB = 303
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=96,
    bos_token_id=1,
    eos_token_id=VOCAB - 1,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=24,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=24)
# kind, settings beyond SIZES
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", dict(num_key_value_heads=8, rms_norm_eps=1e-5)),
    "llama-3": ("Llama", dict(rope_parameters=LLAMA3, eos_token_id=[VOCAB - 1, 300])),
    "smol": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=2)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=8)),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral-nemo": ("Mistral", dict(head_dim=16, sliding_window=None)),
    "qwen2": ("Qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "multi-query": ("Qwen2", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "yarn": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-dense": ("Qwen3", dict(head_dim=8, num_key_value_heads=8, attention_bias=True, tie_word_embeddings=True)),
    "nemotron": ("Nemotron", dict(head_dim=None)),
    "minitron": ("Nemotron", dict(head_dim=16, num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "gpt-neox": ("GPTNeoX", dict(num_attention_heads=4)),
    "gpt-neox-in-turn": (
        "GPTNeoX",
        dict(use_parallel_residual=False, attention_bias=False, rotary_pct=0.5, rotary_emb_base=500),
    ),
    "gpt-j": ("GPTJ", dict(n_inner=96, rotary_dim=4)),
    "window": ("Mistral", dict(sliding_window=12)),
    "windows-of-some-layers": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=10, max_window_layers=2, rms_norm_eps=1e-5),
    ),
    "phi": ("Phi", dict(num_key_value_heads=8, partial_rotary_factor=0.25, hidden_act="gelu_new")),
    "phi-norms": ("Phi", dict(qk_layernorm=True, tie_word_embeddings=True)),
}


def make(folder: Path, name: str, **sizes: int) -> Any:
    """Write a checkpoint with a tokenizer, of random weights whose logits lie apart; returns transformers' model.

    sizes: settings in place of the model's own.
    """
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more, **sizes})
    torch.manual_seed(sorted(MODELS).index(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    deviation = 1.6 * config.hidden_size**-0.5  # with larger ones, a wide model's logits follow each rounding
    with torch.no_grad():
        for key, weight in model.named_parameters():
            is_norm = "norm" in key or "ln_" in key
            weight.normal_(1.0 if is_norm else 0.0, 0.3 if is_norm else 0.5 if "embed" in key else deviation)
    model.save_pretrained(folder)
    make_tokenizer(folder, VOCAB)
    return model.eval()
