"""Broken GPT-2 checkpoints: one sentence each, nothing left behind, no code of theirs run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convert
from tests.support.broken import (
    EVIL_TRACE,
    Evil,
    as_bin,
    drop,
    end_token,
    fill,
    put,
    settings,
    sharded,
    truncated,
)
from tests.support.checkpoints import make_gpt2

TINY: dict[str, Any] = dict(vocab_size=37, layers=2, heads=4, hidden=16, n_positions=8, with_tokenizer=False)


SHARD = "model-00002-of-00003.safetensors"
WPE, LN = "transformer.wpe.weight", "transformer.h.1.ln_2.bias"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "{hf}: no config.json (Hugging Face), model_config.yaml (NeMo), context/model.yaml (NeMo 2), "
        "run_config.yaml (Megatron-Bridge) or files of ranks (Megatron-LM), so this is not a checkpoint",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{'a': 1}"),
        "{hf}/config.json: not a JSON file (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
    ),
    "architecture": (
        settings(model_type="mamba"),
        "{hf}/config.json: architecture 'mamba' is not supported; supported: bloom, gpt2, "
        "gpt_neox, gptj, llama, mistral, nemotron, opt, phi, qwen2, qwen3",
    ),
    "activation": (
        settings(activation_function="silu"),
        "{hf}/config.json: activation_function 'silu' is not supported; "
        "supported: gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, relu2",
    ),
    "inverse layer index": (
        settings(scale_attn_by_inverse_layer_idx=True),
        "{hf}/config.json: scale_attn_by_inverse_layer_idx is True; only False is supported",
    ),
    "unscaled attention": (
        settings(scale_attn_weights=False),
        "{hf}/config.json: scale_attn_weights is False; only True is supported",
    ),
    "cross-attention": (
        settings(add_cross_attention=True),
        "{hf}/config.json: add_cross_attention is True; only False is supported",
    ),
    "heads": (settings(n_head=3), "{hf}/config.json: n_head 3 does not divide n_embd 16"),
    "size": (settings(n_layer="2"), "{hf}/config.json: n_layer is '2'; it must be a whole number of at least 1"),
    "epsilon": (
        settings(layer_norm_epsilon=0),
        "{hf}/config.json: layer_norm_epsilon is 0; it must lie between 0 and 1",
    ),
    "end token": (
        end_token(50256),
        "{hf}/config.json: eos_token_id is 50256; it must be one of the 37 token ids",
    ),
    "no end token": (
        end_token(None),
        "{hf}/config.json: eos_token_id is None; it must be one of the 37 token ids",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "{hf}: neither model.safetensors nor pytorch_model.bin (whole or with an index) is there",
    ),
    "tensor missing": (drop(WPE), "{hf}: tensor wpe.weight is missing"),
    "tensors missing": (drop(LN, WPE), "{hf}: tensor h.1.ln_2.bias is missing, and 1 more"),
    "head missing": (settings(tie_word_embeddings=False), "{hf}: tensor lm_head.weight is missing"),
    "unexpected tensor": (
        put("score.weight", torch.zeros(2, 16)),
        "{file}: unexpected tensor score.weight; a GPT-2 of 2 layers has none such",
    ),
    "too many layers": (
        settings(n_layer=1),
        "{file}: unexpected tensor transformer.h.1.attn.c_attn.bias; a GPT-2 of 1 layers has none such",
    ),
    "both prefixes": (put("wpe.weight", torch.zeros(8, 16)), "{file}: holds both " + WPE + " and wpe.weight"),
    "shape": (
        settings(vocab_size=40),
        "{file}: tensor transformer.wte.weight has shape [37, 16]; config.json asks for [40, 16]",
    ),
    "whole numbers": (
        put(WPE, torch.zeros(8, 16, dtype=torch.int8)),
        "{file}: tensor " + WPE + " is stored as I8; supported: fp64, fp32, fp16, bf16",
    ),
    "NaN": (fill(LN, float("nan")), "{file}: tensor " + LN + " holds the value nan; every weight must be finite"),
    "infinity": (
        fill("transformer.h.0.mlp.c_fc.weight", float("-inf")),
        "{file}: tensor transformer.h.0.mlp.c_fc.weight holds the value -inf; every weight must be finite",
    ),
    "overflow": (fill(WPE, -70000), "{file}: tensor " + WPE + " holds the value -70000, and fp16 ends at 65504"),
    "truncated": (
        truncated,
        "{file}: not a complete safetensors file "
        "(Error while deserializing header: incomplete metadata, file not fully covered)",
    ),
    "empty": (
        lambda folder: os.truncate(folder / "model.safetensors", 0),
        "{file}: not a complete safetensors file (Error while deserializing header: header too small)",
    ),
    "no shard": (
        sharded(lambda folder, weight_map: (folder / SHARD).unlink()),
        "{index}: names " + SHARD + ", and there is no such file",
    ),
    "shard elsewhere": (
        sharded(lambda folder, weight_map: weight_map.update({WPE: "../model.safetensors"})),
        "{index}: tensor " + WPE + " is in '../model.safetensors'; a file of the same folder is expected",
    ),
    "wrong shard": (
        sharded(lambda folder, weight_map: weight_map.update({WPE: SHARD})),
        "{hf}/" + SHARD + ": tensor " + WPE + ", which the index places here, is missing",
    ),
    "empty index": (sharded(lambda folder, weight_map: weight_map.clear()), "{index}: no weight_map"),
    "pickle that runs code": (
        as_bin(lambda tensors: tensors | {"x": Evil()}),
        "{bin}: refused, because its pickle asks for posix.system; a .bin file may hold tensors only",
    ),
    "pickled model": (
        as_bin(lambda tensors: torch.nn.Linear(2, 2)),
        "{bin}: refused, because its pickle asks for torch.nn.modules.linear.Linear; a .bin file may hold tensors only",
    ),
    "pickled list": (as_bin([1, 2]), "{bin}: holds list; a dict of tensors is expected"),
    "nested dict": (
        as_bin(lambda tensors: {"model": tensors}),
        "{bin}: model is dict; a dict of tensors is expected",
    ),
    "truncated .bin": (
        as_bin(lambda tensors: tensors, cut=100),
        "{bin}: not a complete PyTorch file (",
    ),
    ".bin of text": (
        lambda folder: [
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ],
        "{bin}: not a readable PyTorch file (Unsupported operand 118)",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_gpt2(folder, **TINY)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint_gets_one_sentence(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, sentence = BAD[case]
    shutil.copytree(good, tmp_path / "hf")
    spoil(tmp_path / "hf")
    code = convert.main([str(tmp_path / "hf"), str(tmp_path / "out"), "--tp", "2", "--weight-data-type", "fp16"])
    hf = f"{tmp_path}/hf"
    names = dict(hf=hf, file=f"{hf}/model.safetensors", bin=f"{hf}/pytorch_model.bin")
    expected = sentence.format(**names, index=f"{hf}/model.safetensors.index.json")
    output, errors = capsys.readouterr()
    if expected.endswith("("):  # the rest is PyTorch's, and depends on where the file was cut
        expected += errors.rpartition(" (")[2].rstrip("\n")
    assert (code, output, errors) == (1, "", f"convert.py: {expected}\n")
    assert not any(path.name != ".convert.lock" for path in tmp_path.glob("out/*"))
    assert not EVIL_TRACE.exists()


def test_what_fp16_cannot_hold_fits_bf16(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "hf")
    fill(WPE, -70000)(tmp_path / "hf")
    folder = convert.convert(tmp_path / "hf", tmp_path, 2, "bf16")
    assert np.fromfile(folder / "model.wpe.bin", np.uint16)[3] == 0xC789  # -70144
