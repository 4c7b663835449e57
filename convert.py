#!/usr/bin/env python3
"""Converts a checkpoint into FasterTransformer's weight folder, `OUTPUT_DIR/<tp>-gpu`.

    ./convert.py SOURCE OUTPUT_DIR --tp 4 --weight-data-type fp16
    ./convert.py megatron_345m OUTPUT_DIR --num-heads 16 --tokenizer gpt2_folder
    ./convert.py --verify OUTPUT_DIR/4-gpu

Owns the writing: split, cast, checksums, manifest, lock, and the one rename that makes a folder appear finished.
What a source looks like is the readers' business; what the files are called and how they are split,
weights.table'.
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
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

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

CONVERTER_VERSION = 2  # part of a folder's identity: raise it when the same source gives other bytes
MANIFEST = "manifest.json"
NO_OPTIONS = SourceOptions()

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)

_LOCK = ".convert.lock"
_CHUNK_BYTES = 8 << 20  # cast and written at once
_WRITE_BYTES = 64 << 10  # a call, as cp does; ext4 took calls of 128 KiB at two thirds, of 1 MiB at half of the rate
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h
_libc = ctypes.CDLL(None)
_log = logging.getLogger("convert")


def convert(
    source: Path,
    output_dir: Path,
    tp: int,
    weight_data_type: str,
    model_name: str | None = None,
    source_name: str = "",
    revision: str | None = None,
    progress: Progress = lambda done, total: None,
    options: SourceOptions = NO_OPTIONS,
) -> Path:
    """Write output_dir/<tp>-gpu and return it; returns at once where it is there, made from the same files.

    `weight_data_type` is fp32, fp16, bf16, or auto for the source's own. `source_name` and `revision` (what the
    user asked for and what it resolved to) go into the manifest only; `options` tell what the source does not.
    Two converters on one output_dir take turns. Raises ValueError for a source that cannot be converted,
    RuntimeError for lack of disk space, OSError for what else the file system refuses; none of them leaves
    anything behind.
    """
    source, output_dir = Path(source), Path(output_dir)
    if weight_data_type not in ("auto", *DATA_TYPES):
        raise ValueError(f"weight_data_type is {weight_data_type!r}; known: auto, {', '.join(DATA_TYPES)}")
    reader = open_reader(source, options, scratch=output_dir)
    model_name = model_name or source_name or source.resolve().name
    folder = output_dir / f"{tp}-gpu"
    wanted = {
        "converter_version": CONVERTER_VERSION,
        "source_files": [_file_identity(path) for path in reader.files],
        "tensor_para_size": tp,
    }
    if options != NO_OPTIONS:
        wanted["source_options"] = options.describe()
    if _is_finished(folder, wanted, weight_data_type):
        return folder
    reader.config("fp32", tp, model_name).check_tp(tp)  # before anything is made
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
        _check_space(output_dir, total)
        with _temporary_folder(folder, total) as temporary:
            writer = _Writer(temporary, config, total, progress)
            writer.write([(specs[weight.name], weight) for weight in weights])
            reader.write_tokenizer(temporary)
            config.write(temporary / "config.ini")
            writer.finish(
                wanted
                | {"source_name": source_name or str(source), "revision": revision}
                | {"source_data_type": source_data_type, "weight_data_type": config.weight_data_type}
            )
            _publish(temporary, folder)
    return folder


def verify(folder: Path, checksums: bool = False) -> None:
    """Check a finished folder against its manifest: every file's size, and its checksum where asked.

    A folder without a manifest comes from FasterTransformer's own converter (ours publishes none): its files'
    sizes are checked when they are loaded (weights.table.ShardReader). config.ini may be edited by hand and
    is not compared. Raises ValueError naming the first file that is wrong.
    """
    folder = Path(folder)
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
        """One weight's files, a chunk of rows at a time: the file's name, the rows, where they are from."""
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
        """Write the manifest, with whatever else lies in the folder, and force everything to the disk."""
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
    """Rename a complete temporary folder to its final name, in place of what is there."""
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
    """Delete what converters that were killed left behind; the caller holds the lock."""
    for kind in ("tmp", "old"):
        for path in sorted(output_dir.glob(f".*-gpu.{kind}-*")):
            _log.info("%s: left behind by a converter that was killed; deleted", path)
            shutil.rmtree(path, ignore_errors=True)


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


def _check_space(output_dir: Path, total: int) -> None:
    free = shutil.disk_usage(output_dir).free
    if free < total:
        raise RuntimeError(f"{output_dir}: the conversion needs {total:,} bytes, and {free:,} are free")


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
    """Set the disk to work on a file now; finish would else wait for one file after another."""
    # posix_fadvise(DONTNEED) does so too, but drops the pages, which the server loads next. Where a file system lacks
    # this call, finish's fsync does all, so its result is ignored.
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)  # 0, 0: the whole file


def _sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 and a usage line where it is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="GPT-2, OPT or BLOOM: a Hugging Face folder; NeMo: a .nemo archive, its unpacked folder, or a folder of "
        "Lightning checkpoints; Megatron-LM: a folder of iterations, or one iteration",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", nargs="?", help="where <tp>-gpu is written")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks to split for (default: 1)")
    parser.add_argument(
        "--weight-data-type",
        choices=("auto", *DATA_TYPES),
        default="auto",
        help="number format of the files; auto: the checkpoint's own (default: auto)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="NeMo, Megatron-LM: a .model file, or a folder with vocab.json and merges.txt, tokenizer.model or "
        "tokenizer.json (default: the checkpoint's own, or what lies beside it)",
    )
    parser.add_argument(
        "--num-heads", type=int, help="Megatron-LM, where the checkpoint has no arguments: attention heads"
    )
    parser.add_argument("--model-name", help="model_name in config.ini (default: the source folder's name)")
    parser.add_argument(
        "--verify", action="store_true", help="SOURCE is a finished folder: check it against its checksums"
    )
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    if flags.verify == bool(flags.output_dir):
        parser.error("OUTPUT_DIR is needed, except with --verify")
    for name in ("tp", "num_heads"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is below 1")
    return flags


def main(argv: list[str] | None = None) -> int:
    """The command: returns the exit code; 1 with one sentence on stderr for what cannot be done."""
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
            flags.model_name,
            progress=progress,
            options=SourceOptions(flags.tokenizer, flags.num_heads),
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, OSError) as error:
        if flags.verbose:
            raise
        named = isinstance(error, OSError) and error.filename
        print(f"convert.py: {f'{error.filename}: {error.strerror}' if named else one_line(error)}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    rate = f"{progress.done:,} bytes in {seconds:.1f} s, {progress.done / 1e6 / seconds:.0f} MB/s"
    print(f"{folder}: {rate if progress.done else 'already there'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds, and so cleans up
    sys.exit(main())
