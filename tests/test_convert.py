"""convert.py: manifests, folders that are kept or replaced, the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import convert
from tests.support.checkpoints import make_gpt2
from tests.support.folders import config_ini


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small good checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2(folder)
    return folder


def test_manifest(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp16", convert.Names(source_name="me/parrot", revision="abc"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("source_name", "revision", "converter_version", "tensor_para_size")} == {
        "source_name": "me/parrot",
        "revision": "abc",
        "converter_version": convert.CONVERTER_VERSION,
        "tensor_para_size": 2,
    }
    assert (manifest["weight_data_type"], manifest["source_data_type"]) == ("fp16", "fp32")
    others = {"manifest.json", "config.ini"}
    assert manifest["files"] == {
        path.name: {"size": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
        for path in folder.iterdir()
        if path.name not in others
    }
    assert {entry["name"] for entry in manifest["source_files"]} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_folder_has_the_umasks_rights(source: Path, tmp_path: Path) -> None:
    """mkdtemp's 0700 would keep the ranks of other users out."""
    os.mkdir(tmp_path / "plain")
    folder = convert.convert(source, tmp_path, 1, "fp32")
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tokenizer_works_from_the_folder(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 1, "fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Thank you for the tea!").input_ids
    assert tokenizer.decode(ids) == "Thank you for the tea!"
    assert (tokenizer.eos_token_id, tokenizer.eos_token) == (130, "<|endoftext|>")


def test_progress_counts_every_byte(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = convert.convert(source, tmp_path, 2, "fp16", progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


# --- converting again ---


def is_kept(folder: Path, act: Callable[[], Any]) -> bool:
    before = folder.stat().st_ino
    act()
    return folder.stat().st_ino == before


def test_finished_folder_is_kept(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp32")
    assert is_kept(folder, lambda: convert.convert(source, tmp_path, 2, "fp32"))
    assert is_kept(folder, lambda: convert.convert(source, tmp_path, 2, "auto"))
    assert is_kept(folder, lambda: convert.convert(source, tmp_path, 4, "fp32"))


def test_config_ini_edited_by_hand_survives(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp32")
    with (folder / "config.ini").open("a") as file:
        file.write("# mine\n")
    assert is_kept(folder, lambda: convert.convert(source, tmp_path, 2, "fp32"))
    convert.verify(folder, checksums=True)


def test_other_data_type_replaces_the_folder(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp32")
    assert not is_kept(folder, lambda: convert.convert(source, tmp_path, 2, "fp16"))
    assert config_ini(folder)["weight_data_type"] == "fp16"
    assert not is_kept(folder, lambda: convert.convert(source, tmp_path, 2, "auto"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".convert.lock", "2-gpu"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_changed_source_replaces_the_folder(source: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    folder = convert.convert(tmp_path / "hf", tmp_path, 2, "fp32")
    os.utime(tmp_path / "hf" / name, ns=(0, 0))
    assert not is_kept(folder, lambda: convert.convert(tmp_path / "hf", tmp_path, 2, "fp32"))


@pytest.mark.parametrize("name", ["model.wte.bin", "config.ini", "tokenizer.json"])
def test_folder_with_a_file_missing_is_made_anew(source: Path, tmp_path: Path, name: str) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp32")
    (folder / name).unlink()
    convert.convert(source, tmp_path, 2, "fp32")
    convert.verify(folder, checksums=True)


def test_fastertransformers_own_folder_is_not_deleted(source: Path, tmp_path: Path) -> None:
    """Its converters write no manifest; the user's hours of conversion are moved aside, not lost."""
    (tmp_path / "2-gpu").mkdir()
    (tmp_path / "2-gpu/model.wte.bin").write_bytes(b"theirs")
    convert.convert(source, tmp_path, 2, "fp32")
    convert.verify(tmp_path / "2-gpu", checksums=True)
    (kept,) = tmp_path.glob("2-gpu.*")
    assert (kept / "model.wte.bin").read_bytes() == b"theirs"


def test_verify_takes_fastertransformers_own_folder(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp32")
    (folder / "manifest.json").unlink()
    convert.verify(folder)
    with pytest.raises(ValueError, match="no manifest.json, so there are no checksums to compare with$"):
        convert.verify(folder, checksums=True)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_names_what_is_wrong(source: Path, tmp_path: Path) -> None:
    folder = convert.convert(source, tmp_path, 2, "fp32")
    wte = folder / "model.wte.bin"
    flip_last_byte(wte)
    convert.verify(folder)  # sizes only
    with pytest.raises(ValueError, match=r"model.wte.bin: checksum [0-9a-f]{8}; the manifest says [0-9a-f]{8}$"):
        convert.verify(folder, checksums=True)
    os.truncate(wte, 100)
    with pytest.raises(ValueError, match=r"model.wte.bin: 100 bytes; the manifest says 33536$"):
        convert.verify(folder)
    wte.unlink()
    with pytest.raises(ValueError, match=r"model.wte.bin: the file is missing$"):
        convert.verify(folder)
    (folder / "manifest.json").write_text('{"files": {"model.wte.bin": 3}}')
    with pytest.raises(ValueError, match="no list of files with their sizes and checksums$"):
        convert.verify(folder)
    with pytest.raises(ValueError, match="no config.ini, so this is not a weight folder$"):
        convert.verify(tmp_path)


# --- command line ---


def run_main(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = convert.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, errors = run_main(capsys, source, tmp_path, "--tp", 2, "--model-name", "parrot")
    assert (code, errors) == (0, "")
    assert re.fullmatch(rf"{tmp_path}/2-gpu: 899,328 bytes in \d+\.\d s, \d+ MB/s\n", output)
    assert config_ini(tmp_path / "2-gpu")["model_name"] == "parrot"
    assert run_main(capsys, source, tmp_path, "--tp", 2) == (0, f"{tmp_path}/2-gpu: already there\n", "")
    checked = run_main(capsys, tmp_path / "2-gpu", "--verify")
    assert checked == (0, f"{tmp_path}/2-gpu: every file is as it was written\n", "")
    flip_last_byte(tmp_path / "2-gpu/model.wte.bin")
    code, _, errors = run_main(capsys, tmp_path / "2-gpu", "--verify")
    assert (code, "model.wte.bin: checksum" in errors) == (1, True)


def test_command_line_refuses_a_tp_that_does_not_fit(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(capsys, source, tmp_path / "out", "--tp", 3) == (
        1,
        "",
        "convert.py: tp 3 does not divide this model's 4 heads and inter_size 256; possible: 1, 2, 4\n",
    )
    assert not (tmp_path / "out").exists()


def test_command_line_shows_a_traceback_only_when_asked(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(capsys, tmp_path / "no", tmp_path) == (1, "", f"convert.py: {tmp_path}/no: no such folder\n")
    (tmp_path / "taken").touch()
    refused = (1, "", f"convert.py: {tmp_path}/taken: File exists\n")
    assert run_main(capsys, source, tmp_path / "taken") == refused
    with pytest.raises(ValueError, match="no such folder"):
        convert.main([str(tmp_path / "no"), str(tmp_path), "--verbose"])


@pytest.mark.parametrize("args", [["a"], ["a", "b", "--verify"], ["a", "b", "--tp", "0"], ["a", "b", "--tp", "x"]])
def test_command_line_usage(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert.main(args)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err
