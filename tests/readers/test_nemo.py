"""NeMo's archives and folders: FasterTransformer's files whatever the trained ranks, and a sentence for each fault."""

from __future__ import annotations

import configparser
import gzip
import json
import os
import re
import shutil
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
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
from readers import SourceOptions, nemo
from readers.archive import archive_files
from tests.support.engines import finish, make_engine, save_logits
from tests.support.launch import conversion_memory, first_outputs, greedy_items, run_engine, run_logits
from tests.support.nemo_checkpoints import EOS, TinyGPT, write_nemo
from weights.model_config import ModelConfig

GRIDS = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)]
MODEL = TinyGPT()
PROMPTS = [np.random.default_rng(i).integers(0, 302, 5 + 7 * i).tolist() for i in range(4)]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time of these tests would go into waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def config_ini(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(folder / "config.ini")
    return dict(parser["gpt"])


# --- bytes ---


@pytest.mark.parametrize("style", ["legacy", "core", "amp"])
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
        torch.save(torch.load(folder / WEIGHTS), folder / WEIGHTS, _use_new_zipfile_serialization=False)

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
        ours = finish(engine, [Request(ids, SamplingParams(20), 302) for ids in PROMPTS])
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


# --- broken sources ---

WEIGHTS = "model_weights.ckpt"
LAYER = "model.language_model.encoder.layers.1."
Edit = Callable[[Path], Any]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/test_nemo_was_here",)


def edit_state(edit: Callable[[dict[str, Any]], Any], path: str = WEIGHTS) -> Edit:
    def act(folder: Path) -> None:
        state = torch.load(folder / path, weights_only=False)
        edit(state)
        torch.save(state, folder / path)

    return act


def repack(act: Callable[[tarfile.TarFile, tarfile.TarInfo], Any], packed: str = "w:") -> Edit:
    """An archive of one more member, which `act` shapes."""

    def write(archive: Path) -> None:
        with tarfile.open(archive, packed) as tar:
            tar.add(archive.with_suffix(".unpacked"), arcname=".")
            act(tar, tarfile.TarInfo("extra"))

    return write


def member(**attributes: Any) -> Edit:
    def act(tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        for name, value in attributes.items():
            setattr(info, name, value)
        tar.addfile(info)

    return repack(act)


def compressed(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS) as stored:
        with zipfile.ZipFile(folder / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
            for record in stored.namelist():
                packed.writestr(record, stored.read(record))
    (folder / "packed").rename(folder / WEIGHTS)


def pax_bomb(archive: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 64 << 20
    with gzip.open(archive, "wb") as file:
        file.write(info.tobuf())
        file.write(bytes(64 << 20))


def grid(tp: int, pp: int = 1, edit: Edit = lambda folder: None, **settings: Any) -> dict[str, Any]:
    return dict(tp=tp, pp=pp, edit=edit, **settings)


def setting(**settings: Any) -> dict[str, Any]:
    return settings


def inside(edit: Edit) -> dict[str, Any]:
    return dict(edit=edit)


def outside(spoil: Edit) -> dict[str, Any]:
    return dict(spoil=spoil)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hostile pickle": (
        inside(edit_state(lambda state: state.update(evil=Evil()))),
        "{w}: refused, because its pickle asks for posix.system; a checkpoint may hold tensors and plain values only",
    ),
    "path traversal": (
        outside(member(name="a/../../evil")),
        "{a}: member 'a/../../evil' would leave the folder it is unpacked to",
    ),
    "absolute path": (
        outside(member(name="/tmp/evil")),
        "{a}: member '/tmp/evil' would leave the folder it is unpacked to",
    ),
    "symbolic link": (
        outside(member(type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "{a}: member 'extra' is a link (to '/etc/passwd'); files only",
    ),
    "hard link": (
        outside(member(type=tarfile.LNKTYPE, linkname="model_config.yaml")),
        "{a}: member 'extra' is a link (to 'model_config.yaml'); files only",
    ),
    "device": (
        outside(member(type=tarfile.CHRTYPE)),
        "{a}: member 'extra' is a device or a pipe; files only",
    ),
    "pipe": (outside(member(type=tarfile.FIFOTYPE)), "{a}: member 'extra' is a device or a pipe; files only"),
    "sparse file": (outside(member(type=tarfile.GNUTYPE_SPARSE)), "{a}: member 'extra' is no plain file; files only"),
    "file twice": (outside(member(name="./model_config.yaml")), "{a}: member 'model_config.yaml' is there twice"),
    "bomb": (
        outside(
            repack(
                lambda tar, info: [setattr(info, "size", 64 << 20), tar.addfile(info, open("/dev/zero", "rb"))], "w:gz"
            )
        ),
        "{a}: unpacks to more than {limit} bytes (20 times its size), so it is refused",
    ),
    "bomb in a header": (
        outside(pax_bomb),
        "{a}: unpacks to more than {limit} bytes (20 times its size), so it is refused",
    ),
    "truncated archive": (
        outside(lambda archive: os.truncate(archive, 100_000)),
        "{a}: member 'model_weights.ckpt' ends beyond the archive, which is cut off at 100,000 bytes",
    ),
    "truncated gzip": (
        dict(packed="w:gz", spoil=lambda archive: os.truncate(archive, 100_000)),
        "{a}: not a whole tar archive, plain or gzipped (Compressed file ended before the end-of-stream marker "
        "was reached)",
    ),
    "no archive": (
        outside(lambda archive: archive.write_text("version https://git-lfs.github.com/spec/v1\n" * 30)),
        "{a}: not a whole tar archive, plain or gzipped (invalid header)",
    ),
    "truncated weights": (
        inside(lambda folder: os.truncate(folder / WEIGHTS, 100_000)),
        "{w}: not a complete PyTorch file (File is not a zip file)",
    ),
    "compressed weights": (
        inside(compressed),
        "{w}: its record model_weights/data.pkl is compressed; not PyTorch's work",
    ),
    "no weights": (
        inside(lambda folder: (folder / WEIGHTS).unlink()),
        "{a}: no weight file of a rank (.*last\\.ckpt) is there",
    ),
    "missing shard": (
        grid(2, 2, lambda folder: shutil.rmtree(folder / "tp_rank_01_pp_rank_000")),
        "{a}: no file of tensor-parallel rank 1, pipeline-parallel rank 0, where others make it 2 × 2 ranks",
    ),
    "shards of other shapes": (
        grid(
            2,
            1,
            edit_state(
                lambda state: state.update({f"{LAYER}mlp.dense_h_to_4h.bias": torch.ones(9)}), f"mp_rank_01/{WEIGHTS}"
            ),
        ),
        "{a}: mp_rank_01/model_weights.ckpt: tensor {layer}mlp.dense_h_to_4h.bias is [9] in fp32, "
        "and [48] in fp32 on tensor-parallel rank 0",
    ),
    "shards of other layers": (
        grid(2, 1, edit_state(lambda state: state.pop(f"{LAYER}self_attention.dense.bias"), f"mp_rank_01/{WEIGHTS}")),
        "{a}: mp_rank_01/model_weights.ckpt: layers.1.attention.dense.bias is missing, "
        "and {a}: mp_rank_00/model_weights.ckpt has it",
    ),
    "trained tp": (
        grid(2, tensor_model_parallel_size=4),
        "{c}: tensor_model_parallel_size is 4; there are files of 2",
    ),
    "served tp": (
        grid(2, served_tp=3),
        "tp 3 does not divide this model's 4 heads and inter_size 96; possible: 1, 2, 4",
    ),
    "activation": (
        setting(activation="geglu"),
        "{c}: activation is 'geglu'; supported: gelu, squared-relu, swiglu, fast-swiglu",
    ),
    "gate that is not there": (
        setting(activation="fast-swiglu"),
        "{w}: tensor {layer0}mlp.dense_h_to_4h.weight has shape [96, 32]; the settings ask for [192, 32]",
    ),
    "positions": (
        setting(position_embedding_type="alibi"),
        "{c}: position_embedding_type is 'alibi'; supported: learned_absolute, rope",
    ),
    "rotary positions and a table of positions": (
        setting(position_embedding_type="rope"),
        "{w}: unexpected tensor model.language_model.embedding.position_embeddings.weight; "
        "the model of 4 layers has none such",
    ),
    "share of a head": (
        setting(position_embedding_type="rope", rotary_percentage=1.5),
        "{c}: rotary_percentage is 1.5; it must lie between 0 and 1",
    ),
    "rotary base": (
        setting(position_embedding_type="rope", rotary_base=-1),
        "{c}: rotary_base is -1; it must be a finite number above 0",
    ),
    "rotary base beyond fp64": (
        setting(position_embedding_type="rope", rotary_base=10**400),
        "{c}: rotary_base is 100000000000000000...0000000000000000000; it must be a finite number above 0",
    ),
    "odd share of a head": (
        setting(position_embedding_type="rope", rotary_percentage=0.9),
        "{c}: rotary_percentage is 0.9, which turns 7 of a head's 8 elements; that number must be even and at least 2",
    ),
    "share of nothing": (
        setting(position_embedding_type="rope", rotary_percentage=0.1),
        "{c}: rotary_percentage is 0.1, which turns 0 of a head's 8 elements; that number must be even and at least 2",
    ),
    "interleaved pairs": (
        setting(position_embedding_type="rope", rotary_interleaved=True),
        "{c}: rotary_interleaved is True; supported: False",
    ),
    "scaled positions": (
        setting(scale_positional_embedding=True),
        "{c}: scale_positional_embedding is True; supported: False",
    ),
    "normalization": (
        setting(normalization="low_precision_layernorm"),
        "{c}: normalization is 'low_precision_layernorm'; supported: layernorm, layernorm1p, rmsnorm",
    ),
    "list of normalizations": (
        setting(normalization=["rmsnorm"]),
        "{c}: normalization is ['rmsnorm']; supported: layernorm, layernorm1p, rmsnorm",
    ),
    "rmsnorm with biases": (
        setting(normalization="rmsnorm"),
        "{w}: unexpected tensor {layer0}input_layernorm.bias; the model of 4 layers has none such",
    ),
    "grouped queries": (
        setting(num_query_groups=3),
        "{c}: num_query_groups is 3; it must divide the 4 attention heads",
    ),
    "groups that are not there": (
        setting(num_query_groups=2),
        "{w}: tensor {layer0}self_attention.query_key_value.weight has shape [96, 32]; the settings ask for [64, 32]",
    ),
    "experts": (setting(num_moe_experts=8), "{c}: num_moe_experts is 8; supported: 0, 1"),
    "order of q, k, v": (setting(megatron_legacy=True), "{c}: megatron_legacy is True; supported: False"),
    "other layers": (
        setting(style="core", name="megatron_falcon_gpt"),
        "{c}: name is 'megatron_falcon_gpt'; supported: '', te_gpt, decoder_block_gpt, modelopt",
    ),
    "hyena": (setting(hyena={"return_qk": True}), "{c}: hyena is {{'return_qk': True}}; supported: None"),
    "biases of q, k, v that are not there": (
        setting(model=TinyGPT(biased=False), style="core", qkv_bias=True),
        "{w}: layers.0.attention.query_key_value.bias is missing, there and on the other ranks",
    ),
    "heads": (setting(num_attention_heads=5), "{c}: num_attention_heads 5 does not divide hidden_size 32"),
    "size": (setting(num_layers="four"), "{c}: num_layers is 'four'; it must be a whole number of at least 1"),
    "layers": (setting(num_layers=6), "{c}: num_layer is 6; the weight files hold 4"),
    "epsilon": (setting(layernorm_epsilon=0), "{c}: layernorm_epsilon is 0; it must lie between 0 and 1"),
    "no settings": (
        inside(lambda folder: (folder / "model_config.yaml").unlink()),
        "{a}: no model_config.yaml, and {w} has no hyper_parameters",
    ),
    "settings that are code": (
        inside(lambda folder: (folder / "model_config.yaml").write_text("a: !!python/object/apply:os.system [ls]")),
        "{c}: not a YAML file (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system' in \"<byte string>\", line 1, column 4: "
        "a: !!python/object/apply:os.system [ls] ^)",
    ),
    "no tokenizer file": (
        inside(lambda folder: [path.unlink() for path in folder.glob("*vocab*")]),
        "{c}: tokenizer.vocab_file is 'nemo:0123abcd_gpt2-vocab.json', and there is no such file in {a}; "
        "--tokenizer names another",
    ),
    "tokenizer of another kind": (
        setting(tokenizer={"library": "tiktoken"}),
        "{c}: tokenizer.library is 'tiktoken' with type None; supported: sentencepiece, huggingface, megatron with "
        "GPT2BPETokenizer or GPTSentencePieceTokenizer; --tokenizer names another",
    ),
    "tokenizer that is a path": (
        setting(tokenizer={"library": "huggingface", "type": "/etc"}),
        "{c}: tokenizer.type is '/etc'; a name on the Hugging Face Hub is expected",
    ),
    "no sentencepiece model": (
        dict(
            tokenizer={"library": "sentencepiece", "model": "nemo:t.model"},
            edit=lambda folder: (folder / "t.model").write_text("hello"),
        ),
        "{a}: t.model: not a sentencepiece model",
    ),
    "too many tokens": (
        dict(model=TinyGPT(vocab_size=256)),
        "{a}: 0123abcd_gpt2-vocab.json: 303 tokens; the embedding has 256 rows only",
    ),
    "missing tensor": (
        inside(edit_state(lambda state: state.pop(f"{LAYER}mlp.dense_4h_to_h.weight"))),
        "{w}: layers.1.mlp.dense_4h_to_h.weight is missing, there and on the other ranks",
    ),
    "missing layer": (
        inside(edit_state(lambda state: [state.pop(name) for name in list(state) if name.startswith(LAYER)])),
        "{w}: layer 1 is missing, and layer 3 is there",
    ),
    "foreign tensor": (
        inside(edit_state(lambda state: state.update({f"{LAYER}lora.weight": torch.ones(2)}))),
        "{w}: unexpected tensor {layer}lora.weight; it is no part of Megatron's GPT",
    ),
    "tensor of another shape": (
        inside(edit_state(lambda state: state.update({f"{LAYER}mlp.dense_4h_to_h.bias": torch.ones(2)}))),
        "{w}: tensor {layer}mlp.dense_4h_to_h.bias has shape [2]; the settings ask for [32]",
    ),
    "integers": (
        inside(edit_state(lambda state: state.update({f"{LAYER}mlp.dense_4h_to_h.bias": torch.ones(32).int()}))),
        "{w}: tensor {layer}mlp.dense_4h_to_h.bias is stored as int32; supported: fp64, fp32, fp16, bf16",
    ),
    "NaN": (
        inside(edit_state(lambda state: state[f"{LAYER}mlp.dense_h_to_4h.weight"][3].fill_(torch.nan))),
        "{w}: tensor {layer}mlp.dense_h_to_4h.weight holds the value nan; every weight must be finite",
    ),
    "infinity in one of two shards": (
        grid(
            2,
            1,
            edit_state(
                lambda state: state[f"{LAYER}mlp.dense_h_to_4h.weight"][3].fill_(-torch.inf), f"mp_rank_01/{WEIGHTS}"
            ),
        ),
        "{a}: mp_rank_00/model_weights.ckpt: tensor {layer}mlp.dense_h_to_4h.weight (of 2 shards) holds the value "
        "-inf; every weight must be finite",
    ),
    "bf16 beyond fp16": (
        dict(
            dtype=torch.bfloat16,
            edit=edit_state(lambda state: state[f"{LAYER}mlp.dense_h_to_4h.weight"][3, 5].fill_(1e5)),
        ),
        "{w}: tensor {layer}mlp.dense_h_to_4h.weight holds the value 99840, and fp16 ends at 65504",
    ),
    "distributed checkpoint of neither format": (
        inside(lambda folder: [(folder / "model_weights").mkdir(), (folder / "model_weights/common.pt").touch()]),
        "{a}: model_weights: neither .metadata (torch_dist) nor .zarray files (zarr) are there",
    ),
    "not a dict": (
        inside(lambda folder: torch.save([1], folder / WEIGHTS)),
        "{w}: holds list; a dict is expected",
    ),
    "a string among the tensors": (
        inside(edit_state(lambda state: state.update({"model.note": "hi"}))),
        "{w}: model.note is str; a tensor is expected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_source_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    what, sentence = BAD[case]
    what = dict(what)
    spoil, served_tp = what.pop("spoil", lambda archive: None), what.pop("served_tp", 2)
    archive = write_nemo(tmp_path / "m.nemo", what.pop("model", MODEL), **what)
    spoil(archive)
    arguments = [str(archive), str(tmp_path / "out"), "--tp", str(served_tp), "--weight-data-type", "fp16"]
    code = convert.main(arguments)
    expected = sentence.format(
        a=archive,
        c=f"{archive}: model_config.yaml",
        w=f"{archive}: {WEIGHTS}",
        layer=LAYER,
        layer0=LAYER.replace(".1.", ".0."),
        limit=f"{20 * archive.stat().st_size + (16 << 20):,}",
    )
    output, errors = capsys.readouterr()
    assert (code, output, errors) == (1, "", f"convert.py: {expected}\n")
    assert not any(path.name != ".convert.lock" for path in tmp_path.glob("out/*"))
    assert not Path("/tmp/test_nemo_was_here").exists()


# Variants of Megatron-core that compute something else from the same tensors: a value, and what is supported.
OTHER_MODELS: dict[str, tuple[Any, str]] = {
    "rope_type": ("yarn", "rope"),
    "no_rope_freq": (4, "None"),
    "window_size": ([128, 0], "None, [-1, -1], [-1, 0]"),
    "softmax_type": ("off-by-one", "vanilla"),
    "softmax_scale": (0.5, "None"),
    "attention_output_gate": (True, "False"),
    "experimental_attention_variant": ("gdn", "None"),
    "multi_latent_attention": (True, "False"),
    "qk_layernorm": (True, "False"),
    "qk_l2_norm": (True, "False"),
    "glu_linear_offset": (1.0, "0.0"),
    "activation_func_clamp_value": (7.0, "None"),
    "use_mup": (True, "False"),
    "heterogeneous_layers_config_path": ("layers.json", "None"),
    "virtual_pipeline_model_parallel_size": (2, "1"),
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_other_models_are_refused_by_name(tmp_path: Path, key: str) -> None:
    value, supported = OTHER_MODELS[key]
    source = write_nemo(tmp_path / "m", MODEL, style="core", packed="", **{key: value})
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out", 1, "fp32")
    assert str(caught.value) == f"{source}/model_config.yaml: {key} is {value!r}; supported: {supported}"


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


def test_options_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    source = write_nemo(tmp_path / "m.nemo", MODEL)
    with pytest.raises(ValueError, match="--num-heads is for Megatron-LM's checkpoints without arguments only"):
        convert.convert(source, tmp_path / "out", 1, "fp32", options=SourceOptions(num_heads=4))
