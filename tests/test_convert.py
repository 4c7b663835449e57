"""convert.py and the GPT-2 reader: bytes, folders, kills, full disks, memory, broken checkpoints' sentences."""

import configparser
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import convert
from readers.casting import cast as cast_tensor
from readers.casting import computed_ahead
from tests.support.checkpoints import make_gpt2, make_tokenizer, save, write_weights
from tests.support.launch import conversion_memory
from weights.model_config import ModelConfig
from weights.reader import ShardReader
from weights.table import weight_specs

ROOT = Path(convert.__file__).parent
TINY: dict[str, Any] = dict(vocab_size=37, layers=2, heads=4, hidden=16, n_positions=8, with_tokenizer=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small good checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2(folder)
    return folder


def cast(array: np.ndarray, data_type: str) -> np.ndarray:
    """float32 → what is on disk, with numpy alone; bf16 is rounded to nearest even by hand."""
    if data_type != "bf16":
        return array.astype({"fp32": np.float32, "fp16": np.float16}[data_type])
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def expected_files(model: transformers.PreTrainedModel, tp: int, data_type: str) -> dict[str, bytes]:
    """FasterTransformer's files for a GPT-2, written down independently of weights.table."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    state = {name.removeprefix("transformer."): cast(array, data_type) for name, array in state.items()}
    files = {
        "model.wte.bin": state["wte.weight"],
        "model.wpe.bin": state["wpe.weight"],
        "model.final_layernorm.weight.bin": state["ln_f.weight"],
        "model.final_layernorm.bias.bin": state["ln_f.bias"],
    }
    if not model.config.tie_word_embeddings:
        files["model.lm_head.weight.bin"] = state["lm_head.weight"]
    for layer in range(model.config.n_layer):
        source, target = f"h.{layer}.", f"model.layers.{layer}."
        for theirs, ours in (
            ("ln_1.weight", "input_layernorm.weight"),
            ("ln_1.bias", "input_layernorm.bias"),
            ("ln_2.weight", "post_attention_layernorm.weight"),
            ("ln_2.bias", "post_attention_layernorm.bias"),
            ("attn.c_proj.bias", "attention.dense.bias"),
            ("mlp.c_proj.bias", "mlp.dense_4h_to_h.bias"),
        ):
            files[f"{target}{ours}.bin"] = state[source + theirs]
        weight, bias = state[source + "attn.c_attn.weight"], state[source + "attn.c_attn.bias"]
        q, k, v = np.split(weight, 3, axis=1)
        q_bias, k_bias, v_bias = np.split(bias, 3)
        for rank in range(tp):

            def mine(array: np.ndarray, axis: int, rank: int = rank) -> np.ndarray:
                return np.split(array, tp, axis=axis)[rank]

            part = {
                "attention.query_key_value.weight": np.stack([mine(q, 1), mine(k, 1), mine(v, 1)], axis=1),
                "attention.query_key_value.bias": np.stack([mine(q_bias, 0), mine(k_bias, 0), mine(v_bias, 0)]),
                "attention.dense.weight": mine(state[source + "attn.c_proj.weight"], 0),
                "mlp.dense_h_to_4h.weight": mine(state[source + "mlp.c_fc.weight"], 1),
                "mlp.dense_h_to_4h.bias": mine(state[source + "mlp.c_fc.bias"], 0),
                "mlp.dense_4h_to_h.weight": mine(state[source + "mlp.c_proj.weight"], 0),
            }
            files |= {f"{target}{name}.{rank}.bin": array for name, array in part.items()}
    return {name: array.tobytes() for name, array in files.items()}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def config_ini(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(folder / "config.ini")
    return dict(parser["gpt"])


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time of these tests would go into waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# --- bytes ---


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("format", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_files_are_those_of_fastertransformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, shards: int, tp: int, data_type: str
) -> None:
    monkeypatch.setattr(convert, "_CHUNK_BYTES", 1000)  # so that matrices are written in many pieces
    model = make_gpt2(tmp_path / "hf", format=format, shards=shards, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", tp, data_type)
    assert folder == tmp_path / "out" / f"{tp}-gpu"
    assert weight_files(folder) == expected_files(model, tp, data_type)


def test_writing_may_be_started_where_it_cannot_be(tmp_path: Path) -> None:
    """It only hastens what fsync does: bytes stay as they are, and a refusal (of a pipe here) does no harm."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 99)
        file.flush()
        convert._start_writing(file.fileno())
    assert path.read_bytes() == bytes(range(256)) * 99
    reading, writing = os.pipe()
    convert._start_writing(writing)
    os.close(reading), os.close(writing)


def test_shard_reader_reads_what_was_written(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", tied=False, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")
    config = ModelConfig.read(folder / "config.ini")
    readers = [ShardReader(folder, config, rank, torch.float32) for rank in range(2)]
    for spec in weight_specs(config):
        assert all(reader.read(spec).shape == spec.shard_shape(2) for reader in readers)
    assert torch.equal(readers[1].read(weight_specs(config)[-1]), model.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_head_is_written_where_it_is_not_the_embedding(tmp_path: Path, format: str, tied: bool) -> None:
    model = make_gpt2(tmp_path / "hf", format=format, tied=tied, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    assert (folder / "model.lm_head.weight.bin").exists() is not tied
    assert weight_files(folder) == expected_files(model, 1, "fp32")


def test_head_equal_to_the_embedding_is_not_written_twice(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", tied=False, **TINY)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    save(model, tmp_path / "hf")
    assert not (convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32") / "model.lm_head.weight.bin").exists()


def test_head_trained_apart_is_kept_though_the_config_says_tied(tmp_path: Path) -> None:
    """transformers 5 goes by what is stored; dropping the head would give other logits than `generate`."""
    model = make_gpt2(tmp_path / "hf", **TINY)
    head = torch.full((37, 16), 0.25)
    write_weights(tmp_path / "hf", dict(model.state_dict()) | {"lm_head.weight": head}, "safetensors")
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    assert (folder / "model.lm_head.weight.bin").read_bytes() == head.numpy().tobytes()


def test_tied_checkpoint_may_store_the_head_only(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", **TINY)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("wte.weight")}
    write_weights(tmp_path / "hf", tensors, "safetensors")
    assert weight_files(convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")) == expected_files(
        model, 2, "fp32"
    )


def test_headless_checkpoint_with_old_mask_buffers(tmp_path: Path) -> None:
    """openai-community/gpt2 itself: no `transformer.`, and each layer's causal mask stored as attn.bias."""
    model = make_gpt2(tmp_path / "hf", **TINY)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write_weights(tmp_path / "hf", tensors, "safetensors")
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp16")
    assert weight_files(folder) == expected_files(model, 2, "fp16")


def test_bin_from_before_pytorch_1_6(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", format="bin", **TINY)
    torch.save(model.state_dict(), tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=False)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")
    assert weight_files(folder) == expected_files(model, 2, "fp32")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float64, "fp32")],
)
def test_auto_is_the_stored_data_type(tmp_path: Path, stored: torch.dtype, expected: str) -> None:
    model = make_gpt2(tmp_path / "hf", dtype=stored, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "auto")
    assert config_ini(folder)["weight_data_type"] == expected
    assert weight_files(folder) == expected_files(model, 2, expected)


def test_float64_is_rounded_by_way_of_float32(tmp_path: Path) -> None:
    """FasterTransformer's converters load in float32: 1 + 2^-11 + 2^-40 becomes 1 in fp16, not 1 + 2^-10."""
    model = make_gpt2(tmp_path / "hf", dtype=torch.float64, **TINY)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1 + 2**-11 + 2**-40)
    save(model, tmp_path / "hf")
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp16")
    values = np.fromfile(folder / "model.final_layernorm.weight.bin", np.float16)
    assert values.tolist() == [1.0] * 16


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 90), (3, 50, 70), (64, 1), (1, 64), (7,)])
def test_transposed_views_are_cast_as_they_read(
    shape: tuple[int, ...], wanted: torch.dtype, stored: torch.dtype
) -> None:
    """They are copied as they are stored, [out, in] or [3, out, in], and slices of them have gaps between the rows."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(stored).movedim(-1, 0)
    for view in (whole, whole[1:-1], whole[..., 1:-1]):
        if view.numel():
            expected = view.float().to(wanted).flatten()
            assert torch.equal(cast_tensor(view, wanted, "here").flatten(), expected)


def test_results_computed_ahead_come_in_order_and_threads_are_as_before() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        assert torch.get_num_threads() == 1
        if number == 50:
            raise ValueError("fifty")
        return number

    num_threads, seen = torch.get_num_threads(), []
    with pytest.raises(ValueError, match="fifty"), computed_ahead(work, range(100)) as results:
        for number in results:
            seen.append(number)
    assert seen == list(range(50))
    assert torch.get_num_threads() == num_threads
    with computed_ahead(work, range(40)) as results:
        assert list(results) == list(range(40))


# --- config.ini, manifest, tokenizer ---


def test_config_ini(tmp_path: Path) -> None:
    settings = dict(n_inner=24, activation_function="relu", layer_norm_epsilon=1e-3)
    make_gpt2(tmp_path / "hf", **TINY, **settings)
    convert.convert(tmp_path / "hf", tmp_path / "out", 4, "bf16", convert.Names("parrot"))
    config = config_ini(tmp_path / "out/4-gpu")
    expected = dict(model_name="parrot", head_num="4", size_per_head="4", inter_size="24", num_layer="2")
    expected |= dict(max_pos_seq_len="8", vocab_size="37", start_id="36", end_id="36", weight_data_type="bf16")
    expected |= dict(tensor_para_size="4", layernorm_eps="0.001", activation_type="relu")
    assert {key: config[key] for key in expected} == expected


def test_config_ini_takes_gpt2_defaults(tmp_path: Path) -> None:
    """FasterTransformer's converter forgets layernorm_eps, whose default there (1e-6) is not GPT-2's."""
    make_gpt2(tmp_path / "hf", **TINY)
    edit_config(tmp_path / "hf", layer_norm_epsilon=..., n_inner=..., activation_function=..., bos_token_id=None)
    config = config_ini(convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32"))
    names = ("layernorm_eps", "inter_size", "activation_type", "start_id", "model_name")
    assert [config[name] for name in names] == ["1e-05", "64", "gelu", "36", "hf"]


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_tanh_gelus_are_fastertransformers_gelu(tmp_path: Path, activation: str) -> None:
    make_gpt2(tmp_path / "hf", activation_function=activation, **TINY)
    assert config_ini(convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32"))["activation_type"] == "gelu"


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


@pytest.mark.parametrize("vocab_size", [257, 303, 1000])
def test_tokenizer_of_the_tests_knows_every_byte(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = make_tokenizer(tmp_path, vocab_size)
    text = bytes(range(128)).decode() + "é€\U0001f600 Thank you"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == len(tokenizer.get_vocab()) == vocab_size
    assert tokenizer.eos_token_id == vocab_size - 1


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


# --- kills, locks, full disks ---


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up, as shutil.rmtree is put out of action."""


@pytest.mark.parametrize("moment", ["first bytes", "last bytes", "manifest", "between the renames", "after them"])
@pytest.mark.parametrize("is_there", [False, True])
def test_killed_at_any_moment_leaves_no_false_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, is_there: bool
) -> None:
    if is_there:
        convert.convert(source, tmp_path, 2, "fp32")
    expected = weight_files(convert.convert(source, tmp_path / "good", 2, "fp16"))

    def progress(done: int, total: int) -> None:
        if moment == "first bytes" or (moment == "last bytes" and done == total):
            raise Killed

    def sync(path: Path) -> None:
        if moment == "manifest" and path.name == "manifest.json":
            os.truncate(path, 10)
            raise Killed
        if moment == "after them" and path == tmp_path:
            raise Killed

    def rename(self: Path, target: Path) -> None:
        if moment == "between the renames" and ".tmp-" in self.name:
            raise Killed
        os.rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(convert, "_sync", sync)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            convert.convert(source, tmp_path, 2, "fp16", progress=progress)
    folder = tmp_path / "2-gpu"
    if moment == "after them":
        assert weight_files(folder) == expected
    elif is_there and moment != "between the renames":
        assert config_ini(folder)["weight_data_type"] == "fp32"
        convert.verify(folder, checksums=True)
    else:
        assert not folder.exists()
    convert.convert(source, tmp_path, 2, "bf16")
    convert.convert(source, tmp_path, 2, "fp16")
    assert weight_files(folder) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [".convert.lock", "2-gpu", "good"]


@pytest.fixture(scope="module")
def big_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """450 MB of zeros in a file with a true header, which takes no space on the disk."""
    folder = tmp_path_factory.mktemp("big")
    with torch.device("meta"):
        config = transformers.GPT2Config(vocab_size=257, n_embd=1024, n_layer=9, n_head=16, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
    config.bos_token_id = config.eos_token_id = 256
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            size = 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for large outputs, emptied at once: pytest keeps its own for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def start(*args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "convert.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signal_in_the_middle(big_source: Path, scratch: Path, number: signal.Signals) -> None:
    process = start(big_source, scratch, "--tp", 2)
    deadline = time.monotonic() + 60
    while not (files := list(scratch.glob(".2-gpu.tmp-*/*.bin"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    left = sorted(path.name for path in scratch.iterdir())
    if number == signal.SIGKILL:
        assert (process.returncode, left[0]) == (-9, f".2-gpu.tmp-{process.pid}-{left[0][-8:]}")
        assert "2-gpu" not in left
    else:
        assert (process.returncode, output, errors, left) == (128 + number, "", "", [".convert.lock"])


def test_interrupt_cleans_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.ProgressLine, "__call__", interrupt)
    assert run_main(capsys, source, tmp_path) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == [".convert.lock"]


def test_two_converters_take_turns(source: Path, tmp_path: Path) -> None:
    processes = [start(source, tmp_path, "--tp", 2) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    folder = re.escape(str(tmp_path / "2-gpu"))
    assert re.fullmatch(rf"{folder}: 899,328 bytes in \d+\.\d s, \d+ MB/s\n", outputs[0])
    assert re.fullmatch(rf"{folder}: already there\n", outputs[1])
    convert.verify(tmp_path / "2-gpu", checksums=True)


def test_lock_is_waited_for(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    thread = threading.Thread(target=convert.convert, args=(source, tmp_path, 2, "fp32"))
    with (tmp_path / ".convert.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert caplog.messages == [f"{tmp_path}: waiting for another converter to finish"]
    thread.join(30)
    convert.verify(tmp_path / "2-gpu", checksums=True)


def test_file_system_without_locks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre mounted without -o flock: converted all the same, and nobody's temporary folder is deleted."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".2-gpu.tmp-1-00000000").mkdir()
    convert.verify(convert.convert(source, tmp_path, 2, "fp32"), checksums=True)
    assert (tmp_path / ".2-gpu.tmp-1-00000000").is_dir()
    assert "cannot be locked against a second converter (Function not implemented)" in caplog.text


def test_too_little_space_is_found_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(RuntimeError, match=r": the conversion needs 899,328 bytes, and 1,000 are free$"):
        convert.convert(source, tmp_path, 2, "fp32")
    assert [path.name for path in tmp_path.iterdir()] == [".convert.lock"]


def test_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes write() fail half-way as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            convert.convert(source, tmp_path, 2, "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{tmp_path}: File too large; the conversion needs 899,328 bytes"
    assert [path.name for path in tmp_path.iterdir()] == [".convert.lock"]


# --- memory ---


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(big_source: Path, scratch: Path, format: str) -> None:
    """450 MB of weights, the largest 17 MB."""
    if format == "bin":
        shutil.copyfile(big_source / "config.json", scratch / "config.json")
        write_weights(scratch, load_file(big_source / "model.safetensors"), "bin")
    folder = big_source if format == "safetensors" else scratch
    # MiB: mapped pages of up to 64 + 17, chunks of 32, what torch needs
    assert conversion_memory(folder, scratch / "out", 2) < 250


# --- broken checkpoints ---


def edit_config(folder: Path, **values: Any) -> None:
    """Change config.json; `...` removes a key."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def fill(name: str, value: float) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update({name: tensor}))


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **values)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def as_bin(content: Any, cut: int = 0) -> Callable[[Path], None]:
    """Replace the weights by a .bin of this content, less its last bytes."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        torch.save(content(tensors) if callable(content) else content, path)
        os.truncate(path, path.stat().st_size - cut)

    return act


def sharded(edit: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Replace the weights by three shards, then let `edit` change files and the index's map."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_weights(folder, tensors, "safetensors", shards=3)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(folder, index["weight_map"])
        path.write_text(json.dumps(index))

    return act


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/test_convert_was_here",)


SHARD = "model-00002-of-00003.safetensors"
WPE, LN = "transformer.wpe.weight", "transformer.h.1.ln_2.bias"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "{hf}: no config.json (Hugging Face), model_config.yaml (NeMo) or files of ranks (Megatron-LM), "
        "so this is not a checkpoint",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{'a': 1}"),
        "{hf}/config.json: not a JSON file (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
    ),
    "architecture": (
        settings(model_type="llama"),
        "{hf}/config.json: architecture 'llama' is not supported; supported: bloom, gpt2, opt",
    ),
    "activation": (
        settings(activation_function="silu"),
        "{hf}/config.json: activation_function 'silu' is not supported; "
        "supported: gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu",
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
        settings(eos_token_id=50256),
        "{hf}/config.json: eos_token_id is 50256; it must be one of the 37 token ids",
    ),
    "no end token": (
        settings(eos_token_id=None),
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
    assert not Path("/tmp/test_convert_was_here").exists()


def test_what_fp16_cannot_hold_fits_bf16(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "hf")
    fill(WPE, -70000)(tmp_path / "hf")
    folder = convert.convert(tmp_path / "hf", tmp_path, 2, "bf16")
    assert np.fromfile(folder / "model.wpe.bin", np.uint16)[3] == 0xC789  # -70144


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
