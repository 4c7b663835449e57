"""Distributed checkpoints of Megatron-core: the same files as from ranks' own, and only the bytes that are needed."""

from __future__ import annotations

import os
import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import convert
from readers.archive import folder_files
from readers.distributed import DistributedCheckpoint
from tests.support.distributed_checkpoints import (
    ITERATION,
    whole_tensors,
    write_distributed,
    write_megatron_distributed,
    write_nemo_distributed,
    write_zarr,
)
from tests.support.folders import weight_files
from tests.support.modern_checkpoints import ModernGPT
from tests.support.nemo_checkpoints import TinyGPT, write_megatron, write_nemo

FC1 = "model.decoder.layers.mlp.linear_fc1.weight"
FORMS = ["torch_dist", "zarr"]
SLOW = pytest.mark.slow("2 s each; one model with and one without modern parts stay")
MODELS: dict[str, Callable[[], Any]] = {
    "nemotron": lambda: ModernGPT("nemotron"),
    "llama": lambda: ModernGPT("llama", kv_heads=8),
    "grouped llama": lambda: ModernGPT("llama", around_zero=True),
    "tied": TinyGPT,
    "untied": lambda: TinyGPT(tied=False),
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


all_models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("grouped llama", "tied") else SLOW) for name in MODELS]
)


def files(folder: Path) -> dict[str, bytes]:
    """The weights, and config.ini but for the model's name."""
    return weight_files(folder) | {"config.ini": re.sub(rb"model_name = .*", b"", (folder / "config.ini").read_bytes())}


# --- bytes ---


@pytest.mark.parametrize("form", FORMS)
@all_models
def test_files_are_those_of_ranks_own_files(tmp_path: Path, name: str, form: str) -> None:
    model = MODELS[name]()
    settings = getattr(model, "settings", {})
    ranks = write_nemo(tmp_path / "m.nemo", model, 2, 2, style="core", **settings)
    sources = [
        write_nemo_distributed(tmp_path / "a/m.nemo", model, form, tp=2, settings=settings),
        write_nemo_distributed(tmp_path / "b/m.nemo", model, form, tp=4, stacked=False, settings=settings),
        write_nemo_distributed(tmp_path / "c/m.nemo", model, form, tp=4, uneven=True, settings=settings),
    ]
    for tp in (1, 2, 4):
        expected = files(convert.convert(ranks, tmp_path / "out", tp, "auto"))
        for source in sources:
            assert files(convert.convert(source, source.parent / "out", tp, "auto")) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", ["w:gz", ""])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, pytest.param(torch.float64, marks=SLOW)])
def test_gzipped_archives_folders_and_data_types(tmp_path: Path, form: str, packed: str, dtype: torch.dtype) -> None:
    model = MODELS["llama"]()
    ranks = write_nemo(tmp_path / "m.nemo", model, dtype=dtype, style="core", **model.settings)
    target = tmp_path / ("d.nemo" if packed else "d")
    source = write_nemo_distributed(target, model, form, packed, dtype=dtype, settings=model.settings)
    expected = files(convert.convert(ranks, tmp_path / "out", 2, "auto"))
    assert files(convert.convert(source, tmp_path / "other", 2, "auto")) == expected


@pytest.mark.parametrize("prefix", ["model.module.", "module.", ""])
def test_prefixes_and_an_interleaved_pipeline(tmp_path: Path, prefix: str) -> None:
    """Layers are numbered over the whole model, whatever pipeline trained them."""
    model = TinyGPT()
    settings = dict(virtual_pipeline_model_parallel_size=2, tensor_model_parallel_size=8)
    source = write_nemo_distributed(tmp_path / "m.nemo", model, "torch_dist", prefix=prefix, settings=settings)
    assert weight_files(convert.convert(source, tmp_path / "out", 2, "fp32")) == model.files(2)


def test_metadata_with_what_other_versions_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-core's own class, with all ranks' plans; properties of PyTorch 2.0; several paths and versions."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = types.ModuleType(name)
    for parts in range(1, len(name.split("."))):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:parts]), types.ModuleType("parent"))
    monkeypatch.setitem(sys.modules, name, module)
    for short, parent in (("MCoreMetadata", Metadata), ("MCoreSavePlan", SavePlan)):
        setattr(module, short, type(short, (parent,), {"__module__": name}))

    def edit(folder: Path) -> None:
        old = pickle.loads((folder / ".metadata").read_bytes())
        metadata = module.MCoreMetadata(**vars(old))
        metadata.mcore_data = {FC1: {}}
        chunk = metadata.state_dict_metadata[FC1].chunks[0]
        data = TensorWriteData(chunk, metadata.state_dict_metadata[FC1].properties, torch.Size([4, 96, 32]))
        item = WriteItem(MetadataIndex(FC1, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
        metadata.all_local_plans = [module.MCoreSavePlan([item], storage_data=_StoragePrefix("__0_"))]
        metadata.state_dict_metadata[FC1].properties = OldProperties(torch.float32)
        metadata.storage_meta = None
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (folder / "metadata.json").unlink()

    source = write_nemo_distributed(tmp_path / "m.nemo", TinyGPT(), "torch_dist", edit=edit)
    monkeypatch.undo()  # what reads it has no such classes
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    assert weight_files(convert.convert(source, tmp_path / "out", 2, "fp32")) == TinyGPT().files(2)


@pytest.mark.parametrize("form", ["torch_dist", "zarr", "common state inside"])
@all_models
def test_iterations_of_megatron_lm(tmp_path: Path, name: str, form: str) -> None:
    model = MODELS[name]()
    args = getattr(model, "args", {"untie_embeddings_and_output_weights": not model.tied})
    ranks = write_megatron(tmp_path / "m", model, 3.0, 2, 2, **args)
    is_inside = form == "common state inside"
    source = write_megatron_distributed(
        tmp_path / "d", model, "torch_dist" if is_inside else form, args=args, common_inside=is_inside
    )
    for tp in (1, 2, 4):
        expected = files(convert.convert(ranks, tmp_path / "out", tp, "auto"))
        assert files(convert.convert(source, tmp_path / "other", tp, "auto")) == expected
    (source / "latest_checkpointed_iteration.txt").unlink()
    for nth, folder in enumerate((source, source / ITERATION)):
        assert files(convert.convert(folder, tmp_path / f"again{nth}", 4, "auto")) == expected


# --- what is read ---


@pytest.mark.parametrize("form", FORMS)
def test_one_layer_reads_its_own_chunks_only(tmp_path: Path, form: str) -> None:
    """A stacked tensor is as large as its part of all layers: reading it whole took memory for 96 of them."""
    model = MODELS["nemotron"]()
    write_distributed(tmp_path, model, form, tp=2)
    checkpoint = DistributedCheckpoint(folder_files(tmp_path), "m")
    shapes = {shard.stored: shard.shape for shard in checkpoint.headers()}
    name = "decoder.layers.{}mlp.linear_fc1.weight"
    assert shapes[name.format("2.")] == (96, 64) and name.format("") not in shapes
    whole, layer = checkpoint._tensors[name.format("2.")]
    read = []
    for chunk in whole.chunks:
        object.__setattr__(chunk, "read", lambda chunk=chunk, real=chunk.read: read.append(chunk.offsets) or real())
    tensor = checkpoint.open()[0](name.format("2."))
    assert torch.equal(tensor, whole_tensors(model, "", True)[name.format("")][2])
    assert read == [(2, 0, 0), (2, 48, 0)] and layer == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_in_one_chunk_is_a_view_of_the_file(tmp_path: Path, form: str) -> None:
    """Its pages are let go with it: 64 MiB take none of this process's own memory until they are touched."""
    tensor = torch.zeros(1 << 14, 1 << 10)
    if form == "zarr":
        write_zarr(tmp_path / "embedding.word_embeddings.weight", tensor, [[0], [0]])
    else:
        dcp.save(
            {"embedding.word_embeddings.weight": tensor}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True
        )
    checkpoint = DistributedCheckpoint(folder_files(tmp_path), "m")
    del tensor
    before = resident_bytes()
    view = checkpoint.open()[0]("embedding.word_embeddings.weight")
    assert resident_bytes() - before < 16 << 20
    assert view.sum() == 0 and resident_bytes() - before > 48 << 20
    del view
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
