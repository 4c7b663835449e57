"""Limits for pickles and for tensors of files that nobody vouches for, checked before anything is unpickled.

A pickle of a few hundred bytes can keep a processor busy for ever: a tuple that holds another one twice, and so on 60
times, takes 2^60 steps to hash as a dict's key. A tensor can claim any shape by strides of 0. It knows no checkpoint.
"""

from __future__ import annotations

import pickle
import pickletools
import sys
import zipfile
from typing import Any, BinaryIO

import torch

MAX_PICKLE_BYTES = 32 << 20  # a checkpoint of 10 000 tensors has 2 MB
_MAX_OPERATIONS = 2_000_000  # 40 for each tensor, or for each shard of one
_MAX_TUPLE = 100_000  # elements of a tuple and of the tuples in it, each as often as it is there
_MAX_DIRECTORY = 8 << 20  # bytes of a zip archive's list of records; PyTorch's have 60 to 150 for each tensor
_BUILDS = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ")  # whose result is as large as what it is made of
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")


def check_pickle(file: BinaryIO, name: str) -> None:
    """Read one pickle's operations without executing them; the file is then behind it.

    Raises ValueError for a pickle of too many operations, or with a tuple of too many elements.
    """
    stack: list[int] = []  # elements of each object; -1: a mark
    memo: dict[int, int] = {}
    count = 0
    try:
        for operation, argument, _ in pickletools.genops(file):
            count += 1
            if count > _MAX_OPERATIONS:
                raise ValueError(f"{name}: its pickle has more than {_MAX_OPERATIONS:,} operations")
            kind = operation.name
            if kind in _PUTS:
                memo[int(str(argument))] = stack[-1]
            elif kind == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif kind in _GETS:
                stack.append(memo.get(int(str(argument)), 1))
            elif kind == "DUP":
                stack.append(stack[-1])
            elif kind == "MARK":
                stack.append(-1)
            else:
                size = _apply(operation, stack)
                if size > _MAX_TUPLE:
                    raise ValueError(f"{name}: its pickle has a tuple of more than {_MAX_TUPLE:,} elements")
    except (IndexError, pickle.UnpicklingError, UnicodeError):
        return  # it cannot be unpickled, and whoever tries says so
    except ValueError as error:
        if str(error).startswith(f"{name}: its pickle"):
            raise
        return


def _apply(operation: Any, stack: list[int]) -> int:
    """Take an operation's objects from the stack and put its results there; the size of the last one."""
    before, size = operation.stack_before, 0
    if pickletools.markobject in before:
        while (top := stack.pop()) != -1:
            size += top
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        size += stack.pop()
    size = size + 1 if operation.name in _BUILDS else 1
    stack.extend([size] * len(operation.stack_after))
    return size


def check_zip(file: BinaryIO, name: str) -> None:
    """Check the pickle and the sizes of a zip archive of torch.save. Raises ValueError, or zipfile.BadZipFile."""
    limited: Any = _Limited(file, name)
    with zipfile.ZipFile(limited) as archive:  # reads the whole list at once, and makes 200 bytes of an empty record
        limited.largest = sys.maxsize
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:  # it could grow without end
                raise ValueError(f"{name}: its record {record.filename} is compressed; not PyTorch's work")
            if "/data/" not in record.filename and record.file_size > MAX_PICKLE_BYTES:
                raise ValueError(
                    f"{name}: its record {record.filename} has {record.file_size:,} bytes; such a record has "
                    f"{MAX_PICKLE_BYTES:,} at most"
                )
            if record.filename.endswith("data.pkl"):
                with archive.open(record) as content:
                    check_pickle(content, name)  # type: ignore[arg-type]
    file.seek(0)


class _Limited:
    """A file that refuses to read more than `largest` bytes at once."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.largest = _MAX_DIRECTORY

    def read(self, size: int = -1) -> bytes:
        if size > self.largest:
            raise ValueError(
                f"{self._name}: its list of records has {size:,} bytes; such a list has {self.largest:,} at most"
            )
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_old_file(file: BinaryIO, name: str) -> None:
    """Check the pickles of a file from before PyTorch 1.6: five, one after the other. Raises ValueError."""
    file.seek(257)
    if file.read(5) == b"ustar":
        raise ValueError(f"{name}: a file of torch.save from before PyTorch 0.1.10, which is not supported")
    file.seek(0)
    for _ in range(5):
        check_pickle(file, name)
    file.seek(0)


def check_tensor(tensor: torch.Tensor, name: str) -> None:
    """Raise ValueError unless its elements lie in the file, each in a place of its own."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"{name} is no plain tensor: {tensor.layout} on {tensor.device.type}".replace("torch.", ""))
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} has shape {list(tensor.shape)}, and the file holds fewer elements")
