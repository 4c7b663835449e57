"""NeMo's archives and folders: one sentence for each fault, and for each model that is not supported."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convert
from readers import SourceOptions
from tests.support.broken import EVIL_TRACE, Edit, Evil, edit_state
from tests.support.broken import NEMO_WEIGHTS as WEIGHTS
from tests.support.nemo_checkpoints import MODEL, OTHER_MODELS, TinyGPT, write_nemo

LAYER = "model.language_model.encoder.layers.1."


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
    assert not EVIL_TRACE.exists()


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_other_models_are_refused_by_name(tmp_path: Path, key: str) -> None:
    value, supported = OTHER_MODELS[key]
    source = write_nemo(tmp_path / "m", MODEL, style="core", packed="", **{key: value})
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out", 1, "fp32")
    assert str(caught.value) == f"{source}/model_config.yaml: {key} is {value!r}; supported: {supported}"


def test_options_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    source = write_nemo(tmp_path / "m.nemo", MODEL)
    with pytest.raises(ValueError, match="--num-heads is for Megatron-LM's checkpoints without arguments only"):
        convert.convert(source, tmp_path / "out", 1, "fp32", options=SourceOptions(num_heads=4))
