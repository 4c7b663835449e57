"""A checkpoint's files by name: in a folder, in a plain tar archive, or in a gzipped one.

Owns the rules for archives: only files and folders, none outside the target, size limited. A plain archive is read in
place. A gzipped one is unpacked into a nameless file that ends with the process. It knows no checkpoint.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

# A .nemo archive of weights gives two or three bytes for one; what gives more than this many is made to fill disks.
_MAX_RATIO = 20
_SLACK_BYTES = 16 << 20
_MAX_MEMBERS = 100_000
_SMALL_BYTES = 256 << 20  # configurations and tokenizers


@dataclass(frozen=True)
class Place:
    """The location of a file's bytes: `size` bytes at `offset` of `path`. Messages call it `name`."""

    path: Path
    offset: int
    size: int
    name: str
    keep: Any = field(default=None, compare=False, repr=False)  # what has to stay open

    @property
    def is_whole(self) -> bool:
        """Whether `path` holds nothing else."""
        return self.offset == 0 and self.path.stat().st_size == self.size

    def open(self) -> BinaryIO:
        """The bytes as a file of their own."""
        return io.BufferedReader(_Window(self))

    def read(self) -> bytes:
        """All of a small file. Raises ValueError for one that is not."""
        if self.size > _SMALL_BYTES:
            raise ValueError(f"{self.name}: {self.size:,} bytes; such a file has {_SMALL_BYTES:,} at most")
        with self.open() as file:
            return file.read()


def file_place(path: Path) -> Place:
    """A file of its own."""
    return Place(path, 0, path.stat().st_size, str(path))


def folder_files(folder: Path) -> dict[str, Place]:
    """Every file of a folder and its folders, by its name relative to it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_place(path) for path in paths}


def archive_files(path: Path, scratch: Path) -> dict[str, Place]:
    """Every file of a tar archive by its name; a gzipped one is unpacked into a nameless file below `scratch`.

    Raises ValueError for what is no whole archive, for members that are no plain files or lie outside, and for an
    archive made to grow; RuntimeError for lack of disk space.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return _unpack(path, existing_folder(scratch))
        with tarfile.open(path, "r:") as tar:
            return dict(_in_place(path, tar))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole tar archive, plain or gzipped ({error})") from None


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _in_place(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, Place]]:
    size = path.stat().st_size
    for name, member in _members(path, tar):
        if member.offset_data + member.size > size:
            raise ValueError(f"{path}: member {name!r} ends beyond the archive, which is cut off at {size:,} bytes")
        yield name, Place(path, member.offset_data, member.size, f"{path}: {name}")


def _unpack(path: Path, scratch: Path) -> dict[str, Place]:
    limit = _MAX_RATIO * path.stat().st_size + _SLACK_BYTES
    files = {}
    target = tempfile.TemporaryFile(dir=scratch)  # one, because a process may not have thousands of them open
    with gzip.open(path) as stream, _open_limited(path, stream, limit) as tar:
        for name, member in _members(path, tar):
            if member.size > limit:
                raise _explodes(path, limit)
            free = shutil.disk_usage(scratch).free
            if member.size > free:
                raise RuntimeError(f"{scratch}: {path}: {name} takes {member.size:,} bytes, and {free:,} are free")
            start = target.seek(-target.tell() % tarfile.BLOCKSIZE, io.SEEK_CUR)
            content = tar.extractfile(member)
            assert content is not None, name  # `_members` gives plain files only
            shutil.copyfileobj(content, target, 1 << 20)
            place_name = f"{path}: {name}"
            files[name] = Place(Path(f"/proc/self/fd/{target.fileno()}"), start, member.size, place_name, target)
    target.flush()
    return files


def _open_limited(path: Path, stream: gzip.GzipFile, limit: int) -> tarfile.TarFile:
    limited: Any = _Limited(path, stream, limit)  # mode r| only reads; the stubs of tarfile ask for a whole file
    return tarfile.open(fileobj=limited, mode="r|")


def _members(path: Path, tar: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The archive's files, each checked; folders are passed over."""
    names = set()
    for count, member in enumerate(tar, 1):
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
            raise ValueError(f"{path}: member {member.name!r} would leave the folder it is unpacked to")
        if member.issym() or member.islnk():
            raise ValueError(f"{path}: member {member.name!r} is a link (to {member.linkname!r}); files only")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            kind = "a device or a pipe" if member.isdev() else "no plain file"
            raise ValueError(f"{path}: member {member.name!r} is {kind}; files only")
        name = PurePosixPath(*parts).as_posix()
        if name in names:
            raise ValueError(f"{path}: member {name!r} is there twice")
        if count > _MAX_MEMBERS:
            raise ValueError(f"{path}: more than {_MAX_MEMBERS:,} members")
        names.add(name)
        yield name, member


def _explodes(path: Path, limit: int) -> ValueError:
    return ValueError(f"{path}: unpacks to more than {limit:,} bytes ({_MAX_RATIO} times its size), so it is refused")


class _Limited:
    """A stream that ends in an error after `limit` bytes."""

    def __init__(self, path: Path, stream: gzip.GzipFile, limit: int) -> None:
        self._path, self._stream, self._limit = path, stream, limit
        self._left = limit

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _explodes(self._path, self._limit)
        return data


class _Window(io.RawIOBase):
    """The bytes of a Place, read-only."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._file = place.path.open("rb", buffering=0)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._place.size - self._at))
        self._file.seek(self._place.offset + self._at)
        count = self._file.readinto(memoryview(buffer)[:size])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
