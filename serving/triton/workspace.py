"""The folder of one Triton, and what it has in /dev/shm: the user's own, and gone at the latest at the next start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import zlib
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


class Workspace:
    """A folder that no other user can read. While its lock is held, its server is alive."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        tag = f"{os.getpid()}-{secrets.token_hex(3)}"
        self.path = home / f"{_prefix()}{tag}"
        self.path.mkdir(mode=0o700)
        self._lock = _lock(self.path)
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.short_path = Path("/proc/self/fd", str(self._folder))  # a socket's path may have 107 characters
        self.model_store = self.path / "models"
        self.model_store.mkdir()
        self.shared_memory_prefix = _shared_memory_prefix(tag)

    def close_to_others(self) -> None:
        """Let only this user read the shared memory: Triton makes it readable for all, whatever the umask."""
        for path in _SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            path.chmod(0o600)

    def remove(self) -> None:
        """Remove the folder and the shared memory; from any thread, more than once."""
        _remove(self.path, self.shared_memory_prefix)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
            os.close(self._folder)


def remove_leftovers(home: Path) -> int:
    """Remove what servers of this user on this machine left when they were killed; returns of how many.

    A folder is left over where nobody holds its lock and its process is gone.
    """
    count = 0
    for path in home.glob(f"{_prefix()}*"):
        match = re.fullmatch(r"(\d+)-[0-9a-f]{6}", path.name.removeprefix(_prefix()))
        with contextlib.suppress(OSError):  # another server that starts removes it, too
            if match is None or path.stat().st_uid != os.getuid() or Path("/proc", match[1]).exists():
                continue
            lock = _lock(path)
            if lock is not None:
                _remove(path, _shared_memory_prefix(match[0]))
                os.close(lock)
                count += 1
    return count


def remove_temporary_folders() -> None:
    """Remove this user's /tmp/python_env_… of Tritons that were killed: empty folders, older than each live Triton."""
    oldest_s = min(_start_times(), default=float("inf"))
    for path in Path("/tmp").glob("python_env_??????"):
        with contextlib.suppress(OSError):  # it is another user's, or not empty
            if path.stat().st_uid == os.getuid() and path.stat().st_mtime < oldest_s - 2:
                path.rmdir()


def _start_times() -> list[float]:
    """When this machine's tritonservers started, in seconds since 1970, to a second."""
    boot_s = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line[:5] == "btime")
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that ends
            name, _, fields = path.read_text().partition("(")[2].rpartition(")")
            if name == "tritonserver":
                found.append(boot_s + int(fields.split()[19]) / os.sysconf("SC_CLK_TCK"))
    return found


def _prefix() -> str:
    """Of the folders of this machine's servers: a home may be on a file system that others share."""
    return f"{zlib.crc32(os.uname().nodename.encode()):08x}-"


def _shared_memory_prefix(tag: str) -> str:
    return f"pytrtion{tag}"  # PyTriton's own spelling


def _lock(folder: Path) -> int | None:
    """The locked file of a folder; None where another process has it."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _remove(folder: Path, shared_memory_prefix: str) -> None:
    for path in _SHARED_MEMORY.glob(f"{shared_memory_prefix}*"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
