"""The OPT and BLOOM readers: bytes against FasterTransformer's converters, config.ini, broken checkpoints' sentences.

What all readers share (files, shards, ties, pickles) is tested through GPT-2 in test_gpt2.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert import convert
from tests.support.broken import drop, edit_config, end_token, fill, put, settings
from tests.support.checkpoints import make_bloom, make_gpt2, make_opt, save, write_weights
from tests.support.folders import cast, config_ini, weight_files
from weights.model_config import ModelConfig

TINY: dict[str, Any] = dict(vocab_size=37, layers=2, hidden=24, heads=6)
OPT = partial(make_opt, n_positions=8, **TINY)
BLOOM = partial(make_bloom, **TINY)
SMALL_EMBEDDING: dict[str, Any] = dict(do_layer_norm_before=False, word_embed_proj_dim=10)

# --- bytes: FasterTransformer's converters, written down independently of readers and weights.table ---

SPLIT_AXES = {
    "attention.query_key_value.weight": -1,
    "attention.query_key_value.bias": -1,
    "attention.dense.weight": 0,
    "mlp.dense_h_to_4h.weight": -1,
    "mlp.dense_h_to_4h.bias": -1,
    "mlp.dense_4h_to_h.weight": 0,
}


def split_files(arrays: dict[str, np.ndarray], tp: int, data_type: str) -> dict[str, bytes]:
    files = {}
    for name, array in arrays.items():
        array = cast(np.ascontiguousarray(array), data_type)
        axis = SPLIT_AXES.get(re.sub(r"layers\.\d+\.", "", name))
        if axis is None:
            files[f"model.{name}.bin"] = array.tobytes()
        else:
            parts = np.split(array, tp, axis)
            files |= {f"model.{name}.{rank}.bin": part.tobytes() for rank, part in enumerate(parts)}
    return files


def opt_files(model: transformers.OPTForCausalLM, tp: int, data_type: str) -> dict[str, bytes]:
    """huggingface_opt_convert.py, for a model with biases and layernorm weights."""
    state = {name.removeprefix("model.decoder."): tensor.float() for name, tensor in model.state_dict().items()}
    wte = head = state["embed_tokens.weight"]
    if "project_in.weight" in state:
        wte, head = wte @ state["project_in.weight"].t(), head @ state["project_out.weight"]
    arrays = {"wte": wte.numpy(), "lm_head.weight": head.numpy(), "wpe": state["embed_positions.weight"][2:].numpy()}
    for kind in ("weight", "bias"):
        if f"final_layer_norm.{kind}" in state:
            arrays[f"final_layernorm.{kind}"] = state[f"final_layer_norm.{kind}"].numpy()
        for layer in range(model.config.num_hidden_layers):
            source, target = f"layers.{layer}.", f"layers.{layer}."
            q, k, v = (state[f"{source}self_attn.{x}_proj.{kind}"].numpy().T for x in "qkv")
            arrays[f"{target}attention.query_key_value.{kind}"] = np.stack([q, k, v], axis=-2)
            for theirs, ours in (
                ("self_attn_layer_norm", "input_layernorm"),
                ("self_attn.out_proj", "attention.dense"),
                ("final_layer_norm", "post_attention_layernorm"),
                ("fc1", "mlp.dense_h_to_4h"),
                ("fc2", "mlp.dense_4h_to_h"),
            ):
                arrays[f"{target}{ours}.{kind}"] = state[f"{source}{theirs}.{kind}"].numpy().T
    return split_files(arrays, tp, data_type)


def bloom_files(model: transformers.BloomForCausalLM, tp: int, data_type: str) -> dict[str, bytes]:
    """huggingface_bloom_convert.py, for a model whose head is its embedding."""
    heads, hidden = model.config.n_head, model.config.hidden_size
    renamed = {
        "word_embeddings.weight": "wte",
        "word_embeddings_layernorm.weight": "pre_decoder_layernorm.weight",
        "word_embeddings_layernorm.bias": "pre_decoder_layernorm.bias",
        "ln_f.weight": "final_layernorm.weight",
        "ln_f.bias": "final_layernorm.bias",
    }
    arrays = {}
    for name, tensor in model.transformer.state_dict().items():
        array = tensor.float().numpy().T
        if "query_key_value" in name:  # [..., heads · 3 · head_dim] → [..., 3, heads · head_dim]
            array = array.reshape(-1, heads, 3, hidden // heads).transpose(0, 2, 1, 3).reshape(-1, 3, hidden)
            array = array[0] if name.endswith("bias") else array
        elif name == "word_embeddings.weight":
            array = array.T
        name = renamed.get(name, name.replace("h.", "layers.", 1) if name.startswith("h.") else name)
        arrays[name.replace("self_attention", "attention")] = array
    return split_files(arrays, tp, data_type)


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, bytes]]]] = {
    "opt": (OPT, opt_files),
    "opt-350m": (partial(OPT, **SMALL_EMBEDDING), opt_files),
    "bloom": (BLOOM, bloom_files),
}


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tp", [1, 2, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_fastertransformer(tmp_path: Path, family: str, tp: int, data_type: str) -> None:
    make, expected = FAMILIES[family]
    model = make(tmp_path / "hf")
    folder = convert(tmp_path / "hf", tmp_path / "out", tp, data_type)
    assert weight_files(folder) == expected(model, tp, data_type)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("format", "shards"), [("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_any_weight_files_will_do(tmp_path: Path, family: str, format: str, shards: int) -> None:
    make, expected = FAMILIES[family]
    model = make(tmp_path / "hf", format=format, shards=shards)
    assert weight_files(convert(tmp_path / "hf", tmp_path / "out", 2, "fp16")) == expected(model, 2, "fp16")


@pytest.mark.parametrize(
    ("family", "prefix", "buffer"),
    [
        ("opt", "model.decoder.", "model.decoder.version"),
        ("opt", "model.", "decoder.version"),
        ("bloom", "transformer.", "h.0.self_attention.scale_mask_softmax.causal_mask"),
    ],
)
def test_headless_checkpoint(tmp_path: Path, family: str, prefix: str, buffer: str) -> None:
    """Saved by another class than the one with the head, names lack a prefix: bigscience/bloom itself is so."""
    make, expected = FAMILIES[family]
    model = make(tmp_path / "hf")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    write_weights(tmp_path / "hf", tensors | {buffer: torch.ones(1)}, "safetensors")
    assert weight_files(convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")) == expected(model, 2, "fp32")


def test_source_in_half_precision_is_projected_in_fp32(tmp_path: Path) -> None:
    """FasterTransformer's converter loads opt-350m's fp16 weights as fp32."""
    model = OPT(tmp_path / "hf", dtype=torch.float16, **SMALL_EMBEDDING)
    folder = convert(tmp_path / "hf", tmp_path / "out", 1, "auto")
    assert weight_files(folder) == opt_files(model, 1, "fp16")


def test_opts_own_head_is_kept(tmp_path: Path) -> None:
    """FasterTransformer's converter always takes the embedding, which gives such a model other logits."""
    model = OPT(tmp_path / "hf", tied=False, **SMALL_EMBEDDING)
    folder = convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    head = model.lm_head.weight @ model.model.decoder.project_out.weight
    assert (folder / "model.lm_head.weight.bin").read_bytes() == head.detach().numpy().tobytes()


def test_opt_without_biases_or_layernorm_weights_gets_neutral_ones(tmp_path: Path) -> None:
    OPT(tmp_path / "hf", enable_bias=False, layer_norm_elementwise_affine=False)
    folder = convert(tmp_path / "hf", tmp_path / "out", 2, "fp16")
    values = {path.name: set(np.fromfile(path, np.float16).tolist()) for path in folder.glob("*.bin")}
    neutral = {name: value for name, value in values.items() if "layernorm" in name or ".bias." in name}
    assert len(neutral) == 2 + 2 * (2 * 2 + 2 * 2 + 2)  # last layernorm; a layer's two, two split biases, two whole
    assert all(value == {float("layernorm.weight" in name)} for name, value in neutral.items())
    assert ModelConfig.read(folder / "config.ini").has_post_decoder_layernorm


def test_blooms_own_head_is_kept(tmp_path: Path) -> None:
    model = BLOOM(tmp_path / "hf")
    head = torch.full((37, 24), 0.25)
    write_weights(tmp_path / "hf", dict(model.state_dict()) | {"lm_head.weight": head}, "safetensors")
    folder = convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    assert (folder / "model.lm_head.weight.bin").read_bytes() == head.numpy().tobytes()


# --- config.ini ---

SHARED = dict(head_num="6", size_per_head="4", num_layer="2", vocab_size="37", end_id="36", layernorm_eps="1e-05")
CONFIGS: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "opt": (
        OPT,
        dict(inter_size="96", max_pos_seq_len="8", start_id="2", activation_type="relu", layernorm_type="pre_layernorm")
        | dict(has_positional_encoding="1", has_pre_decoder_layernorm="0", has_post_decoder_layernorm="1"),
    ),
    "opt-350m": (
        partial(OPT, **SMALL_EMBEDDING),
        dict(layernorm_type="post_layernorm", has_post_decoder_layernorm="0"),
    ),
    "opt without last layernorm": (
        partial(OPT, _remove_final_layer_norm=True),
        dict(layernorm_type="pre_layernorm", has_post_decoder_layernorm="0"),
    ),
    "opt with exact gelu": (
        partial(OPT, activation_function="gelu"),
        dict(activation_type="gelu", gelu_form="erf"),
    ),
    "bloom": (
        BLOOM,
        dict(inter_size="96", max_pos_seq_len="2048", start_id="1", activation_type="gelu", gelu_form="tanh")
        | dict(has_positional_encoding="0", has_pre_decoder_layernorm="1", has_post_decoder_layernorm="1")
        | dict(use_attention_linear_bias="1", apply_residual_connection_post_layernorm="0"),
    ),
    "bloom with normalized residual": (
        partial(BLOOM, apply_residual_connection_post_layernorm=True),
        dict(layernorm_type="pre_layernorm", apply_residual_connection_post_layernorm="1"),
    ),
    "gpt2 with exact gelu": (
        partial(make_gpt2, n_positions=8, activation_function="gelu", with_tokenizer=False, **TINY),
        dict(activation_type="gelu", gelu_form="erf"),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_ini(tmp_path: Path, case: str) -> None:
    make, expected = CONFIGS[case]
    make(tmp_path / "hf")
    config = config_ini(convert(tmp_path / "hf", tmp_path / "out", 2, "fp32"))
    expected = SHARED | expected
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (36, None, (36,)),
        (36, 5, (5,)),
        (36, [5], (5,)),
        (36, [5, 36, 7, 5], (36, 5, 7)),  # config.json's id leads
        (36, [5, 7], (5, 7)),
        ([9, 8], None, (9, 8)),
        ([9, 8], 5, (5,)),
        ([9, 8], [8, 9], (8, 9)),
        ([9], None, (9,)),
    ],
)
def test_end_tokens(config: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    OPT(tmp_path / "hf")
    edit_config(tmp_path / "hf", eos_token_id=config)
    path = tmp_path / "hf/generation_config.json"
    path.write_text(json.dumps({} if generation is None else {"eos_token_id": generation}))
    found = ModelConfig.read(convert(tmp_path / "hf", tmp_path / "out", 1, "fp32") / "config.ini")
    assert (found.end_id, found.end_ids) == (expected[0], expected)
    real = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id
    if generation is not None:  # without one, transformers' class may have a default of its own
        assert set(expected) == set(real if isinstance(real, list) else [real])
    assert ("end_ids" in config_ini(tmp_path / "out/1-gpu")) == (len(expected) > 1)


def test_bad_end_token_of_generation_config(tmp_path: Path) -> None:
    OPT(tmp_path / "hf")
    path = tmp_path / "hf/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, None]}))
    with pytest.raises(ValueError) as caught:
        convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    assert str(caught.value) == f"{path}: eos_token_id is [3, None]; it must be one of the 37 token ids"


def test_blooms_old_names_of_sizes(tmp_path: Path) -> None:
    """bigscience's own config.json files have n_embed and num_attention_heads."""
    BLOOM(tmp_path / "hf")
    edit_config(tmp_path / "hf", hidden_size=..., n_head=..., n_embed=24, num_attention_heads=6, seq_length=512)
    config = config_ini(convert(tmp_path / "hf", tmp_path / "out", 1, "fp32"))
    assert [config[key] for key in ("head_num", "size_per_head", "max_pos_seq_len")] == ["6", "4", "512"]


def test_config_ini_of_fastertransformers_own_converter(tmp_path: Path) -> None:
    """It capitalizes activation_type and leaves max_pos_seq_len out where there are no positions."""
    convert(BLOOM(tmp_path / "hf") and tmp_path / "hf", tmp_path / "out", 1, "fp32")
    path = tmp_path / "out/1-gpu/config.ini"
    ours = ModelConfig.read(path)
    text = re.sub(r"(max_pos_seq_len|gelu_form|apply_residual\w+) = .*\n", "", path.read_text())
    path.write_text(text.replace("activation_type = gelu", "activation_type = Gelu"))
    assert ModelConfig.read(path) == ours


def test_config_ini_of_fastertransformers_opt_converter(tmp_path: Path) -> None:
    """It tells tensor_para_size by the folder's name alone."""
    OPT(tmp_path / "hf")
    path = convert(tmp_path / "hf", tmp_path / "out", 2, "fp32") / "config.ini"
    ours = ModelConfig.read(path)
    text = re.sub(
        r"(tensor_para_size|gelu_form|apply_residual\w+|has_positional\w+|use_\w+) = .*\n", "", path.read_text()
    )
    path.write_text(text.replace("activation_type = relu", "activation_type = Relu"))
    assert ModelConfig.read(path) == ours


# --- broken checkpoints ---

OPT_BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "activation": (
        settings(activation_function="silu"),
        "{hf}/config.json: activation_function 'silu' is not supported; "
        "supported: gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, relu2",
    ),
    "heads": (
        settings(num_attention_heads=5),
        "{hf}/config.json: num_attention_heads 5 does not divide hidden_size 24",
    ),
    "no truth": (
        settings(do_layer_norm_before="no"),
        "{hf}/config.json: do_layer_norm_before is 'no'; it must be true or false",
    ),
    "end token": (
        end_token([2, 37]),
        "{hf}/config.json: eos_token_id is [2, 37]; it must be one of the 37 token ids",
    ),
    "no end token": (
        end_token([]),
        "{hf}/config.json: eos_token_id is []; it must be one of the 37 token ids",
    ),
    "end token that is text": (
        end_token(["2"]),
        "{hf}/config.json: eos_token_id is ['2']; it must be one of the 37 token ids",
    ),
    "missing": (
        drop("model.decoder.layers.1.self_attn.k_proj.weight"),
        "{hf}: tensor layers.1.self_attn.k_proj.weight is missing",
    ),
    "position table": (
        settings(max_position_embeddings=10),
        "{file}: tensor model.decoder.embed_positions.weight has shape [10, 24]; config.json asks for [12, 24]",
    ),
    "projection": (
        settings(word_embed_proj_dim=10),
        "{hf}: tensor project_in.weight is missing, and 1 more",
    ),
    "no biases": (
        settings(enable_bias=False),
        "{file}: unexpected tensor model.decoder.layers.0.fc1.bias; an OPT of 2 layers has none such",
    ),
    "NaN in one of q, k, v": (
        fill("model.decoder.layers.0.self_attn.v_proj.bias", float("nan")),
        "{file}: tensor model.decoder.layers.0.self_attn.q_proj.bias or model.decoder.layers.0.self_attn.k_proj.bias "
        "or model.decoder.layers.0.self_attn.v_proj.bias holds the value nan; every weight must be finite",
    ),
}
BLOOM_BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "heads": (settings(n_head=5), "{hf}/config.json: n_head 5 does not divide hidden_size 24"),
    "size": (settings(n_layer=0), "{hf}/config.json: n_layer is 0; it must be a whole number of at least 1"),
    "missing": (
        drop("transformer.word_embeddings_layernorm.bias"),
        "{hf}: tensor word_embeddings_layernorm.bias is missing",
    ),
    "shape": (
        put("transformer.h.0.self_attention.query_key_value.weight", torch.zeros(24, 72)),
        "{file}: tensor transformer.h.0.self_attention.query_key_value.weight has shape [24, 72]; "
        "config.json asks for [72, 24]",
    ),
    "overflow": (
        fill("transformer.h.1.self_attention.query_key_value.weight", 1e6),
        "{file}: tensor transformer.h.1.self_attention.query_key_value.weight holds the value 1e+06, "
        "and fp16 ends at 65504",
    ),
    "whole numbers": (
        put("transformer.ln_f.weight", torch.zeros(24, dtype=torch.int64)),
        "{file}: tensor transformer.ln_f.weight is stored as I64; supported: fp64, fp32, fp16, bf16",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    OPT(folder / "opt")
    BLOOM(folder / "bloom")
    return folder


CASES = {f"opt: {name}": ("opt", *case) for name, case in OPT_BAD.items()}
CASES |= {f"bloom: {name}": ("bloom", *case) for name, case in BLOOM_BAD.items()}


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoint_gets_one_sentence(good: Path, tmp_path: Path, case: str) -> None:
    family, spoil, sentence = CASES[case]
    shutil.copytree(good / family, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(ValueError) as caught:
        convert(tmp_path / "hf", tmp_path / "out", 2, "fp16")
    assert str(caught.value) == sentence.format(hf=tmp_path / "hf", file=tmp_path / "hf/model.safetensors")


def test_opts_unused_positions_may_hold_anything(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "opt", tmp_path / "hf")
    fill("model.decoder.embed_positions.weight", float("nan"))(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", 2, "fp16")


def test_overflow_of_a_projected_embedding_names_both(tmp_path: Path) -> None:
    model = OPT(tmp_path / "hf", **SMALL_EMBEDDING)
    with torch.no_grad():
        model.model.decoder.project_in.weight.fill_(1e6)
        model.model.decoder.embed_tokens.weight.fill_(1)
    save(model, tmp_path / "hf")
    with pytest.raises(ValueError, match="embed_tokens.weight · model.decoder.project_in.weight holds the value 1e.07"):
        convert(tmp_path / "hf", tmp_path / "out", 1, "fp16")


def test_what_bf16_holds_and_fp16_does_not(tmp_path: Path) -> None:
    model = BLOOM(tmp_path / "hf")
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = -1e6
    save(model.bfloat16(), tmp_path / "hf")
    assert config_ini(convert(tmp_path / "hf", tmp_path / "out", 1, "auto"))["weight_data_type"] == "bf16"
    with pytest.raises(ValueError, match=r"tensor transformer.ln_f.bias holds the value -999424, and fp16 ends at"):
        convert(tmp_path / "hf", tmp_path / "out", 1, "fp16")
