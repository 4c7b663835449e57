"""Hugging Face's Llama, Mistral and Qwen2: tokens and logits against transformers' own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert import convert
from executor.rope import rotary_inv_freq
from tests.support.broken import edit_config
from tests.support.engines import hf_greedy
from tests.support.folders import weight_files
from tests.support.hugging_face_models import LLAMA3, MODELS, SIZES, VOCAB, make
from tests.support.quantized import write_dequantized
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

NEW_TOKENS = 16
PROMPTS = [np.random.default_rng(n).integers(4, VOCAB - 1, n).tolist() for n in (1, 7, 20, 50)]


def expected_logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return np.stack([model(torch.tensor([ids])).logits[0, -1].numpy() for ids in PROMPTS])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama-3", "mistral-nemo") else pytest.mark.slow("its like stays"))
        for name in MODELS
    ],
)
def test_logits_and_tokens_are_transformers(tmp_path: Path, name: str) -> None:
    model = make(tmp_path / "source", name)
    expected = expected_logits(model)
    tokens = [hf_greedy(model, ids, NEW_TOKENS) for ids in PROMPTS]
    for tp, pp in ((1, 1), (2, 1), (2, 2)):
        folder = convert(tmp_path / "source", tmp_path / "ft", tp, "fp32")
        logits = run_logits(folder, PROMPTS, tp, pp)
        errors = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() < 1e-5
        assert first_outputs(run_engine(folder, greedy_items(PROMPTS, NEW_TOKENS), tp, pp)) == tokens


@pytest.mark.parametrize("name", ["llama-3", pytest.param("qwen2", marks=pytest.mark.slow("its like stays"))])
def test_int8_equals_the_dequantized_files(tmp_path: Path, name: str) -> None:
    make(tmp_path / "source", name)
    folder = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    write_dequantized(folder, tmp_path / "exact/1-gpu")
    quantized = run_logits(folder, PROMPTS, 1, 1, "--int8-mode", "1")
    exact = run_logits(tmp_path / "exact/1-gpu", PROMPTS, 1, 1)
    assert np.abs(quantized - exact).max() < 1e-4 * np.abs(exact).max()


def test_llama_3s_frequencies_are_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    long = {**LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}
    hf = transformers.LlamaConfig(**{**SIZES, "head_dim": 128, "max_position_embeddings": 131072}, rope_parameters=long)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
    ours = ModelConfig(
        head_num=8,
        size_per_head=128,
        num_layer=1,
        vocab_size=VOCAB,
        start_id=1,
        end_id=2,
        max_pos_seq_len=131072,
        rotary_embedding=128,
        rotary_base=500_000.0,
        rotary_interpolation_factor=8.0,
        rotary_trained_positions=8192,
    )
    torch.testing.assert_close(rotary_inv_freq(ours), expected, rtol=1e-6, atol=0)


def test_both_forms_of_rotary_settings_are_one(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling."""
    make(tmp_path / "llama-3", "llama-3")
    new = convert(tmp_path / "llama-3", tmp_path / "new", 1, "fp32")
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit_config(tmp_path / "llama-3", rope_parameters=..., rope_theta=LLAMA3["rope_theta"], rope_scaling=scaling)
    old = convert(tmp_path / "llama-3", tmp_path / "old", 1, "fp32")
    assert (old / "config.ini").read_text() == (new / "config.ini").read_text()
    assert weight_files(old) == weight_files(new)


def test_a_list_of_end_ids_is_kept(tmp_path: Path) -> None:
    make(tmp_path / "source", "llama-3")
    folder = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert ModelConfig.read(folder / "config.ini").end_ids == (VOCAB - 1, 300)


@pytest.mark.parametrize(
    ("name", "changes", "length"),
    [
        ("mistral-nemo", dict(sliding_window=40), 40),
        ("mistral-nemo", dict(sliding_window=400), 96),
        ("qwen2", dict(sliding_window=40), 96),
        ("qwen2", dict(sliding_window=40, use_sliding_window=True), 40),
    ],
)
def test_sequences_end_at_the_window(tmp_path: Path, name: str, changes: dict[str, Any], length: int) -> None:
    make(tmp_path / "source", name)
    edit_config(tmp_path / "source", **changes)
    folder = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert ModelConfig.read(folder / "config.ini").max_pos_seq_len == length


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(hidden_act="gelu"), "hidden_act is gelu; only silu is supported"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; only 1.0 is supported"),
        (
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
            "rope_parameters.rope_type 'yarn' is not supported; supported: linear, llama3",
        ),
        (
            dict(rope_parameters=..., rope_scaling=dict(type="dynamic", factor=2.0)),
            "rope_scaling.rope_type 'dynamic' is not supported; supported: linear, llama3",
        ),
        (
            dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=0)),
            "rope_parameters.factor is 0; it must be a number above 0",
        ),
        (dict(rope_parameters=7), "rope_parameters is 7; settings are expected"),
        (dict(num_key_value_heads=0), "num_key_value_heads is 0; it must be a whole number of at least 1"),
        (dict(num_key_value_heads=3), "config.json: kv_head_num is 3; it must divide the 8 heads of queries"),
        (dict(head_dim=True), "head_dim is True; it must be a whole number of at least 1"),
        (dict(attention_bias="yes"), "attention_bias is 'yes'; it must be true or false"),
        (dict(num_hidden_layers=3), "unexpected tensor model.layers.3."),
        (dict(intermediate_size=100), "config.json asks for [100, 64]"),
        (dict(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}; only None is supported"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    make(tmp_path / "source", "smol")
    edit_config(tmp_path / "source", **changes)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert sentence in str(error.value)
    assert not list(tmp_path.glob("ft/*-gpu"))
    assert json.loads((tmp_path / "source/config.json").read_text())["model_type"] == "llama"
