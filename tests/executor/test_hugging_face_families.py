"""Hugging Face's Llama and the families after it: tokens and logits against transformers' own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert import convert
from engine.config import EngineConfig
from executor.rope import rotary_inv_freq
from executor.startup import pick_backend
from readers.rotary import RotarySettings
from tests.support.broken import edit_config
from tests.support.engines import hf_greedy
from tests.support.folders import weight_files
from tests.support.hugging_face_models import LLAMA3, MODELS, SIZES, VOCAB, make
from tests.support.quantized import write_dequantized
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

NEW_TOKENS = 16
# Each computes something that no other does.
FIRST = (
    "llama-3",
    "mistral-nemo",
    "yarn",
    "windows-of-some-layers",
    "qwen3",
    "nemotron",
    "gpt-neox",
    "gpt-j",
    "phi",
)
PROMPTS = [np.random.default_rng(n).integers(4, VOCAB - 1, n).tolist() for n in (1, 7, 20, 50)]


def expected_logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return np.stack([model(torch.tensor([ids])).logits[0, -1].numpy() for ids in PROMPTS])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow("its like stays")) for name in MODELS],
)
def test_logits_and_tokens_are_transformers(tmp_path: Path, name: str) -> None:
    model = make(tmp_path / "source", name)
    expected = expected_logits(model)
    tokens = [hf_greedy(model, ids, NEW_TOKENS) for ids in PROMPTS]
    for tp, pp in ((1, 1), (2, 1), (2, 2), (4, 1)):
        folder = convert(tmp_path / "source", tmp_path / "ft", tp, "fp32")
        logits = run_logits(folder, PROMPTS, tp, pp)
        errors = np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() < 1e-5, (tp, pp)
        assert first_outputs(run_engine(folder, greedy_items(PROMPTS, NEW_TOKENS), tp, pp)) == tokens


@pytest.mark.parametrize(
    "name",
    [
        "llama-3",
        "phi-norms",
        *(pytest.param(name, marks=pytest.mark.slow("its like stays")) for name in ("qwen2", "qwen3", "gpt-neox")),
    ],
)
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


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(original_max_position_embeddings=4096, truncate=False),
        dict(beta_fast=16, beta_slow=2, attention_factor=1.25),
        dict(mscale=0.7, mscale_all_dim=1.0),
    ],
    ids=str,
)
def test_yarns_frequencies_are_transformers(more: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, **more)
    sizes = {**SIZES, "head_dim": 128, "max_position_embeddings": 32768}
    hf = transformers.LlamaConfig(**sizes, rope_parameters=dict(yarn))
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, "cpu")
    settings = dict(rope_scaling=None, rope_parameters=yarn, partial_rotary_factor=1.0, max_position_embeddings=32768)
    fields = RotarySettings(Path("config.json"), settings | dict(rope_theta=1e4)).fields(128)
    ours = ModelConfig(8, 128, 1, VOCAB, 1, 2, max_pos_seq_len=32768, **fields)
    torch.testing.assert_close(rotary_inv_freq(ours), expected, rtol=2e-6, atol=0)
    assert ours.rotary_attention_factor == pytest.approx(factor)


def test_a_head_may_be_called_embed_out_or_lm_head(tmp_path: Path) -> None:
    make(tmp_path / "source", "gpt-neox")
    path = tmp_path / "source/model.safetensors"
    tensors = load_file(path)
    folder = convert(tmp_path / "source", tmp_path / "one", 1, "fp32")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, path, {"format": "pt"})
    assert weight_files(convert(tmp_path / "source", tmp_path / "other", 1, "fp32")) == weight_files(folder)
    tensors["embed_out.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="holds both embed_out.weight and lm_head.weight"):
        convert(tmp_path / "source", tmp_path / "both", 1, "fp32")


def test_an_end_id_of_generation_config_alone(tmp_path: Path) -> None:
    """As transformers' generate: it counts where config.json has none."""
    make(tmp_path / "source", "phi")
    edit_config(tmp_path / "source", eos_token_id=None)
    (tmp_path / "source/generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    folder = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert ModelConfig.read(folder / "config.ini").end_ids == (7,)


def test_both_forms_of_rotary_settings_are_one(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling."""
    make(tmp_path / "llama-3", "llama-3")
    new = convert(tmp_path / "llama-3", tmp_path / "new", 1, "fp32")
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit_config(tmp_path / "llama-3", rope_parameters=..., rope_theta=LLAMA3["rope_theta"], rope_scaling=scaling)
    old = convert(tmp_path / "llama-3", tmp_path / "old", 1, "fp32")
    assert (old / "config.ini").read_text() == (new / "config.ini").read_text()
    assert weight_files(old) == weight_files(new)


def test_rotary_settings_of_each_type_of_layer(tmp_path: Path) -> None:
    """transformers 5 may write them so. Where they are the same for all types, they are the model's."""
    make(tmp_path / "llama-3", "llama-3")
    flat = convert(tmp_path / "llama-3", tmp_path / "flat", 1, "fp32")
    by_type = dict(full_attention=LLAMA3, sliding_attention=LLAMA3, other=None)
    edit_config(tmp_path / "llama-3", rope_parameters=by_type)
    nested = convert(tmp_path / "llama-3", tmp_path / "nested", 1, "fp32")
    assert (nested / "config.ini").read_text() == (flat / "config.ini").read_text()
    edit_config(tmp_path / "llama-3", rope_parameters=by_type | dict(other=LLAMA3 | dict(rope_theta=7.0)))
    with pytest.raises(ValueError, match="rope_parameters differs between full_attention and other; only the same"):
        convert(tmp_path / "llama-3", tmp_path / "differs", 1, "fp32")


def test_a_list_of_end_ids_is_kept(tmp_path: Path) -> None:
    make(tmp_path / "source", "llama-3")
    folder = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert ModelConfig.read(folder / "config.ini").end_ids == (VOCAB - 1, 300)


SOME = dict(sliding_window=40, use_sliding_window=True)


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("mistral-nemo", dict(sliding_window=40), [40, 40, 40, 40]),
        ("mistral-nemo", {}, [0, 0, 0, 0]),
        ("qwen2", dict(sliding_window=40, max_window_layers=0), [0, 0, 0, 0]),
        ("qwen2", SOME | dict(layer_types=..., max_window_layers=1), [0, 40, 40, 40]),
        ("qwen2", SOME | dict(layer_types=..., max_window_layers=4), [0, 0, 0, 0]),
        ("qwen2", SOME | dict(layer_types=["sliding_attention", "full_attention"] * 2), [40, 0, 40, 0]),
        ("qwen2", SOME | dict(layer_types=["full_attention"] * 4), [0, 0, 0, 0]),
        ("qwen3", SOME | dict(layer_types=..., max_window_layers=3), [0, 0, 0, 40]),
    ],
)
def test_windows_of_layers(tmp_path: Path, name: str, changes: dict[str, Any], windows: list[int]) -> None:
    make(tmp_path / "source", name)
    edit_config(tmp_path / "source", **changes)
    path = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32") / "config.ini"
    config = ModelConfig.read(path)
    assert [config.window(layer) for layer in range(4)] == windows
    pick_backend(EngineConfig(device="cpu", max_seq_len=96), config, Path("none"), 0)  # longer than the window
    assert config.max_pos_seq_len == 96  # whatever the window
    assert ("sliding_window" in path.read_text()) == any(windows)  # other folders stay as they were


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(hidden_act="gelu"), "hidden_act is gelu; only silu is supported"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; only 1.0 is supported"),
        (
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
            "partial_rotary_factor is 0.5; only 1.0 is supported",
        ),
        (
            dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=2)),
            "rope_parameters.partial_rotary_factor is 2; it must be above 0 and at most 1",
        ),
        (
            dict(rope_parameters=dict(full_attention=dict(rope_type="dynamic", rope_theta=1e4))),
            "rope_parameters.full_attention.rope_type 'dynamic' is not supported; supported: linear, llama3, yarn",
        ),
        (
            dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, factor=4.0)),
            "rope_parameters.rope_type 'longrope' is not supported; supported: linear, llama3, yarn",
        ),
        (
            dict(rope_parameters=..., rope_scaling=dict(type="dynamic", factor=2.0)),
            "rope_scaling.rope_type 'dynamic' is not supported; supported: linear, llama3, yarn",
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
    refuse(tmp_path, "smol", changes, sentence)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("qwen3", dict(head_dim=32), "config.json asks for [256, 64]"),
        ("qwen3", SOME | dict(layer_types=..., max_window_layers="x"), "max_window_layers is 'x'; a whole number is"),
        (
            "qwen2",
            SOME | dict(layer_types=["chunked_attention"]),
            "layer_types is ['chunked_attention']; full_attention or sliding_attention is expected for each of the 4",
        ),
        ("mistral-nemo", dict(sliding_window=0), "sliding_window is 0; it must be a whole number of at least 1"),
        ("qwen3", dict(hidden_act="relu"), "hidden_act is relu; only silu is supported"),
        ("nemotron", dict(hidden_act="silu"), "hidden_act 'silu' is not supported; supported: gelu, "),
        (
            "nemotron",
            dict(rope_parameters=..., rope_percent=0.25),
            "rope_percent is 0.25; partial_rotary_factor is 0.5",
        ),
        ("gpt-neox", dict(num_attention_heads=5), "num_attention_heads 5 does not divide hidden_size 64"),
        ("gpt-neox", dict(use_parallel_residual=1), "use_parallel_residual is 1; it must be true or false"),
        (
            "gpt-neox",
            dict(rope_parameters=..., rotary_pct=0.2),
            "config.json: rotary_embedding is 3; it must be even, and at most size_per_head 16",
        ),
        ("gpt-j", dict(rotary_dim=None), "rotary_dim is None; it must be a whole number of at least 1"),
        ("gpt-j", dict(rotary_dim=3), "config.json: rotary_embedding is 3; it must be even"),
        ("gpt-j", dict(activation_function="silu"), "activation_function 'silu' is not supported"),
        ("phi", dict(qk_layernorm=True), "tensor layers.0.self_attn.q_layernorm.weight is missing, and 15 more"),
        ("phi", dict(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}; only None is supported"),
        ("phi", dict(eos_token_id=None), "eos_token_id is None; it must be one of the 303 token ids"),
    ],
)
def test_what_other_families_refuse(tmp_path: Path, name: str, changes: dict[str, Any], sentence: str) -> None:
    refuse(tmp_path, name, changes, sentence)


def refuse(tmp_path: Path, name: str, changes: dict[str, Any], sentence: str) -> None:
    make(tmp_path / "source", name)
    (tmp_path / "source/generation_config.json").unlink()
    edit_config(tmp_path / "source", **changes)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert sentence in str(error.value)
    assert not list(tmp_path.glob("ft/*-gpu"))
