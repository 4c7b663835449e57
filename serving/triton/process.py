"""tritonserver as a process: its start, its last words, and what /proc says of it and its Python stubs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serving.triton import launcher

_PTRACE_DETACH = 17
_WORD = ctypes.sizeof(ctypes.c_void_p)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NUM_LAST_LINES = 20


@dataclass(frozen=True)
class Status:
    """A process at one moment. state: as in /proc/PID/stat; cpu_s: of all its threads; memory: bytes that it holds."""

    state: str
    group: int
    cpu_s: float
    memory: int


def status(pid: int) -> Status | None:
    """None for a process that is gone; one that has ended but is not waited for yet has the state Z."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return Status(fields[0], int(fields[2]), cpu_s, int(fields[21]) * _PAGE)


def has_busy_thread(pid: int) -> bool:
    """Whether a thread of the process runs, or waits for a processor or a disk."""
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):  # a thread that ends
            if _stat(folder)[0] in "RD":
                return True
    return False


def _stat(which: int | Path) -> list[str]:
    """The fields of /proc/…/stat from the state on: the third field of its manual page comes first."""
    folder = which if isinstance(which, Path) else Path(f"/proc/{which}")
    return (folder / "stat").read_text().rpartition(")")[2].split()


class TritonProcess:
    """One tritonserver and the stubs below it, which share its process group."""

    def __init__(
        self,
        command: Sequence[str],
        secret: str,
        environment: Mapping[str, str],
        folder: Path,
        memory: int,
        echo: bool,
    ) -> None:
        """Start it from this thread, with which it ends.

        secret: stands in the command as launcher.PLACEHOLDER, and reaches tritonserver unseen by other users. memory:
        bytes of data for each process. echo: whether its output goes to stderr too. Raises OSError.
        """
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self.stubs: list[int] = []  # process ids, from `find_stubs` on
        reply, reply_fd = os.pipe()
        arguments = [str(os.getpid()), str(reply_fd), str(memory), *command]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", launcher.__file__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**environment, launcher.SECRET: secret},
                cwd=folder,
                pass_fds=[reply_fd],
            )
        finally:
            os.close(reply_fd)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        threading.Thread(
            target=self._read, args=(self._process.stdout, echo), name="triton output", daemon=True
        ).start()
        with os.fdopen(reply, "rb") as pipe:
            answer = pipe.read(1)
        self.is_secret_hidden = answer == b"t"
        if self.is_secret_hidden:
            self._put_secret(len(command))

    def _put_secret(self, num_arguments: int) -> None:
        """Let the placeholder's pointer point to the secret in the environment, before tritonserver's first step.

        Everybody can read the memory that /proc/PID/cmdline shows; that of the environment only the user's own
        processes. The kernel stops the new program at its start, because launcher.py asked to be traced.
        """
        _, wait_status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(wait_status):
            self._process.returncode = os.waitstatus_to_exitcode(wait_status)
            return
        try:
            fields = _stat(self.pid)
            stack, arguments, arguments_end, environment, environment_end = (
                int(fields[place]) for place in (25, 45, 46, 47, 48)
            )
            with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:

                def read(start: int, end: int) -> bytes:
                    memory.seek(start)
                    return memory.read(end - start)

                words = read(arguments, arguments_end).split(b"\0")
                mark = f"\0{launcher.SECRET}=".encode()
                secret = environment + (b"\0" + read(environment, environment_end)).index(mark) + len(mark) - 1
                for index in range(num_arguments):
                    if words[index] == launcher.PLACEHOLDER.encode():
                        memory.seek(stack + (1 + index) * _WORD)  # after the number of arguments
                        memory.write(secret.to_bytes(_WORD, sys.byteorder))
        finally:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.ptrace(_PTRACE_DETACH, self.pid, None, None)

    def _read(self, output: IO[bytes], echo: bool) -> None:
        """Keep the last lines, so that the pipe never fills."""
        with output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                self.last_lines.append(text)
                if echo:
                    print(text, file=sys.stderr, flush=True)

    def find_stubs(self) -> None:
        """Note the stubs' process ids: the other members of the process group."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        known = ((pid, status(pid)) for pid in pids if pid != self.pid)
        self.stubs = [pid for pid, found in known if found is not None and found.group == self.pid]

    @property
    def pids(self) -> list[int]:
        """tritonserver's process id, then the stubs'."""
        return [self.pid, *self.stubs]

    def exit_code(self) -> int | None:
        """As Popen.poll: None while tritonserver runs, -N where signal N ended it."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> bool:
        """Wait for tritonserver's end; whether it came in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
            return True
        return False

    def terminate(self) -> None:
        """Let tritonserver refuse new connections, finish what it has, and end."""
        self._process.terminate()

    def kill(self) -> None:
        """End tritonserver and its stubs now, stopped ones too; from any thread.

        A process group's number is free for another one only when all members have been waited for; so the number is
        used first.
        """
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
        for pid in self.stubs:
            found = status(pid)
            if found is not None and found.group == self.pid:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
