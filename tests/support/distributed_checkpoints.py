"""Distributed checkpoints as Megatron-core writes them: torch_dist by torch.distributed.checkpoint itself, and zarr.

The layout is written down from megatron/core: transformer_block.py (layers stacked), mlp.py (the halves of a gate),
dist_checkpointing/strategies/zarr.py and zarr's specification. Nothing here imports a reader.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from tests.support.nemo_checkpoints import Tensors, nemo_names, write_megatron, write_nemo

ITERATION = "iter_0000500"
Cuts = list[list[int]]  # by axis: where its chunks start
Edit = Callable[[Path], Any]
_SPLIT = {  # the axis of one layer's [out, in] that tensor parallelism splits
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
}


def whole_tensors(model: Any, prefix: str, stacked: bool) -> Tensors:
    """The model as Megatron-core's sharded state dict has it; `stacked`: each part of all layers is one tensor."""
    names = nemo_names(model.shard(1, 1, 0, 0), "core")
    flat = {f"{prefix}{name.removeprefix('model.')}": t for name, t in names.items() if "_extra_state" not in name}
    if not stacked:
        return flat
    tensors: Tensors = {}
    for name, tensor in flat.items():
        found = re.fullmatch(r"(.*\.layers)\.0\.(.*)", name)
        if found:
            layers = [flat[f"{found[1]}.{layer}.{found[2]}"] for layer in range(model.layers)]
            tensors[f"{found[1]}.{found[2]}"] = torch.stack(layers)
        elif ".layers." not in name:
            tensors[name] = tensor
    return tensors


def cuts(name: str, tensor: torch.Tensor, tp: int, stacked: bool, gated: bool, uneven: bool) -> Cuts:
    """A chunk for each layer and each rank, and two where a gate's matrix is above another; `uneven`: of two sizes."""
    is_layer = stacked and ".layers." in name
    split = next((axis + is_layer for part, axis in _SPLIT.items() if name.endswith(part)), None)
    starts = []
    for axis, size in enumerate(tensor.shape):
        count = size if is_layer and axis == 0 else tp * (1 + (gated and "fc1" in name)) if axis == split else 1
        starts.append(list(range(0, size, size // count)))
        if uneven and axis == split:
            starts[-1] = [0, *(start + 3 for start in starts[-1][1:])]
    return starts


class ChunkPlanner(dcp.DefaultSavePlanner):
    """Saves each tensor in chunks, as many ranks do together."""

    def __init__(self, all_cuts: dict[str, Cuts]) -> None:
        super().__init__(flatten_state_dict=False)
        self._cuts = all_cuts

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, value in self.state_dict.items():
            if isinstance(value, io.BytesIO):
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            for index, (offsets, sizes) in enumerate(blocks(value.shape, self._cuts[name])):
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(value), value.size())
                place = MetadataIndex(name, torch.Size(offsets), index)
                items.append(WriteItem(place, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        value = self.state_dict[item.index.fqn]
        if isinstance(value, io.BytesIO):
            return value
        chunk = item.tensor_data.chunk
        where = (slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return value[tuple(where)].clone().contiguous()


def blocks(shape: tuple[int, ...], starts: Cuts) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each chunk's offsets and sizes."""
    for offsets in product(*starts):
        ends = ([*at[1:], size][at.index(start)] for start, at, size in zip(offsets, starts, shape, strict=True))
        yield offsets, tuple(end - start for start, end in zip(offsets, ends, strict=True))


def write_distributed(
    folder: Path,
    model: Any,
    form: str,
    prefix: str = "",
    tp: int = 2,
    stacked: bool = True,
    uneven: bool = False,
    dtype: torch.dtype = torch.float32,
    common: dict[str, Any] | None = None,
    common_inside: bool = False,
    others: Tensors | None = None,
) -> None:
    """Write a distributed checkpoint's folder, of `form` torch_dist or zarr; `others`: tensors beside the model's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in whole_tensors(model, prefix, stacked).items()}
    gated = getattr(model, "kind", "nemotron") != "nemotron"
    all_cuts = {name: cuts(name, tensor, tp, stacked, gated, uneven) for name, tensor in tensors.items()}
    for name, tensor in (others or {}).items():
        tensors[name], all_cuts[name] = tensor, [[0]] * tensor.ndim
    extra = f"{prefix}decoder.layers.self_attention.linear_qkv._extra_state"
    if form == "torch_dist":
        state: dict[str, Any] = dict(tensors)
        state |= {f"{extra}/shard_{layer}_{model.layers}": saved([io.BytesIO(b"fp8")]) for layer in range(model.layers)}
        if common_inside:
            state["common_state/shard_0_1"] = saved([common])
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder, thread_count=2),
            planner=ChunkPlanner(all_cuts),
            no_dist=True,
        )
    else:
        for name, tensor in tensors.items():
            write_zarr(folder / name, tensor, all_cuts[name])
        (folder / extra).mkdir()
        torch.save(io.BytesIO(b"fp8"), folder / extra / f"shard_0_{model.layers}.pt")
    if not common_inside:
        torch.save(common or {}, folder / "common.pt")
    versions = dict(sharded_backend_version=1, common_backend="torch", common_backend_version=1)
    (folder / "metadata.json").write_text(json.dumps(dict(sharded_backend=form) | versions))


def saved(content: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer


def write_zarr(folder: Path, tensor: torch.Tensor, starts: Cuts) -> None:
    """An array of zarr's version 2: `.zarray`, and a file a chunk, all of the first one's sizes."""
    folder.mkdir()
    chunks = [[*at[1:], size][0] for at, size in zip(starts, tensor.shape, strict=True)]
    names = {torch.float32: "<f4", torch.float16: "<f2", torch.float64: "<f8", torch.bfloat16: "bfloat16"}
    header = dict(chunks=chunks, compressor=None, dtype=names[tensor.dtype], fill_value=None, filters=None, order="C")
    header |= dict(shape=list(tensor.shape), zarr_format=2)
    (folder / ".zarray").write_text(json.dumps(header, indent=4))
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    for index in np.ndindex(*(-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True))):
        block = np.full(chunks, 77, array.dtype)  # what lies beyond the array is whatever was in memory
        part = array[tuple(slice(at * size, (at + 1) * size) for at, size in zip(index, chunks, strict=True))]
        block[tuple(slice(size) for size in part.shape)] = part
        (folder / ".".join(map(str, index))).write_bytes(block.tobytes())


def write_nemo_distributed(
    target: Path, model: Any, form: str, packed: str = "w:", edit: Edit = lambda folder: None, **what: Any
) -> Path:
    """`write_nemo` of Megatron-core's modules with the weights in model_weights/; `settings` are the model's."""
    settings = what.pop("settings", {})

    def replace_weights(folder: Path) -> None:
        (folder / "model_weights.ckpt").unlink()
        write_distributed(folder / "model_weights", model, form, what.pop("prefix", "model."), **what)
        edit(folder / "model_weights")

    return write_nemo(target, model, style="core", packed=packed, edit=replace_weights, **settings)


def write_megatron_distributed(
    folder: Path,
    model: Any,
    form: str,
    edit: Edit = lambda folder: None,
    args: dict[str, Any] | None = None,
    **what: Any,
) -> Path:
    """`write_megatron` with a distributed checkpoint in the iteration's folder; an optimizer's state lies beside."""
    source = write_megatron(folder, model, **(args or {}))
    content = torch.load(source / ITERATION / "mp_rank_00/model_optim_rng.pt", weights_only=False)
    shutil.rmtree(source / ITERATION)
    values = vars(content["args"]) | {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}
    common = dict(args=argparse.Namespace(**values), checkpoint_version=3.0, iteration=500)
    common |= dict(optimizer={"optimizer": {"param_groups": [{"lr": 1e-4}]}}, content_metadata={"singleton": False})
    others = {f"{name}.exp_avg.decoder.final_layernorm.weight": torch.ones(8) for name in ("optimizer.state",)}
    others["chained_0.optimizer.distributed.dp_group_idx_0.param"] = torch.ones(8)
    write_distributed(source / ITERATION, model, form, common=what.pop("common", common), others=others, **what)
    edit(source / ITERATION)
    return source


def edit_metadata(edit: Callable[[Any], Any]) -> Edit:
    """Change .metadata."""

    def act(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        edit(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return act
