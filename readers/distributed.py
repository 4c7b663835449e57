"""Megatron-core's distributed checkpoints, torch_dist and zarr: whole tensors in chunks, independent of the ranks.

Owns both formats, the grid of a tensor's chunks, and layers stacked on a first axis, which are given one by one and
numbered as in a rank's file. A tensor is read on demand, from its own chunks only. It knows no table.

Format: megatron/core/dist_checkpointing (metadata.json: core.py, common state: serialization.py, strategies/torch.py,
strategies/zarr.py of its releases up to 0.9), torch/distributed/checkpoint (metadata.py, filesystem.py); zarr's
specification of version 2.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from math import prod
from typing import Any

import torch

from readers.archive import Place
from readers.pickles import MAX_PICKLE_BYTES, check_pickle, check_tensor
from readers.shards import Shard
from readers.torchfile import StandIn, first_line, load_any, refusal

_MAX_LAYERS = 10_000  # as weights.model_config has it
_METADATA = ".metadata"
_CONFIG = "metadata.json"
_ARRAY = ".zarray"
_COMMON = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"  # since Megatron-core 0.19, instead of the file
_STACKED = re.compile(r"((?:.*\.)?(?:encoder|decoder)\.layers)\.(?!\d)(.+)")  # layers lie on the first axis
_NOT_THE_MODEL = re.compile(r"(?:chained_\d+\.)?optimizer\..*|.*\._extra_state(?:/.*)?")
_ZARR_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# What PyTorch 2.0 and later and Megatron-core write into .metadata.
_RECORD_NAMES = """
torch.distributed.checkpoint.metadata.Metadata torch.distributed.checkpoint.metadata.TensorStorageMetadata
torch.distributed.checkpoint.metadata.BytesStorageMetadata torch.distributed.checkpoint.metadata.ChunkStorageMetadata
torch.distributed.checkpoint.metadata.MetadataIndex torch.distributed.checkpoint.metadata.StorageMeta
torch.distributed.checkpoint.metadata.TensorProperties torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
torch.distributed._shard.sharded_tensor.metadata.TensorProperties
torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING
torch.distributed.checkpoint.filesystem._StorageInfo torch.distributed.checkpoint.filesystem._StoragePrefix
torch.distributed.checkpoint.planner.SavePlan torch.distributed.checkpoint.planner.WriteItem
torch.distributed.checkpoint.planner.WriteItemType torch.distributed.checkpoint.planner.TensorWriteData
torch.distributed.checkpoint.planner.BytesIOWriteData
megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata
megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan
torch.serialization._get_layout pathlib.PosixPath pathlib._local.PosixPath
""".split()


class _Record(StandIn):
    """In the place of an object of .metadata; its state may be a tuple."""

    state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


_RECORDS: dict[str, type[_Record]] = {name: type(name.rpartition(".")[2], (_Record,), {}) for name in _RECORD_NAMES}
_TENSOR = _RECORDS["torch.distributed.checkpoint.metadata.TensorStorageMetadata"]


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor; `read` gives it in `sizes`, `name` is its file."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Whole:
    """One stored tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]

    def read(self, layer: int | None) -> torch.Tensor:
        """All of it, or one of the layers on its first axis: where one chunk holds that, a view of the mapped file."""
        first = 0 if layer is None else 1
        shape = self.shape[first:]
        whole = None
        for chunk in self.chunks:
            at = 0 if layer is None else layer - chunk.offsets[0]
            if layer is not None and not 0 <= at < chunk.sizes[0]:
                continue
            part = chunk.read()
            if (tuple(part.shape), part.dtype) != (chunk.sizes, self.dtype):
                raise ValueError(
                    f"{chunk.name}: holds {list(part.shape)} in {part.dtype}; the metadata says {list(chunk.sizes)} in "
                    f"{self.dtype}"
                )
            part = part[at] if first else part
            if part.shape == shape:
                return part
            whole = torch.empty(shape, dtype=self.dtype) if whole is None else whole
            where = zip(chunk.offsets[first:], chunk.sizes[first:], strict=True)
            whole[tuple(slice(start, start + size) for start, size in where)] = part
        assert whole is not None, (self.key, layer)  # as _check_grid has found
        return whole


class DistributedCheckpoint:
    """The whole model as the tensors of one rank; `files` by their names in the checkpoint's folder, called `name`."""

    def __init__(self, files: dict[str, Place], name: str) -> None:
        self.name = name
        self.files = list(files.values())
        self._files = files

    def headers(self) -> Iterator[Shard]:
        """Every tensor of the model, layers apart. Raises ValueError for an incomplete tensor."""
        for name, (whole, layer) in self._tensors.items():
            yield Shard(name, whole.shape if layer is None else whole.shape[1:], whole.dtype)

    def open(self) -> tuple[Callable[[str], torch.Tensor], bool]:
        """A function that reads a tensor by name, and False: no mapping outlives its tensor."""
        return self._read, False

    @cached_property
    def common_place(self) -> Place:
        """The file with the values saved beside the tensors. Raises ValueError without one."""
        if _COMMON in self._files:
            return self._files[_COMMON]
        blob = self._blobs.get((_COMMON_KEY, None)) if self._backend == "torch_dist" else None
        if blob is None:
            raise ValueError(f"{self.name}: no {_COMMON}, which holds what is saved beside the tensors")
        return blob

    def common(self) -> dict[str, Any]:
        """The content of `common_place`. Raises ValueError."""
        content, _ = load_any(self.common_place)
        if _COMMON not in self._files and isinstance(content, list) and len(content) == 1:
            content = content[0]
        if not isinstance(content, dict):
            raise ValueError(f"{self.common_place.name}: holds {type(content).__name__}; a dict is expected")
        return content

    def _read(self, name: str) -> torch.Tensor:
        whole, layer = self._tensors[name]
        return whole.read(layer)

    @cached_property
    def _tensors(self) -> dict[str, tuple[_Whole, int | None]]:
        """By the name that a rank's file would give: the tensor that holds it, and its place on the first axis."""
        tensors: dict[str, tuple[_Whole, int | None]] = {}
        for whole in self._torch_dist() if self._backend == "torch_dist" else self._zarr():
            _check_grid(whole, self.name)
            stacked = _STACKED.fullmatch(whole.key)
            if stacked and whole.shape and whole.shape[0] > _MAX_LAYERS:
                raise ValueError(f"{self.name}: tensor {whole.key} has {whole.shape[0]} layers; at most {_MAX_LAYERS}")
            layers = range(whole.shape[0]) if stacked and whole.shape else [None]
            for layer in layers:
                name = whole.key if layer is None or stacked is None else f"{stacked[1]}.{layer}.{stacked[2]}"
                if name in tensors:
                    raise ValueError(f"{self.name}: holds both {tensors[name][0].key} and {whole.key}")
                tensors[name] = whole, layer
        return tensors

    @cached_property
    def _backend(self) -> str:
        place = self._files.get(_CONFIG)
        if place is None:
            if _METADATA in self._files:
                return "torch_dist"
            if any(name.endswith(f"/{_ARRAY}") for name in self._files):
                return "zarr"
            raise ValueError(f"{self.name}: neither {_METADATA} (torch_dist) nor {_ARRAY} files (zarr) are there")
        backend = _json(place).get("sharded_backend")
        if backend not in ("torch_dist", "zarr"):
            raise ValueError(f"{place.name}: sharded_backend is {backend!r}; supported: torch_dist, zarr")
        return backend

    # --- torch_dist ---

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        place = self._files.get(_METADATA)
        if place is None:
            raise ValueError(f"{self.name}: {_METADATA} is missing")
        if place.size > MAX_PICKLE_BYTES:
            raise ValueError(f"{place.name}: {place.size:,} bytes; such a file has {MAX_PICKLE_BYTES:,} at most")
        content = io.BytesIO(place.read())
        check_pickle(content, place.name)
        content.seek(0)
        try:
            record = _Unpickler(content).load()
        except pickle.UnpicklingError as error:
            allowed = f"{_METADATA} may hold the checkpoint's metadata only"
            raise ValueError(f"{place.name}: {refusal(error, allowed)}") from None
        except (ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError) as error:
            raise ValueError(f"{place.name}: not a readable pickle ({first_line(error)})") from None
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{place.name}: not a readable pickle ({first_line(error)})") from None
        state = record.state if isinstance(record, _Record) else None
        keys = ("state_dict_metadata", "storage_data")
        if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in keys):
            raise ValueError(f"{place.name}: not the metadata of a checkpoint of torch.distributed.checkpoint")
        return state

    @cached_property
    def _blobs(self) -> dict[tuple[str, tuple[int, ...] | None], Place]:
        """Each chunk's location, by the tensor's key and the chunk's offsets (None for a value that is no tensor)."""
        blobs = {}
        for index, info in self._metadata["storage_data"].items():
            try:
                key, offsets = index.state["fqn"], index.state.get("offset")
                offsets = None if offsets is None else _sizes(offsets)
                file, start, length = (info.state[field] for field in ("relative_path", "offset", "length"))
                is_plain = not info.state.get("transform_descriptors")
                _sizes((start, length))
                assert isinstance(key, str) and isinstance(file, str)
            except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
                raise ValueError(f"{self._files[_METADATA].name}: malformed storage_data") from None
            if _NOT_THE_MODEL.fullmatch(key):
                continue
            place = self._files.get(file)
            if place is None:
                raise ValueError(f"{self._files[_METADATA].name}: names {file!r}, and there is no such file")
            if start + length > place.size:
                raise ValueError(
                    f"{place.name}: {place.size:,} bytes; {key} takes those from {start:,} to {start + length:,}"
                )
            if not is_plain:
                raise ValueError(f"{place.name}: {key} is stored through extensions, such as compression")
            name = f"{place.name}: {key}"
            blobs[key, offsets] = replace(place, offset=place.offset + start, size=length, name=name)
        return blobs

    def _torch_dist(self) -> Iterator[_Whole]:
        name = self._files[_METADATA].name if _METADATA in self._files else self.name
        for key, stored in self._metadata["state_dict_metadata"].items():
            if not isinstance(stored, _TENSOR) or _NOT_THE_MODEL.fullmatch(str(key)):
                continue
            try:
                shape, dtype = _sizes(stored.state["size"]), stored.state["properties"].state[0]
                blocks = [
                    (_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])) for chunk in stored.state["chunks"]
                ]
                assert isinstance(dtype, torch.dtype) and isinstance(key, str)
            except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError):
                raise ValueError(f"{name}: malformed metadata of tensor {key}") from None
            chunks = []
            for offsets, sizes in blocks:
                place = self._blobs.get((key, offsets))
                if place is None:
                    raise ValueError(f"{name}: tensor {key}: the chunk at {list(offsets)} is in no file")
                if not 0 < prod(sizes) * dtype.itemsize <= place.size:
                    raise ValueError(f"{place.name}: {place.size:,} bytes; a chunk of {list(sizes)} does not fit in")
                chunks.append(_Chunk(place.name, offsets, sizes, partial(_blob_tensor, place)))
            yield _Whole(key, shape, dtype, chunks)

    # --- zarr ---

    def _zarr(self) -> Iterator[_Whole]:
        for name, place in self._files.items():
            key, _, last = name.rpartition("/")
            if last == _ARRAY and not _NOT_THE_MODEL.fullmatch(key):
                yield self._zarr_array(key, place)

    def _zarr_array(self, key: str, place: Place) -> _Whole:
        array = _json(place)
        for field, allowed in (
            ("zarr_format", (2,)),
            ("compressor", (None,)),
            ("filters", (None, [])),
            ("order", ("C",)),
            ("dimension_separator", (".", "/")),
            ("dtype", tuple(_ZARR_DTYPES)),
        ):
            value = array.get(field, "." if field == "dimension_separator" else None)
            value = value.get("id", value) if isinstance(value, dict) else value
            if value not in allowed:
                raise ValueError(
                    f"{place.name}: {field} is {str(value)[:80]!r}; supported: {', '.join(map(str, allowed))}"
                )
        try:
            shape, blocks = _sizes(array["shape"]), _sizes(array["chunks"])
            counts = [-(-size // block) for size, block in zip(shape, blocks, strict=True)]
        except (ArithmeticError, KeyError, TypeError, ValueError):
            raise ValueError(f"{place.name}: malformed shape or chunks") from None
        dtype = _ZARR_DTYPES[array["dtype"]]
        num_bytes = prod(blocks) * dtype.itemsize
        chunks = []
        if prod(counts) > len(self._files):
            raise ValueError(
                f"{place.name}: {prod(counts):,} chunks, and the checkpoint has {len(self._files):,} files"
            )
        for index in product(*map(range, counts)):
            file = f"{key}/{array.get('dimension_separator', '.').join(map(str, index)) or '0'}"
            chunk = self._files.get(file)
            if chunk is None:
                raise ValueError(f"{place.name}: the chunk {file} is missing")
            if chunk.size != num_bytes:
                raise ValueError(f"{chunk.name}: {chunk.size:,} bytes; a chunk of {list(blocks)} has {num_bytes:,}")
            offsets = tuple(at * block for at, block in zip(index, blocks, strict=True))
            sizes = tuple(min(block, size - at) for at, block, size in zip(offsets, blocks, shape, strict=True))
            chunks.append(_Chunk(chunk.name, offsets, sizes, partial(_raw_tensor, chunk, dtype, blocks, sizes)))
        return _Whole(key, shape, dtype, chunks)


class _Unpickler(pickle._Unpickler):
    """Unpickles .metadata: numbers, text, tuples, lists and dicts, torch's dtypes, and records that do nothing.

    In Python: the one in C makes room for as many objects as a number in the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return _size
        if f"{module}.{name}" not in _RECORDS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _RECORDS[f"{module}.{name}"]


def _check_grid(whole: _Whole, name: str) -> None:
    """Raises ValueError unless the chunks make up the tensor: all blocks between cuts of each axis, and each once."""
    why = ""
    cuts: list[dict[int, int]] = []
    for axis, length in enumerate(whole.shape):
        starts = sorted({chunk.offsets[axis] for chunk in whole.chunks if len(chunk.offsets) == len(whole.shape)})
        ends = [*starts[1:], length]
        cuts.append(dict(zip(starts, ends, strict=True)) if starts else {0: length})
        if starts[:1] != [0]:
            why = f"none starts at 0 of axis {axis}"
    for chunk in whole.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(whole.shape):
            why = f"one has shape {list(chunk.sizes)} at {list(chunk.offsets)}"
        elif any(
            start + size != ends[start] for start, size, ends in zip(chunk.offsets, chunk.sizes, cuts, strict=True)
        ):
            why = why or f"that of {list(chunk.sizes)} at {list(chunk.offsets)} leaves a hole or overlaps"
    distinct = len({chunk.offsets for chunk in whole.chunks})
    if not why and not len(whole.chunks) == distinct == prod(map(len, cuts)):
        why = f"{len(whole.chunks)} of {prod(map(len, cuts))} are there"
    if why:
        raise ValueError(
            f"{name}: the chunks of tensor {whole.key} do not make up its shape {list(whole.shape)}; {why}"
        )


def _sizes(values: Any) -> tuple[int, ...]:
    """A tuple of whole numbers. Raises TypeError or ValueError for anything else."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def _size(values: Any = ()) -> tuple[int, ...]:
    """torch.Size, of numbers only."""
    if not all(isinstance(value, int) for value in values):
        raise pickle.UnpicklingError("torch.Size of something else than numbers")
    return tuple(values)


def _blob_tensor(place: Place) -> torch.Tensor:
    content, _ = load_any(place)
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"{place.name} is {type(content).__name__}; a tensor is expected")
    check_tensor(content, place.name)
    return content.detach()


def _raw_tensor(place: Place, dtype: torch.dtype, blocks: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """A chunk without a header; those at the far ends are as large as the others."""
    mapped = torch.UntypedStorage.from_file(str(place.path), False, place.path.stat().st_size)
    storage = mapped[place.offset : place.offset + place.size]  # aligned, in a tar archive too
    block = torch.empty(0, dtype=dtype).set_(storage).view(blocks)
    return block[tuple(slice(size) for size in sizes)]


def _json(place: Place) -> dict[str, Any]:
    try:
        content = json.loads(place.read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place.name}: not a JSON file ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place.name}: a JSON object is expected, not {type(content).__name__}")
    return content
