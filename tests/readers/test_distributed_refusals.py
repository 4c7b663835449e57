"""Distributed checkpoints of Megatron-core: one sentence for each fault."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convert
from tests.support.broken import EVIL_TRACE, Edit, Evil
from tests.support.distributed_checkpoints import (
    ITERATION,
    edit_metadata,
    write_megatron_distributed,
    write_nemo_distributed,
)
from tests.support.nemo_checkpoints import TinyGPT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
FC1 = "model.decoder.layers.mlp.linear_fc1.weight"


def chunks(edit: Callable[[list[Any]], Any]) -> Edit:
    return edit_metadata(lambda metadata: edit(metadata.state_dict_metadata[FC1].chunks))


def stored(metadata: Any, key: str = FC1) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def zarray(**values: Any) -> Edit:
    def act(folder: Path) -> None:
        path = folder / FC1 / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return act


def spoil_blob(folder: Path) -> None:
    """Bytes of another kind where a chunk lies."""
    info = stored(pickle.loads((folder / ".metadata").read_bytes()))
    path = folder / info.relative_path
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + info.length] = b"PK\3\4" + bytes(info.length - 4)
    path.write_bytes(data)


def nan_blob(folder: Path) -> None:
    path = folder / FC1 / "1.1.0"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\xc0\x7f")


BAD: dict[str, tuple[str, Edit, str]] = {
    "no metadata": (
        "torch_dist",
        lambda folder: (folder / ".metadata").unlink(),
        "{w}: .metadata is missing",
    ),
    "nothing": (
        "torch_dist",
        lambda folder: [(folder / name).unlink() for name in (".metadata", "metadata.json")],
        "{w}: neither .metadata (torch_dist) nor .zarray files (zarr) are there",
    ),
    "backend": (
        "torch_dist",
        lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "torch_dcp"}'),
        "{w}/metadata.json: sharded_backend is 'torch_dcp'; supported: torch_dist, zarr",
    ),
    "not JSON": (
        "torch_dist",
        lambda folder: (folder / "metadata.json").write_text("{"),
        "{w}/metadata.json: not a JSON file (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1))",
    ),
    "hostile pickle": (
        "torch_dist",
        edit_metadata(lambda metadata: setattr(metadata, "planner_data", Evil())),
        "{w}/.metadata: refused, because its pickle asks for posix.system; .metadata may hold the checkpoint's "
        "metadata only",
    ),
    "hostile pickle of builtins": (
        "torch_dist",
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04c__builtin__\neval\n."),
        "{w}/.metadata: refused, because its pickle asks for __builtin__.eval; .metadata may hold the checkpoint's "
        "metadata only",
    ),
    "another pickle": (
        "torch_dist",
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04]."),
        "{w}/.metadata: not the metadata of a checkpoint of torch.distributed.checkpoint",
    ),
    "cut off metadata": (
        "torch_dist",
        lambda folder: (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-100]),
        "{w}/.metadata: not a readable pickle (EOFError)",
    ),
    "malformed places": (
        "torch_dist",
        edit_metadata(lambda metadata: setattr(stored(metadata), "offset", -1)),
        "{w}/.metadata: malformed storage_data",
    ),
    "malformed sizes": (
        "torch_dist",
        edit_metadata(lambda metadata: setattr(metadata.state_dict_metadata[FC1], "size", "4 x 96")),
        "{w}/.metadata: malformed metadata of tensor model.decoder.layers.mlp.linear_fc1.weight",
    ),
    "a chunk of more layers than bytes": (
        "torch_dist",
        chunks(lambda chunks: setattr(chunks[0], "sizes", torch.Size([10**12, 48, 32]))),
        "{w}/ANY.distcp: model.decoder.layers.mlp.linear_fc1.weight: ANY bytes; a chunk of [1000000000000, 48, 32] "
        "does not fit in",
    ),
    "missing file": (
        "torch_dist",
        lambda folder: (folder / "__0_1.distcp").unlink(),
        "{w}/.metadata: names '__0_1.distcp', and there is no such file",
    ),
    "a file outside": (
        "torch_dist",
        edit_metadata(lambda metadata: setattr(stored(metadata), "relative_path", "../../m.nemo")),
        "{w}/.metadata: names '../../m.nemo', and there is no such file",
    ),
    "truncated file": (
        "torch_dist",
        lambda folder: os.truncate(folder / "__0_1.distcp", 5000),
        "{w}/__0_1.distcp: 5,000 bytes; ANY",
    ),
    "a chunk of other bytes": (
        "torch_dist",
        spoil_blob,
        "{w}/ANY.distcp: model.decoder.layers.mlp.linear_fc1.weight: not a complete PyTorch file (ANY)",
    ),
    "extensions": (
        "torch_dist",
        edit_metadata(lambda metadata: setattr(stored(metadata), "transform_descriptors", ["stream.zstd"])),
        "{w}/ANY.distcp: model.decoder.layers.mlp.linear_fc1.weight is stored through extensions, such as compression",
    ),
    "another chunk's bytes": (
        "torch_dist",
        edit_metadata(
            lambda metadata: stored(metadata).__dict__.update(
                stored(metadata, "model.embedding.word_embeddings.weight").__dict__
            )
        ),
        "{w}/ANY.distcp: model.decoder.layers.mlp.linear_fc1.weight: holds [160, 32] in torch.float32; the metadata "
        "says [1, 48, 32] in torch.float32",
    ),
    "hole": (
        "torch_dist",
        chunks(lambda chunks: chunks.pop(3)),
        "{w}: the chunks of tensor model.decoder.layers.mlp.linear_fc1.weight do not make up its shape [4, 96, 32]; "
        "7 of 8 are there",
    ),
    "a layer less": (
        "torch_dist",
        chunks(lambda chunks: chunks.__delitem__(slice(0, 2))),
        "{w}: the chunks of tensor model.decoder.layers.mlp.linear_fc1.weight do not make up its shape [4, 96, 32]; "
        "none starts at 0 of axis 0",
    ),
    "overlap": (
        "torch_dist",
        chunks(lambda chunks: setattr(chunks[0], "sizes", torch.Size([1, 50, 32]))),
        "{w}: the chunks of tensor model.decoder.layers.mlp.linear_fc1.weight do not make up its shape [4, 96, 32]; "
        "that of [1, 50, 32] at [0, 0, 0] leaves a hole or overlaps",
    ),
    "axes": (
        "torch_dist",
        chunks(lambda chunks: setattr(chunks[0], "sizes", torch.Size([48, 32]))),
        "{w}: the chunks of tensor model.decoder.layers.mlp.linear_fc1.weight do not make up its shape [4, 96, 32]; "
        "one has shape [48, 32] at [0, 0, 0]",
    ),
    "chunk without a place": (
        "torch_dist",
        chunks(lambda chunks: setattr(chunks[0], "offsets", torch.Size([0, 1, 0]))),
        "{w}/.metadata: tensor model.decoder.layers.mlp.linear_fc1.weight: the chunk at [0, 1, 0] is in no file",
    ),
    "fp8": (
        "torch_dist",
        edit_metadata(
            lambda metadata: setattr(metadata.state_dict_metadata[FC1].properties, "dtype", torch.float8_e4m3fn)
        ),
        "{w}: tensor model.decoder.layers.0.mlp.linear_fc1.weight is stored as float8_e4m3fn; supported: fp64, fp32, "
        "fp16, bf16",
    ),
    "no such tensor": (
        "torch_dist",
        edit_metadata(lambda metadata: metadata.state_dict_metadata.pop("model.decoder.final_layernorm.weight")),
        "{w}: final_layernorm.weight is missing, there and on the other ranks",
    ),
    "layers": (
        "zarr",
        lambda folder: (folder / FC1).rename(folder / FC1.replace("mlp", "moe")),
        "{w}: unexpected tensor model.decoder.layers.0.moe.linear_fc1.weight; it is no part of Megatron's GPT",
    ),
    "missing chunk": (
        "zarr",
        lambda folder: (folder / FC1 / "1.1.0").unlink(),
        "{w}/{k}/.zarray: the chunk model.decoder.layers.mlp.linear_fc1.weight/1.1.0 is missing",
    ),
    "truncated chunk": (
        "zarr",
        lambda folder: os.truncate(folder / FC1 / "1.1.0", 1000),
        "{w}/{k}/1.1.0: 1,000 bytes; a chunk of [1, 48, 32] has 6,144",
    ),
    "compressor": (
        "zarr",
        zarray(compressor={"id": "blosc", "cname": "lz4"}),
        "{w}/{k}/.zarray: compressor is 'blosc'; supported: None",
    ),
    "filters": (
        "zarr",
        zarray(filters=[{"id": "delta"}]),
        "{w}/{k}/.zarray: filters is \"[{{'id': 'delta'}}]\"; supported: None, []",
    ),
    "order": ("zarr", zarray(order="F"), "{w}/{k}/.zarray: order is 'F'; supported: C"),
    "version": ("zarr", zarray(zarr_format=3), "{w}/{k}/.zarray: zarr_format is '3'; supported: 2"),
    "dtype": ("zarr", zarray(dtype="|u1"), "{w}/{k}/.zarray: dtype is '|u1'; supported: <f8, <f4, <f2, bfloat16"),
    "list for a dtype": (
        "zarr",
        zarray(dtype=[["a", "<f4"]]),
        "{w}/{k}/.zarray: dtype is \"[['a', '<f4']]\"; supported: <f8, <f4, <f2, bfloat16",
    ),
    "sizes": ("zarr", zarray(shape=[4, -96, 32]), "{w}/{k}/.zarray: malformed shape or chunks"),
    "no chunks": ("zarr", zarray(chunks=[1, 0, 32]), "{w}/{k}/.zarray: malformed shape or chunks"),
    "a larger array": (
        "zarr",
        zarray(shape=[10**12, 96, 32]),
        "{w}/{k}/.zarray: 2,000,000,000,000 chunks, and the checkpoint has ANY files",
    ),
    "shape": (
        "zarr",
        zarray(shape=[4, 90, 32]),
        "{w}: tensor model.decoder.layers.0.mlp.linear_fc1.weight has shape [90, 32]; the settings ask for [96, 32]",
    ),
    "NaN": (
        "zarr",
        nan_blob,
        "{w}: tensor model.decoder.layers.1.mlp.linear_fc1.weight holds the value nan; every weight must be finite",
    ),
}


def matches(text: str, sentence: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, sentence.split("ANY"))), text) is not None


@pytest.mark.parametrize("packed", ["w:", ""])
@pytest.mark.parametrize("case", BAD)
def test_broken_source_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, packed: str
) -> None:
    form, edit, sentence = BAD[case]
    target = tmp_path / ("m.nemo" if packed else "m")
    source = write_nemo_distributed(target, TinyGPT(), form, packed, edit=edit)
    code = convert.main([str(source), str(tmp_path / "out"), "--tp", "2"])
    weights = f"{source}: model_weights" if packed else f"{source}/model_weights"
    output, errors = capsys.readouterr()
    assert (code, output) == (1, "")
    assert matches(errors, f"convert.py: {sentence.format(w=weights, k=FC1)}\n"), errors
    assert not any(path.name != ".convert.lock" for path in tmp_path.glob("out/*"))
    assert not EVIL_TRACE.exists()


BAD_MEGATRON: dict[str, tuple[dict[str, Any], str]] = {
    "no common state": (
        dict(edit=lambda folder: (folder / "common.pt").unlink()),
        "{i}: no common.pt, which holds what is saved beside the tensors",
    ),
    "no arguments": (
        dict(common={"state_dict": {}}),
        "{i}/common.pt: no training arguments (args), so Megatron-LM has not written this",
    ),
    "hostile common state": (
        dict(common={"args": Evil()}),
        "{i}/common.pt: refused, because its pickle asks for posix.system; a checkpoint may hold tensors and plain "
        "values only",
    ),
    "hostile common state inside": (
        dict(common={"args": Evil()}, common_inside=True),
        "{i}/ANY.distcp: common_state/shard_0_1: refused, because its pickle asks for posix.system; a checkpoint may "
        "hold tensors and plain values only",
    ),
    "metadata": (
        dict(edit=lambda folder: (folder / ".metadata").unlink()),
        "{i}: .metadata is missing",
    ),
    "trained otherwise": (
        dict(args=dict(num_experts=8)),
        "{i}/common.pt: args: num_experts is 8; supported: 0, 1",
    ),
}


@pytest.mark.parametrize("case", BAD_MEGATRON)
def test_broken_iteration_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    what, sentence = BAD_MEGATRON[case]
    source = write_megatron_distributed(tmp_path / "m", TinyGPT(), "torch_dist", **what)
    code = convert.main([str(source), str(tmp_path / "out")])
    output, errors = capsys.readouterr()
    assert (code, output) == (1, "")
    assert matches(errors, f"convert.py: {sentence.format(i=source / ITERATION)}\n"), errors
    shutil.rmtree(source)
