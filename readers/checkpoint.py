"""A Hugging Face folder's weight files: safetensors or pytorch_model.bin, in one file or in shards.

Owns the location of each tensor, the bound on memory while tensors are read one after another, and one sentence for
each way in which such files can be broken. It knows no architecture.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from readers.pickles import check_old_file, check_tensor, check_zip
from readers.torchfile import first_line, refusal

# Everything from which AutoTokenizer and GenerationConfig can be read; config.json tells AutoTokenizer the class.
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
# Bytes. A vocabulary of 256 000 tokens has 33 MB as tokenizer.json; the index of 160 000 tensors has 16 MB.
_LARGEST_FILES = {"tokenizer.json": 128 << 20, "tokenizer.model": 64 << 20, "spiece.model": 64 << 20}
_LARGEST_FILE = 16 << 20
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_DATA_TYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # safetensors' name -> ours
_TORCH_NAMES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# Pages that were read through a mapping count as this process's memory until the mapping goes: a file is opened
# anew after this many bytes.
_REOPEN_BYTES = 64 << 20


@dataclass(frozen=True)
class Weight:
    """One weight of FasterTransformer's table, ready to be read.

    `load` gives the whole tensor in the table's shape, in the source's data type; it may be a view of a mapped
    file, in any strides. `origin` is the source's file and tensor, for messages.
    """

    name: str
    origin: str
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """A tensor's header in a checkpoint; `data_type` is fp64, fp32, fp16, bf16 or a foreign name."""

    path: Path
    shape: tuple[int, ...]
    data_type: str

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError for anything else."""
    try:
        check_size(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(content).__name__}")
    return content


def check_size(path: Path) -> None:
    """Raise ValueError for a file of settings or of a tokenizer that is too large to be one."""
    size, most = path.stat().st_size, _LARGEST_FILES.get(path.name, _LARGEST_FILE)
    if size > most:
        raise ValueError(f"{path}: {size:,} bytes; such a file has {most:,} at most")


def tokenizer_files(folder: Path) -> list[Path]:
    """The existing files of a Hugging Face folder that its tokenizer needs. Raises ValueError for a huge one."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for path in files:
        check_size(path)
    return files


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files (the files themselves where the Hub's cache holds links)."""
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)


class Checkpoint:
    """The tensors of one Hugging Face folder, by name; opens files when they are needed, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Find the weight files. Raises ValueError where there are none or a shard is missing."""
        self.folder = folder
        self._index: dict[str, str] = {}  # tensor -> shard, as the index says; empty without an index
        self.files, self._shards = self._find()
        self._open: _SafetensorsFile | _PickleFile | None = None
        self._read_bytes = 0  # through the open file's mapping

    def _find(self) -> tuple[list[Path], list[Path]]:
        for name in _WEIGHT_FILES:
            whole, index = self.folder / name, self.folder / f"{name}.index.json"
            if whole.is_file():
                return [whole], [whole]
            if index.is_file():
                self._index = _read_index(index)
                shards = [self.folder / shard for shard in sorted(set(self._index.values()))]
                for shard in shards:
                    if not shard.is_file():
                        raise ValueError(f"{index}: names {shard.name}, and there is no such file")
                return [index, *shards], shards
        raise ValueError(f"{self.folder}: neither {' nor '.join(_WEIGHT_FILES)} (whole or with an index) is there")

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor's place, shape and data type, from the headers alone. Raises ValueError."""
        entries: dict[str, Entry] = {}
        for path in self._shards:
            for name, entry in self._file(path).entries().items():
                if name in entries:
                    raise ValueError(f"{path}: tensor {name} is in {entries[name].path.name} too")
                entries[name] = entry
        for name, shard in self._index.items():
            if name not in entries or entries[name].path.name != shard:
                raise ValueError(f"{self.folder / shard}: tensor {name}, which the index places here, is missing")
        return entries

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as a view of the mapped file: memory is taken when its elements are read."""
        entry = self.entries[name]
        file = self._file(entry.path)
        tensor = file.tensor(name)
        self._read_bytes += tensor.nbytes
        return tensor

    def origin(self, name: str) -> str:
        """The file and the tensor, for messages."""
        return f"{self.entries[name].path}: tensor {name}"

    def _file(self, path: Path) -> _SafetensorsFile | _PickleFile:
        current = self._open
        if current is not None and current.path == path:
            if not current.mapped or self._read_bytes < _REOPEN_BYTES:
                return current
        self._open = current = None  # lets go of the old mapping before the new one is made
        self._open = (_SafetensorsFile if path.suffix == ".safetensors" else _PickleFile)(path)
        self._read_bytes = 0
        return self._open


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path}: tensor {name} is in {shard!r}; a file of the same folder is expected")
    return weight_map


class _SafetensorsFile:
    mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({first_line(error)})") from None

    def entries(self) -> dict[str, Entry]:
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        return {
            name: Entry(self.path, tuple(part.get_shape()), _DATA_TYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


class _PickleFile:
    """A .bin file of torch.save; nothing but tensors is unpickled.

    Files from before PyTorch 1.6 cannot be mapped: those are held in memory as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.mapped = file.read(4) == b"PK\x03\x04"
            try:
                (check_zip if self.mapped else check_old_file)(file, str(path))
            except zipfile.BadZipFile as error:
                raise ValueError(f"{path}: not a complete PyTorch file ({error})") from None
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped or None)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {refusal(error, 'a .bin file may hold tensors only')}") from None
        except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a complete PyTorch file ({first_line(error)})") from None
        if not isinstance(tensors, dict):
            raise ValueError(f"{path}: holds {type(tensors).__name__}; a dict of tensors is expected")
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{path}: {name!s:.200} is {type(tensor).__name__}; a dict of tensors is expected")
            check_tensor(tensor, f"{path}: tensor {name!s:.200}")
        self._tensors: dict[str, torch.Tensor] = tensors

    def entries(self) -> dict[str, Entry]:
        return {
            name: Entry(self.path, tuple(tensor.shape), _torch_name(tensor.dtype))
            for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


def _torch_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _TORCH_NAMES.get(name, name)
