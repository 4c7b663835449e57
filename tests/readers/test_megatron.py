"""Megatron-LM's folders of every version: FasterTransformer's files, and a sentence for each fault."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import convert
from readers import SourceOptions
from tests.support.broken import EVIL_TRACE, Edit, Evil, edit_content
from tests.support.broken import MEGATRON_FILE as FILE
from tests.support.broken import MEGATRON_ITERATION as ITERATION
from tests.support.folders import config_ini, weight_files
from tests.support.nemo_checkpoints import EOS, GRIDS, MODEL, OTHER_MODELS, TinyGPT, nemo_names, write_megatron

# --- bytes ---


@pytest.mark.parametrize(
    "version", [1.0, pytest.param(2.0, marks=pytest.mark.slow("a second each; the oldest and the newest stay")), 3.0]
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_files_depend_on_the_served_tp_only(tmp_path: Path, grid: tuple[int, int], version: float) -> None:
    """`reshape` of a wrong order gives another model and no error: each version's rows are ordered differently."""
    source = write_megatron(tmp_path / "m", MODEL, version, *grid, naming="tp" if version == 2.0 else "mp")
    for tp in (1, 2, 4):
        assert weight_files(convert.convert(source, tmp_path / "out", tp, "auto")) == MODEL.files(tp)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (4, 1)], ids=str)
def test_version_0_without_arguments(tmp_path: Path, grid: tuple[int, int]) -> None:
    """The public 345M model: a release of before PyTorch 1.6 that says nothing of itself."""
    source = write_megatron(
        tmp_path / "m", MODEL, 0, *grid, iteration="release", with_args=False, zipped=grid != (1, 1)
    )
    for tp in (1, 2, 4):
        folder = convert.convert(source, tmp_path / "out", tp, "auto", options=SourceOptions(num_heads=4))
        assert weight_files(folder) == MODEL.files(tp)
    expected = dict(head_num="4", size_per_head="8", inter_size="96", num_layer="4", max_pos_seq_len="64")
    expected |= dict(vocab_size="320", start_id="302", end_id="302", layernorm_eps="1e-05", gelu_form="tanh")
    config = config_ini(folder)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("grid", [(2, 1), (2, 2)], ids=str)
def test_head_of_its_own(tmp_path: Path, grid: tuple[int, int]) -> None:
    model = TinyGPT(tied=False)
    source = write_megatron(tmp_path / "m", model, 3.0, *grid, untie_embeddings_and_output_weights=True)
    assert weight_files(convert.convert(source, tmp_path / "out", 4, "fp32")) == model.files(4)


def test_names_of_megatron_core(tmp_path: Path) -> None:
    """Megatron-LM since 2023 stores core's flat names, in files of the same format and version."""
    source = write_megatron(tmp_path / "m", MODEL, 3.0, 2, 2)
    for pp_rank in range(2):
        for tp_rank in range(2):
            path = source / ITERATION / f"mp_rank_{tp_rank:02d}_{pp_rank:03d}" / FILE
            content = torch.load(path, weights_only=False)
            state = nemo_names(MODEL.shard(2, 2, tp_rank, pp_rank), "core")
            content["model"] = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            torch.save(content, path)
    assert weight_files(convert.convert(source, tmp_path / "out", 4, "fp32")) == MODEL.files(4)


def test_one_iteration_or_its_folder_is_a_source_too(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "m", MODEL)
    folder = source / ITERATION
    assert weight_files(convert.convert(folder, tmp_path / "a", 2, "fp32")) == MODEL.files(2)
    (source / "latest_checkpointed_iteration.txt").unlink()
    assert weight_files(convert.convert(source, tmp_path / "b", 2, "fp32")) == MODEL.files(2)


# --- config.ini, tokenizer ---


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({}, "tanh"),
        ({"bias_gelu_fusion": False}, "erf"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "tanh"),
        ({"bias_gelu_fusion": ...}, "erf"),  # before fusion, with arguments: torch's gelu
    ],
)
def test_form_of_gelu(tmp_path: Path, settings: dict[str, Any], form: str) -> None:
    source = write_megatron(tmp_path / "m", MODEL, edit=arguments(**settings))
    assert config_ini(convert.convert(source, tmp_path / "out", 1, "fp32"))["gelu_form"] == form


def test_tokenizer_beside_and_by_option(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "m", MODEL)
    folder = convert.convert(source, tmp_path / "out", 1, "fp32")
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == EOS
    (tmp_path / "gpt2").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (source / name).rename(tmp_path / "gpt2" / f"gpt2-{name}")
    arguments = [str(source), str(tmp_path / "other"), "--tokenizer", str(tmp_path / "gpt2")]
    assert convert.main(arguments) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "other/1-gpu")
    assert tokenizer.decode(tokenizer("Thank you!").input_ids) == "Thank you!"


# --- broken sources ---


def arguments(**values: Any) -> Edit:
    """Change the training arguments; `...` removes one."""

    def edit(content: dict[str, Any]) -> None:
        old = vars(content["args"]) | values
        content["args"] = argparse.Namespace(**{name: value for name, value in old.items() if value is not ...})

    return edit_content(edit)


class Unknown:
    """A class of the trainer's that no table names."""


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hostile pickle": (
        dict(edit=edit_content(lambda content: content.update(optimizer=Evil()))),
        "{f}: refused, because its pickle asks for posix.system; a checkpoint may hold tensors and plain values only",
    ),
    "unknown class": (
        dict(edit=edit_content(lambda content: content.update(optimizer=Unknown()))),
        "{f}: refused, because its pickle asks for tests.readers.test_megatron.Unknown; "
        "a checkpoint may hold tensors and plain values only",
    ),
    "no arguments": (
        dict(version=0, with_args=False),
        "{f}: no training arguments; --num-heads gives the heads",
    ),
    "version": (
        dict(edit=edit_content(lambda content: content.update(checkpoint_version=4.0))),
        "{f}: checkpoint_version is 4.0; supported: 0, 1.0, 2.0, 3.0",
    ),
    "interleaved pipeline": (
        dict(edit=edit_content(lambda content: content.update(model0=content.pop("model")))),
        "{f}: a checkpoint of an interleaved pipeline; only a single `model` is supported",
    ),
    "trained tp": (
        dict(tp=2, edit=arguments(tensor_model_parallel_size=4)),
        "{f}: args: tensor_model_parallel_size is 4; there are files of 2",
    ),
    "missing shard": (
        dict(tp=2, pp=2, edit=lambda folder: shutil.rmtree(folder / ITERATION / "mp_rank_00_001")),
        "{i}: no file of tensor-parallel rank 0, pipeline-parallel rank 1, where others make it 2 × 2 ranks",
    ),
    "shards of two iterations": (
        dict(tp=2, edit=edit_content(lambda content: content.update(iteration=400), "mp_rank_01")),
        "{i}/mp_rank_01/model_optim_rng.pt: iteration is 400, and 500 in {f}",
    ),
    "iteration that is not there": (
        dict(edit=lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("600")),
        "{s}/latest_checkpointed_iteration.txt: names iter_0000600, and there is no such folder",
    ),
    "iteration that is a path": (
        dict(edit=lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("../../etc")),
        "{s}/latest_checkpointed_iteration.txt: '../../etc'; the number of an iteration or 'release' is expected",
    ),
    "distributed checkpoint that says nothing": (
        dict(edit=lambda folder: (folder / ITERATION / "metadata.json").touch()),
        "{i}/metadata.json: not a JSON file (Expecting value: line 1 column 1 (char 0))",
    ),
    "version that is a list": (
        dict(edit=edit_content(lambda content: content.update(checkpoint_version=[3.0]))),
        "{f}: checkpoint_version is [3.0]; supported: 0, 1.0, 2.0, 3.0",
    ),
    "biases of q, k, v that are not there": (
        dict(model=TinyGPT(biased=False), add_bias_linear=False, add_qkv_bias=True),
        "{f}: layers.0.attention.query_key_value.bias is missing, there and on the other ranks",
    ),
    "quick gelu": (dict(quick_geglu=True), "{f}: args: quick_geglu is True; supported: False"),
    "positions": (
        dict(position_embedding_type="mrope"),
        "{f}: args: position_embedding_type is 'mrope'; supported: learned_absolute, rope",
    ),
    "scaled positions": (
        dict(position_embedding_type="rope", use_rope_scaling=True),
        "{f}: args: use_rope_scaling is True; supported: False",
    ),
    "normalization": (
        dict(normalization="L2Norm"),
        "{f}: args: normalization is 'L2Norm'; supported: LayerNorm, RMSNorm",
    ),
    "grouped queries": (
        dict(group_query_attention=True, num_query_groups=3),
        "{f}: args: num_query_groups is 3; it must divide the 4 attention heads",
    ),
    "no tokenizer": (
        dict(edit=lambda folder: (folder / "merges.txt").unlink()),
        "{s}: no tokenizer beside the checkpoint (vocab.json and merges.txt, tokenizer.model or tokenizer.json); "
        "--tokenizer names one",
    ),
    "tokenizer of another model": (
        dict(edit=lambda folder: (folder / "vocab.json").write_text('{"a": 1}')),
        "{s}/merges.txt: not the merges of {s}/vocab.json (Error while initializing BPE: Token `Ġ` out of vocabulary)",
    ),
    "truncated": (
        dict(edit=lambda folder: (folder / ITERATION / "mp_rank_00" / FILE).write_bytes(b"PK\3\4" + bytes(99))),
        "{f}: not a complete PyTorch file (File is not a zip file)",
    ),
    "NaN": (
        dict(
            edit=edit_content(
                lambda c: c["model"]["language_model"]["encoder"]["final_layernorm.bias"].fill_(torch.nan)
            )
        ),
        "{f}: tensor language_model.encoder.final_layernorm.bias holds the value nan; every weight must be finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_source_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    what, sentence = BAD[case]
    what = dict(what)
    source = write_megatron(tmp_path / "m", what.pop("model", MODEL), **what)
    code = convert.main([str(source), str(tmp_path / "out"), "--tp", "2"])
    iteration = source / ITERATION
    expected = sentence.format(s=source, i=iteration, f=iteration / "mp_rank_00" / FILE)
    output, errors = capsys.readouterr()
    assert (code, output, errors) == (1, "", f"convert.py: {expected}\n")
    assert not any(path.name != ".convert.lock" for path in tmp_path.glob("out/*"))
    assert not EVIL_TRACE.exists()


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_other_models_are_refused_by_name(tmp_path: Path, key: str) -> None:
    value, supported = OTHER_MODELS[key]
    source = write_megatron(tmp_path / "m", MODEL, **{key: value})
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out", 1, "fp32")
    file = source / ITERATION / "mp_rank_00" / FILE
    assert str(caught.value) == f"{file}: args: {key} is {value!r}; supported: {supported}"


@pytest.mark.parametrize(
    "settings",
    [
        *({"window_size": window} for window in ((-1, -1), (-1, 0))),
        {"num_experts": 0},
        {"rope_type": None, "softmax_type": "vanilla", "glu_linear_offset": 0.0, "use_mup": False},
    ],
    ids=str,
)
def test_arguments_that_change_nothing_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = write_megatron(tmp_path / "m", MODEL, **settings)
    assert weight_files(convert.convert(source, tmp_path / "out", 1, "fp32")) == MODEL.files(1)


def test_heads_that_contradict_the_arguments(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "m", MODEL)
    with pytest.raises(ValueError, match="num_attention_heads is 4, and --num-heads is 8"):
        convert.convert(source, tmp_path / "out", 1, "fp32", options=SourceOptions(num_heads=8))
