"""Reads parts of files into a device's memory, in threads, before they are asked for.

A GPU's bytes go through page-locked buffers: a thread reads a chunk into one of its two buffers while the GPU copies
the other. So the disk, the host's memory and the link to the GPU work at the same time, and the host's memory holds no
more than the buffers. Stateless beyond the files: knows neither weights nor shapes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NUM_THREADS = 8
CHUNK_BYTES = 8 << 20  # of one read and one copy; a thread has two buffers of it
AHEAD_BYTES = 256 << 20  # of the device's memory, read before they are taken; one range may exceed it


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file."""

    path: Path
    start: int
    size: int


class ReadAhead:
    """Reads ranges of files in threads, in the order in which they will be taken."""

    def __init__(self, device: torch.device, order: Iterable[FileRange]) -> None:
        """Start to read. order: of the coming calls of `take`, each range once; some may be missing."""
        self._device = device
        self._backend: Any = torch.get_device_module(device)
        self._order = iter(order)
        self._pending: dict[FileRange, _Load] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, "read-ahead")
        self._local = threading.local()
        self._fill()

    def take(self, wanted: FileRange) -> torch.Tensor:
        """The bytes of a range, [size] uint8 on the device. Raises ValueError or OSError where they cannot be read.

        The tensor is the caller's, for work on the current stream.
        """
        load = self._pending.pop(wanted, None) or self._start(wanted)
        self._fill()
        stream = self._backend.current_stream()
        for copied in load.copied:
            stream.wait_event(copied.result())
        return load.target

    def close(self) -> None:
        """End the threads, and free the buffers."""
        self._threads.shutdown(cancel_futures=True)
        self._backend.synchronize()  # with the copies of what was read and never taken
        self._pending.clear()

    def _fill(self) -> None:
        """Start to read the next ranges, as many as may be ahead."""
        ahead = sum(one.size for one in self._pending)
        while ahead < AHEAD_BYTES and (coming := next(self._order, None)) is not None:
            self._pending[coming] = self._start(coming)
            ahead += coming.size

    def _start(self, wanted: FileRange) -> _Load:
        target = torch.empty(wanted.size, dtype=torch.uint8, device=self._device)
        # The memory may be of a tensor that was freed while the current stream still works with it.
        is_free = self._backend.Event()
        is_free.record()
        copied = [
            self._threads.submit(self._copy, wanted.path, wanted.start + number * CHUNK_BYTES, part, is_free)
            for number, part in enumerate(target.split(CHUNK_BYTES))
        ]
        return _Load(target, copied)

    @torch.inference_mode()
    def _copy(self, path: Path, start: int, target: torch.Tensor, is_free: Any) -> Any:
        """In a thread: read a chunk and launch its copy. Returns the event of the copy's end."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = _Buffers(self._backend, self._device)
        buffers = self._local.buffers
        buffer, copied = buffers.next()
        copied.synchronize()  # the buffer's last copy
        chunk = buffer[: len(target)]
        read_chunk(path, start, memoryview(chunk.numpy()))
        with self._backend.stream(buffers.stream):
            buffers.stream.wait_event(is_free)
            target.copy_(chunk, non_blocking=True)
            # A thread's copies end in order: to wait for a later one that reuses the event is right, too.
            copied.record()
        return copied


@dataclass(frozen=True)
class _Load:
    """A range on its way: its place on the device, and for each chunk the event of its copy."""

    target: torch.Tensor
    copied: list[Future[Any]]


class _Buffers:
    """A thread's two buffers, each with the event of its last copy; and the stream of the copies."""

    def __init__(self, backend: Any, device: torch.device) -> None:
        backend.set_device(device)
        self.stream = backend.Stream()
        is_pinned = device.type == "cuda"
        self._pairs = [
            (torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=is_pinned), backend.Event()) for _ in range(2)
        ]

    def next(self) -> tuple[torch.Tensor, Any]:
        """The buffer that was used longer ago, and its event."""
        self._pairs.reverse()
        return self._pairs[0]


def read_chunk(path: Path, start: int, buffer: memoryview) -> None:
    """Fill the buffer from the file's byte `start` on. Raises ValueError if the file ends before, OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], start + done)
            if count == 0:
                raise ValueError(f"{path}: the file ends after {start + done} bytes; it was longer before")
            done += count
    finally:
        os.close(file)
