"""NeMo 2's and Megatron-Bridge's folders: the tokenizer, wherever it lies, and its end tokens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from convert import convert
from readers import SourceOptions
from tests.support.core_checkpoints import NEMO_CLASSES, write_bridge, write_nemo2
from tests.support.nemo_checkpoints import TinyGPT, write_bpe
from weights.model_config import ModelConfig

TINY = TinyGPT()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def ids_of(folder: Path) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder).encode("the tea")


@pytest.mark.parametrize("write", [write_nemo2, write_bridge])
def test_the_checkpoints_tokenizer(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = convert(write(tmp_path / "source", TINY), tmp_path / "ft", 1, "fp32")
    write_bpe(tmp_path / "bpe", TINY.num_tokens)
    options = SourceOptions(tokenizer=tmp_path / "bpe")
    other = convert(tmp_path / "source", tmp_path / "other", 1, "fp32", options=options)
    assert ids_of(folder) == ids_of(other)
    config = ModelConfig.read(folder / "config.ini")
    assert (config.end_id, config.vocab_size) == (302, 320)


def edit_yaml(path: Path, **values: Any) -> None:
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | values))


@pytest.mark.parametrize("tokenizer", [None, {"pretrained_model_name": "/training/nemo_tokenizer"}])
def test_nemo_2s_tokenizer_under_another_path(tokenizer: Any, tmp_path: Path) -> None:
    source = write_nemo2(tmp_path / "source", TINY)
    if tokenizer is not None:
        tokenizer |= {"_target_": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"}
    edit_yaml(source / "context/model.yaml", tokenizer=tokenizer)
    assert ids_of(convert(source, tmp_path / "ft", 1, "fp32"))


def test_nemo_2s_special_tokens_and_bpe_files(tmp_path: Path) -> None:
    source = write_nemo2(tmp_path / "source", TINY)
    shutil.rmtree(source / "context/nemo_tokenizer")
    vocab, merges = write_bpe(source / "context", TINY.num_tokens)
    artifact = dict(_target_="nemo.lightning.io.artifact.file.DirOrStringArtifact", attr="gpt2", skip=True)
    tokenizer = dict(
        _target_="nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
        pretrained_model_name=artifact,
        vocab_file=vocab,
        merges_file=merges,
        eos_token="<end>",
        additional_special_tokens=["<turn>"],
    )
    edit_yaml(source / "context/model.yaml", tokenizer=tokenizer)
    folder = convert(source, tmp_path / "ft", 1, "fp32")
    assert ModelConfig.read(folder / "config.ini").end_id == 303
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("<turn><end>") == [304, 303]


def list_end_ids(folder: Path, value: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    return folder


@pytest.mark.parametrize(
    ("value", "end_ids"),
    [([301, 302, 301], (302, 301)), ([7, 300], (7, 300)), (5, (5,)), (None, (302,))],
    ids=str,
)
def test_nemo_2s_end_tokens(value: Any, end_ids: tuple[int, ...], tmp_path: Path) -> None:
    """The tokenizer's own is 302; as in transformers' generate, generation_config.json overrules it."""
    source = write_nemo2(tmp_path / "source", TINY)
    list_end_ids(source / "context/artifacts", value)
    folder = convert(source, tmp_path / "ft", 1, "fp32")
    config = ModelConfig.read(folder / "config.ini")
    assert (config.end_id, config.end_ids) == (end_ids[0], end_ids)
    list_end_ids(source / "context/artifacts", [9, 10])  # which makes it another source
    assert ModelConfig.read(convert(source, tmp_path / "ft", 1, "fp32") / "config.ini").end_ids == (9, 10)


def test_a_tokenizers_folder_has_its_own_end_tokens(tmp_path: Path) -> None:
    """--tokenizer's take the place of the checkpoint's."""
    source = write_nemo2(tmp_path / "source", TINY)
    list_end_ids(source / "context/artifacts", [9, 10])
    tokenizer = shutil.copytree(source / "context/nemo_tokenizer", tmp_path / "tokenizer")
    options = SourceOptions(tokenizer=tokenizer)
    plain = convert(source, tmp_path / "plain", 1, "fp32", options=options)
    assert ModelConfig.read(plain / "config.ini").end_ids == (302,)
    list_end_ids(tokenizer, [7, 302])
    listed = convert(source, tmp_path / "listed", 1, "fp32", options=options)
    assert ModelConfig.read(listed / "config.ini").end_ids == (302, 7)


def test_the_source_is_known_by_its_files(tmp_path: Path) -> None:
    """A conversion is made anew when a file of the checkpoint has changed, its tokenizer's too."""
    source = write_nemo2(tmp_path / "source", TINY)
    convert(source, tmp_path / "ft", 1, "fp32")
    manifest = next(path for path in (tmp_path / "ft/1-gpu").glob("*.json") if "model.yaml" in path.read_text())
    text = manifest.read_text()
    assert re.search(r"tokenizer\.json", text) and ".distcp" in text and NEMO_CLASSES not in text
