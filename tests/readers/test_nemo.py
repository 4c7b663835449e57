"""NeMo's archives and folders: FasterTransformer's files and the reference's tokens, on any number of trained ranks."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import convert
from engine.config import ParallelConfig
from engine.request import Request, SamplingParams
from readers import nemo
from readers.archive import archive_files
from tests.support.broken import NEMO_WEIGHTS
from tests.support.engines import finish, make_engine, save_logits
from tests.support.folders import config_ini, weight_files
from tests.support.launch import conversion_memory
from tests.support.nemo_checkpoints import EOS, GRIDS, MODEL, TinyGPT, write_nemo
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

PROMPTS = [np.random.default_rng(i).integers(0, 302, 5 + 7 * i).tolist() for i in range(4)]


# --- bytes ---


@pytest.mark.parametrize("style", ["legacy", "core", pytest.param("amp", marks=pytest.mark.slow("two styles stay"))])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_files_depend_on_the_served_tp_only(tmp_path: Path, grid: tuple[int, int], style: str) -> None:
    source = write_nemo(tmp_path / "m.nemo", MODEL, *grid, style=style)
    for tp in (1, 2, 4):
        folder = convert.convert(source, tmp_path / "out", tp, "auto")
        assert weight_files(folder) == MODEL.files(tp)


@pytest.mark.parametrize("packed", ["w:gz", ""])
def test_gzipped_archive_and_unpacked_folder(tmp_path: Path, packed: str) -> None:
    source = write_nemo(tmp_path / ("m.nemo" if packed else "m"), MODEL, 2, 2, packed=packed)
    assert weight_files(convert.convert(source, tmp_path / "out", 4, "fp32")) == MODEL.files(4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".convert.lock", "4-gpu"]


def test_unpacked_files_have_no_names(tmp_path: Path) -> None:
    """A file without a name is gone with the process that made it, however that ends."""
    source = write_nemo(tmp_path / "m.nemo", MODEL, packed="w:gz")
    (tmp_path / "scratch").mkdir()
    places = archive_files(source, tmp_path / "scratch")
    assert places["model_config.yaml"].read().startswith(b"activation: gelu")
    assert not any((tmp_path / "scratch").iterdir())


def test_gzipped_archive_that_does_not_fit_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_nemo(tmp_path / "m.nemo", MODEL, packed="w:gz")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100_000))
    assert convert.main([str(source), str(tmp_path / "out")]) == 1
    size = (tmp_path / "m.unpacked/model_weights.ckpt").stat().st_size
    assert capsys.readouterr().err == (
        f"convert.py: {tmp_path}: {source}: model_weights.ckpt takes {size:,} bytes, and 100,000 are free\n"
    )
    assert not (tmp_path / "out").exists()


def test_weights_from_before_pytorch_1_6_in_an_archive(tmp_path: Path) -> None:
    def as_old(folder: Path) -> None:
        torch.save(torch.load(folder / NEMO_WEIGHTS), folder / NEMO_WEIGHTS, _use_new_zipfile_serialization=False)

    source = write_nemo(tmp_path / "m.nemo", MODEL, edit=as_old)
    assert weight_files(convert.convert(source, tmp_path / "out", 2, "fp32")) == MODEL.files(2)


def test_folder_with_one_archive(tmp_path: Path) -> None:
    """As the Hub's repositories of NeMo models are."""
    write_nemo(tmp_path / "hub/m.nemo", MODEL)
    shutil.rmtree(tmp_path / "hub/m.unpacked")
    assert weight_files(convert.convert(tmp_path / "hub", tmp_path / "out", 2, "fp32")) == MODEL.files(2)


@pytest.mark.parametrize(("stored", "auto"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_half_precision(tmp_path: Path, stored: torch.dtype, auto: str) -> None:
    source = write_nemo(tmp_path / "m.nemo", MODEL, 2, 1, dtype=stored)
    rounded = TinyGPT()
    rounded.weights.update({name: tensor.to(stored).float() for name, tensor in MODEL.weights.items()})
    assert weight_files(convert.convert(source, tmp_path / "fp16", 4, "fp16")) == rounded.files(4, np.float16)
    folder = convert.convert(source, tmp_path / "out", 1, "auto")
    assert config_ini(folder)["weight_data_type"] == auto
    wte = torch.from_file(str(folder / "model.wte.bin"), size=320 * 32, dtype=stored)
    assert torch.equal(wte.float(), rounded.weights["wte"].flatten())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("style", ["legacy", "core"])
def test_head_of_its_own(tmp_path: Path, grid: tuple[int, int], style: str) -> None:
    model = TinyGPT(tied=False)
    folder = convert.convert(write_nemo(tmp_path / "m.nemo", model, *grid, style=style), tmp_path / "out", 2, "fp32")
    assert weight_files(folder) == model.files(2)
    assert (folder / "model.lm_head.weight.bin").exists()


def test_layernorm1p_is_stored_less_one(tmp_path: Path) -> None:
    """FasterTransformer's converter writes these as they are, and its engine computes something else."""
    stored = TinyGPT()
    norms = [name for name in stored.weights if re.search(r"(ln1|ln2|ln_f)\.weight", name)]
    stored.weights.update({name: MODEL.weights[name] - 1 for name in norms})
    source = write_nemo(tmp_path / "m.nemo", stored, 2, 1, normalization="layernorm1p")
    written = TinyGPT()
    written.weights.update({name: stored.weights[name] + 1 for name in norms})
    assert weight_files(convert.convert(source, tmp_path / "out", 2, "fp32")) == written.files(2)


def test_biases_that_are_not_there_are_zero(tmp_path: Path) -> None:
    model = TinyGPT(biased=False, gelu="erf")
    source = write_nemo(tmp_path / "m.nemo", model, 2, 1, bias_activation_fusion=True)
    folder = convert.convert(source, tmp_path / "out", 2, "fp32")
    files = {name: data.replace(b"\0\0\0\x80", bytes(4)) for name, data in model.files(2).items()}  # -0.0
    assert weight_files(folder) == files
    assert config_ini(folder)["gelu_form"] == "erf"


class Omega:
    """Pickles as OmegaConf's nodes do, without OmegaConf."""


def omega(content: Any) -> Any:
    """An OmegaConf tree of a dict, as Lightning stores it in hyper_parameters."""
    name, state = "AnyNode", {"_val": content}
    if isinstance(content, dict):
        name, state = "DictConfig", {"_content": {key: omega(value) for key, value in content.items()}}
    module = f"omegaconf.{'dictconfig' if name == 'DictConfig' else 'nodes'}"
    sys.modules.setdefault("omegaconf", types.ModuleType("omegaconf"))
    fake = sys.modules.setdefault(module, types.ModuleType(module))
    if not hasattr(fake, name):
        setattr(fake, name, type(name, (Omega,), {"__module__": module}))
    node = getattr(fake, name)()
    node.__dict__.update(state, _parent=None, _metadata={"ref_type": int})
    return node


def test_lightning_checkpoint_brings_its_settings(tmp_path: Path) -> None:
    def as_lightning(folder: Path) -> None:
        config = yaml.safe_load((folder / "model_config.yaml").read_text())
        (folder / "model_config.yaml").unlink()
        for rank in range(2):
            path = folder / f"mp_rank_{rank:02d}/model_weights.ckpt"
            content = {"state_dict": torch.load(path), "hyper_parameters": {"cfg": omega(config)}, "epoch": 1}
            torch.save(content, path.with_name("megatron_gpt-last.ckpt"))
            path.unlink()

    try:
        source = write_nemo(tmp_path / "m", MODEL, 2, 1, packed="", edit=as_lightning)
    finally:
        for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.nodes"):
            sys.modules.pop(name, None)
    assert weight_files(convert.convert(source, tmp_path / "out", 4, "fp32")) == MODEL.files(4)


def test_finished_folder_is_kept_without_a_look_into_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that starts again must not unpack 40 GB first."""
    source = write_nemo(tmp_path / "m.nemo", MODEL, packed="w:gz")
    folder = convert.convert(source, tmp_path / "out", 2, "fp32")
    monkeypatch.setattr(nemo, "archive_files", None)
    assert convert.convert(source, tmp_path / "out", 2, "fp32") == folder


def test_ranks_that_drifted_apart_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def drift(folder: Path) -> None:
        path = folder / "mp_rank_01/model_weights.ckpt"
        state = torch.load(path)
        state["model.language_model.encoder.layers.1.input_layernorm.weight"] += 0.25
        torch.save(state, path)

    source = write_nemo(tmp_path / "m.nemo", MODEL, 2, 1, edit=drift)
    assert weight_files(convert.convert(source, tmp_path / "out", 2, "fp32")) == MODEL.files(2)
    assert caplog.messages == [
        f"{source}: mp_rank_01/model_weights.ckpt: model.language_model.encoder.layers.1.input_layernorm.weight "
        "differs by up to 0.25 from tensor-parallel rank 0's, which is taken"
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    model = TinyGPT(heads=8, head_dim=64, layers=24, vocab_size=8000, inter=2048)
    source = write_nemo(tmp_path / "m.nemo", model, 4, 1, dtype=torch.float32)
    assert source.stat().st_size > 310e6
    shutil.rmtree(tmp_path / "m.unpacked")
    # MiB: mapped pages of up to 64 + 16, a weight of 16, chunks, what torch needs
    assert conversion_memory(source, tmp_path / "out", 1) < 200
    shutil.rmtree(tmp_path)


# --- config.ini, tokenizers ---


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({}, "tanh"),
        ({"bias_activation_fusion": False}, "erf"),
        ({"bias_activation_fusion": False, "openai_gelu": True}, "tanh"),
    ],
)
def test_config_ini(tmp_path: Path, settings: dict[str, Any], form: str) -> None:
    """NeMo's fused bias and gelu, its default, is the tanh form; without fusion `gelu` is exact."""
    source = write_nemo(tmp_path / "parrot.nemo", TinyGPT(eps=1e-3), 2, 2, **settings)
    config = ModelConfig.read(convert.convert(source, tmp_path / "out", 2, "fp32") / "config.ini")
    assert config == ModelConfig(
        model_name="parrot.nemo",
        head_num=4,
        size_per_head=8,
        inter_size=96,
        num_layer=4,
        max_pos_seq_len=64,
        vocab_size=320,
        start_id=302,
        end_id=302,
        tensor_para_size=2,
        layernorm_eps=1e-3,
        gelu_form=form,
    )


def test_gpt2_tokenizer_works_from_the_folder(tmp_path: Path) -> None:
    folder = convert.convert(write_nemo(tmp_path / "m.nemo", MODEL), tmp_path / "out", 1, "fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "Thank you for the tea! é\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token) == (302, 302, EOS)
    assert json.loads((folder / "vocab.json").read_text())[EOS] == 302
    assert (folder / "merges.txt").exists()


def test_special_tokens_come_after_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = yaml.safe_load((write_nemo(tmp_path / "a", MODEL, packed="") / "model_config.yaml").read_text())[
        "tokenizer"
    ]
    special = {"eos_token": "<eot>", "additional_special_tokens": ["<a>", EOS]}
    source = write_nemo(tmp_path / "m.nemo", MODEL, tokenizer=tokenizer | {"special_tokens": special})
    folder = convert.convert(source, tmp_path / "out", 1, "fp32")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_tokens_to_ids(["<eot>", "<a>", EOS]) == [303, 304, 302]
    assert (config_ini(folder)["start_id"], config_ini(folder)["end_id"]) == ("302", "303")


def test_tokenizer_by_its_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_nemo(tmp_path / "m.nemo", MODEL, tokenizer={"library": "huggingface", "type": "me/parrot"})
    named = convert.convert(write_nemo(tmp_path / "other.nemo", MODEL), tmp_path / "other", 1, "fp32")
    real, asked = transformers.AutoTokenizer.from_pretrained, []

    def from_hub(name: str, **settings: Any) -> Any:
        asked.append((name, settings))
        return real(named)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_hub)
    folder = convert.convert(source, tmp_path / "out", 1, "fp32")
    assert asked == [("me/parrot", {"trust_remote_code": False})]
    assert real(folder).eos_token_id == 302


def test_tokenizer_that_the_hub_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(name: str, **settings: Any) -> None:
        raise OSError("no\nroute")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", out_of_reach)
    source = write_nemo(tmp_path / "m.nemo", MODEL, tokenizer={"library": "huggingface", "type": "me/parrot"})
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out", 1, "fp32")
    assert str(caught.value) == (
        f"{source}: model_config.yaml: tokenizer.type is 'me/parrot', which cannot be had from the Hub (no route); "
        "--tokenizer names another"
    )


# --- the engine ---


def test_greedy_tokens_and_logits_are_the_references(tmp_path: Path) -> None:
    for form in ("tanh", "erf"):
        model = TinyGPT(gelu=form)
        folder = convert.convert(write_nemo(tmp_path / f"{form}.nemo", model, 2, 2), tmp_path / form, 1, "fp32")
        engine = make_engine(folder, max_batch_size=9, max_step_tokens=24, block_size=4)
        ours = finish(engine, [Request(ids, SamplingParams(20), (302,)) for ids in PROMPTS])
        assert ours == [model.greedy(ids, 20) for ids in PROMPTS]
        save_logits(engine.executor, ParallelConfig(), PROMPTS, tmp_path / "logits.npy")
        assert_close(np.load(tmp_path / "logits.npy"), model)


@pytest.mark.parametrize("pp", [1, 2])
def test_greedy_tokens_and_logits_over_ranks(tmp_path: Path, pp: int) -> None:
    model = TinyGPT(gelu="erf", tied=False)
    folder = convert.convert(write_nemo(tmp_path / "m.nemo", model, 4, 1, style="core"), tmp_path / "out", 2, "fp32")
    results = run_engine(folder, greedy_items(PROMPTS, 20), 2, pp)
    assert first_outputs(results) == [model.greedy(ids, 20) for ids in PROMPTS]
    if pp == 2:
        assert_close(run_logits(folder, PROMPTS, 2, pp), model)


def assert_close(logits: np.ndarray, model: TinyGPT) -> None:
    for row, ids in zip(logits, PROMPTS, strict=True):
        expected = model.logits(ids).numpy()
        assert np.linalg.norm(row[:320] - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "settings",
    [
        *({"window_size": window} for window in ([-1, -1], [-1, 0])),
        *({"name": name} for name in ("", "te_gpt", "modelopt")),
        {"num_moe_experts": 0},
        {"megatron_legacy": True},  # which Megatron-core does not know
        {"rope_type": "rope", "softmax_type": "vanilla", "softmax_scale": None, "glu_linear_offset": 0},
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = write_nemo(tmp_path / "m", MODEL, style="core", packed="", **settings)
    assert weight_files(convert.convert(source, tmp_path / "out", 1, "fp32")) == MODEL.files(1)
