#!/usr/bin/env python3
"""Converts a checkpoint into FasterTransformer's weight folder, `OUTPUT_DIR/<tp>-gpu`.

    ./convert.py SOURCE OUTPUT_DIR --tp 4 --weight-data-type fp16
    ./convert.py megatron_345m OUTPUT_DIR --num-heads 16 --tokenizer gpt2_folder
    ./convert.py --verify OUTPUT_DIR/4-gpu

This file owns the writing: split, cast, checksums, manifest, lock, and the rename that publishes a finished folder.
The readers know the source's layout; weights/table.py knows the files' names and split axes.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.flags import add_flags, flag, from_flags
from helpers import ProgressLine, one_line
from readers import SourceOptions, Weight, open_reader
from readers.casting import cast, computed_ahead
from readers.checkpoint import read_json
from weights.model_config import DATA_TYPES, ModelConfig
from weights.reader import TORCH_DTYPES
from weights.table import WeightSpec, weight_specs

try:
    from zlib_ng.zlib_ng import crc32  # zlib's values at four times its rate
except ImportError:
    from zlib import crc32

CONVERTER_VERSION = 3  # part of a folder's identity: raise it when the same source gives other bytes
MANIFEST = "manifest.json"

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)

_LOCK = ".convert.lock"
_CHUNK_BYTES = 8 << 20  # cast and written at once
_WRITE_BYTES = 64 << 10  # a call, as cp does; ext4 took calls of 128 KiB at two thirds, of 1 MiB at half of the rate
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h
_libc = ctypes.CDLL(None)
_log = logging.getLogger("convert")


@dataclass(frozen=True)
class ConversionFlags(SourceOptions):
    """Flags of a conversion, for convert.py and server.py: the source's options and the target."""

    tp: int = flag(1, "tensor parallel size: ranks that share each layer")
    weight_data_type: str = flag(
        "auto", "number format of the weight files; auto: the checkpoint's own", choices=("auto", *DATA_TYPES)
    )
    model_name: str = flag(
        "", "the model's name, in config.ini (convert.py) or in Triton (server.py); by default the checkpoint's"
    )
    verbose: bool = flag(False, "show tracebacks; server.py logs more, too, with Triton's own log")

    @property
    def source_options(self) -> SourceOptions:
        """The source's options alone; no heads where the flag is 0."""
        return SourceOptions(self.tokenizer and self.tokenizer.expanduser(), self.num_heads or None)


@dataclass(frozen=True)
class Names:
    """Texts that a folder records; no weight depends on them."""

    model_name: str = ""  # of config.ini; empty: source_name, or else the source's own name
    source_name: str = ""  # of the manifest: the checkpoint as the user named it; empty: its path
    revision: str | None = None  # of the manifest


def convert(
    source: Path,
    output_dir: Path,
    tp: int,
    weight_data_type: str,
    names: Names | None = None,
    progress: Progress = lambda done, total: None,
    options: SourceOptions | None = None,
) -> Path:
    """Write output_dir/<tp>-gpu and return it; returns at once if it was made from the same files before.

    weight_data_type: fp32, fp16, bf16, or auto for the source's own. names: texts that the folder records.
    options: facts that the source lacks. progress: called with (bytes written, bytes in all).
    Two converters on one output_dir take turns. Raises ValueError for a source that cannot be converted,
    RuntimeError for lack of disk space, OSError for other errors of the file system; no error leaves files behind.
    """
    names, options = names or Names(), options or SourceOptions()
    if weight_data_type not in ("auto", *DATA_TYPES):
        raise ValueError(f"weight_data_type is {weight_data_type!r}; known: auto, {', '.join(DATA_TYPES)}")
    reader = open_reader(source, options, scratch=output_dir)
    model_name = names.model_name or names.source_name or source.resolve().name
    folder = output_dir / f"{tp}-gpu"
    wanted = {
        "converter_version": CONVERTER_VERSION,
        "source_files": [_file_identity(path) for path in reader.files],
        "tensor_para_size": tp,
    }
    if options != SourceOptions():
        wanted["source_options"] = options.describe()
    if _is_finished(folder, wanted, weight_data_type):
        return folder
    reader.config("fp32", tp, model_name).check_tp(tp)  # before anything is made
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a link or a file; the weights need a folder of their own there")
    output_dir.mkdir(parents=True, exist_ok=True)
    with _locked(output_dir) as is_locked:
        if _is_finished(folder, wanted, weight_data_type):
            return folder
        if is_locked:  # without a lock they may be another converter's
            _remove_leftovers(output_dir)
        source_data_type = reader.data_type()
        config = reader.config(source_data_type if weight_data_type == "auto" else weight_data_type, tp, model_name)
        weights = reader.weights(config)
        specs = {spec.name: spec for spec in weight_specs(config)}
        total = sum(specs[weight.name].num_elements(tp) for weight in weights) * DATA_TYPES[config.weight_data_type]
        if (free := shutil.disk_usage(output_dir).free) < total:
            raise RuntimeError(f"{output_dir}: the conversion needs {total:,} bytes, and {free:,} are free")
        with _temporary_folder(folder, total) as temporary:
            writer = _Writer(temporary, config, total, progress)
            writer.write([(specs[weight.name], weight) for weight in weights])
            reader.write_tokenizer(temporary)
            config.write(temporary / "config.ini")
            writer.finish(
                wanted
                | {"source_name": names.source_name or str(source), "revision": names.revision}
                | {"source_data_type": source_data_type, "weight_data_type": config.weight_data_type}
            )
            _publish(temporary, folder)
    return folder


def verify(folder: Path, checksums: bool = False) -> None:
    """Check a finished folder against its manifest: every file's size, and its checksum on demand.

    A folder without a manifest comes from FasterTransformer's own converter (ours publishes none): its files'
    sizes are checked when they are loaded (weights.table.ShardReader). config.ini may be edited by hand and
    is not compared. Raises ValueError naming the first file that is wrong.
    """
    if not (folder / "config.ini").is_file():
        raise ValueError(f"{folder}: no config.ini, so this is not a weight folder")
    manifest = folder / MANIFEST
    if not manifest.exists():
        if checksums:
            raise ValueError(f"{folder}: no {MANIFEST}, so there are no checksums to compare with")
        return
    files = read_json(manifest).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and entry.keys() >= {"size", "crc32"} for entry in files.values()
    ):
        raise ValueError(f"{manifest}: no list of files with their sizes and checksums")
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: the file is missing") from None
        if size != expected["size"]:
            raise ValueError(f"{path}: {size} bytes; the manifest says {expected['size']}")
        if checksums and (crc := _file_crc32(path)) != expected["crc32"]:
            raise ValueError(f"{path}: checksum {crc}; the manifest says {expected['crc32']}")


class _Writer:
    """Writes the files of one folder and keeps their sizes and checksums for the manifest."""

    def __init__(self, folder: Path, config: ModelConfig, total: int, progress: Progress) -> None:
        self._folder = folder
        self._tp = config.tensor_para_size
        self._data_type = config.weight_data_type
        self._total = total
        self._done = 0
        self._progress = progress
        self._files: dict[str, dict[str, Any]] = {}

    def write(self, weights: list[tuple[WeightSpec, Weight]]) -> None:
        """Read, split and cast the weights and write each rank's files: threads cast, this one writes."""
        pieces = (piece for spec, weight in weights for piece in self._pieces(spec, weight))
        with computed_ahead(self._cast, pieces) as arrays:
            for name, group in groupby(arrays, lambda piece: piece[0]):
                crc = size = 0
                with (self._folder / name).open("xb") as file:
                    for _, data in group:
                        for start in range(0, data.nbytes, _WRITE_BYTES):
                            file.write(data[start : start + _WRITE_BYTES])
                            crc = crc32(data[start : start + _WRITE_BYTES], crc)
                        size += data.nbytes
                        self._done += data.nbytes
                        self._progress(self._done, self._total)
                    file.flush()
                    _start_writing(file.fileno())
                self._files[name] = {"size": size, "crc32": f"{crc:08x}"}

    def _pieces(self, spec: WeightSpec, weight: Weight) -> Iterator[tuple[str, torch.Tensor, str]]:
        """One weight's files in chunks of rows: (file name, rows, origin for messages)."""
        tensor = weight.load()
        assert tuple(tensor.shape) == spec.shape, (spec, tuple(tensor.shape))
        for tp_rank in range(1 if spec.split_axis is None else self._tp):
            shard = spec.shard(tensor, self._tp, tp_rank)
            assert tuple(shard.shape) == spec.shard_shape(self._tp), (spec, tuple(shard.shape))
            row_bytes = prod(shard.shape[1:]) * DATA_TYPES[self._data_type]
            for rows in shard.split(max(1, _CHUNK_BYTES // row_bytes)):
                yield spec.file_name(tp_rank), rows, weight.origin

    def _cast(self, piece: tuple[str, torch.Tensor, str]) -> tuple[str, np.ndarray]:
        name, rows, origin = piece
        return name, cast(rows, TORCH_DTYPES[self._data_type], origin).flatten().view(torch.uint8).numpy()

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the manifest, which lists the other files of the folder, too, and force all files to the disk."""
        for path in sorted(self._folder.iterdir()):
            if path.name not in self._files and path.name != "config.ini":
                self._files[path.name] = {"size": path.stat().st_size, "crc32": _file_crc32(path)}
            _sync(path)
        manifest = self._folder / MANIFEST
        manifest.write_text(json.dumps(facts | {"files": self._files}, indent=1) + "\n")
        _sync(manifest)
        _sync(self._folder)


@contextmanager
def _locked(output_dir: Path) -> Iterator[bool]:
    """Hold output_dir's lock, waiting for it; yields False on a file system that has no locks."""
    with (output_dir / _LOCK).open("a") as file:
        is_locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("%s: waiting for another converter to finish", output_dir)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # Lustre without -o flock, for one: the rename alone must do
            _log.warning("%s: cannot be locked against a second converter (%s)", output_dir, error.strerror)
            is_locked = False
        yield is_locked


@contextmanager
def _temporary_folder(folder: Path, total: int) -> Iterator[Path]:
    """A new folder beside `folder`, with the umask's rights; gone at the end unless it was renamed."""
    temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
    except OSError as error:
        if error.errno not in _OUT_OF_SPACE:
            raise
        raise RuntimeError(
            f"{folder.parent}: {os.strerror(error.errno)}; the conversion needs {total:,} bytes"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename a complete temporary folder to its final name; an older folder there is replaced or kept aside."""
    old = None
    if folder.exists():
        if (folder / MANIFEST).exists() or not any(folder.iterdir()):
            old = folder.parent / temporary.name.replace(".tmp-", ".old-")
        else:  # not ours, so not ours to delete
            old = folder.parent / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"
            _log.warning("%s: has no %s; it is kept as %s", folder, MANIFEST, old.name)
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    if old is not None and ".old-" in old.name:
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(output_dir: Path) -> None:
    """Delete the temporary folders of killed converters; the caller holds the lock."""
    for kind in ("tmp", "old"):
        for path in sorted(output_dir.glob(f".*-gpu.{kind}-*")):
            _log.info("%s: left behind by a converter that was killed; deleted", path)
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def _is_finished(folder: Path, wanted: dict[str, Any], weight_data_type: str) -> bool:
    """Whether a folder was made from the same files for the same tp and data type, and is whole."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        verify(folder)
        manifest = read_json(folder / MANIFEST)
    except ValueError as error:
        _log.warning("%s; converting anew", error)
        return False
    data_type = manifest.get("source_data_type") if weight_data_type == "auto" else weight_data_type
    return manifest | wanted | {"weight_data_type": data_type} == manifest


def _file_identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _file_crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = crc32(chunk, crc)
    return f"{crc:08x}"


def _start_writing(fd: int) -> None:
    """Start writing a file to the disk; else `_Writer.finish` would wait for one file after another."""
    # posix_fadvise(DONTNEED) does this, too, but drops the pages, and the server loads them next. Errors are ignored:
    # without this call, finish's fsync does all the work.
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)  # 0, 0: the whole file


def _sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 and a usage line for a wrong one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a Hugging Face folder; NeMo: a .nemo archive, its unpacked folder, or a folder of Lightning checkpoints; "
        "Megatron-LM: a folder of iterations, or one iteration",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", nargs="?", help="where <tp>-gpu is written")
    parser.add_argument("--verify", action="store_true", help="SOURCE is a finished folder: check its checksums")
    add_flags(parser, ConversionFlags, "conversion")
    flags = parser.parse_args(argv)
    if flags.verify == bool(flags.output_dir):
        parser.error("OUTPUT_DIR is needed, except with --verify")
    for name in ("tp", "num_heads"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is below 1")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 1, with one sentence on stderr, for an error."""
    flags = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start, progress = time.monotonic(), ProgressLine()
    try:
        if flags.verify:
            verify(flags.source, checksums=True)
            print(f"{flags.source}: every file is as it was written")
            return 0
        folder = convert(
            flags.source,
            flags.output_dir,
            flags.tp,
            flags.weight_data_type,
            Names(flags.model_name),
            progress,
            from_flags(ConversionFlags, flags).source_options,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if flags.verbose:
            raise
        if isinstance(error, OSError) and error.filename:
            error = OSError(f"{error.filename}: {error.strerror}")
        print(f"convert.py: {one_line(error)}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    rate = f"{progress.done:,} bytes in {seconds:.1f} s, {progress.done / 1e6 / seconds:.0f} MB/s"
    print(f"{folder}: {rate if progress.done else 'already there'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds, and so cleans up
    sys.exit(main())
