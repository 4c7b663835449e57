"""Ranges of files read in threads: their bytes, how far ahead, and what happens to broken files."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from weights import read_ahead
from weights.read_ahead import FileRange, ReadAhead

CPU = torch.device("cpu")
CHUNK = 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 200)


@pytest.fixture
def ranges(tmp_path: Path) -> list[FileRange]:
    """Of several files, from the middle too: less than a chunk, whole chunks, a part more, more than may be ahead."""
    rng = random.Random(0)
    made = []
    for number, size in enumerate([1, CHUNK, CHUNK + 1, 3 * CHUNK, 0, 1000, 5, 7, 130, 64]):
        path = tmp_path / f"{number}.bin"
        start = rng.randrange(100)
        path.write_bytes(rng.randbytes(start + size + rng.randrange(2) * 10))
        made.append(FileRange(path, start, size))
    return made


def content(part: FileRange) -> bytes:
    return part.path.read_bytes()[part.start : part.start + part.size]


def taken(ahead: ReadAhead, parts: list[FileRange]) -> list[bytes]:
    return [ahead.take(part).numpy().tobytes() for part in parts]


@pytest.mark.parametrize("order", ["same", "other", "none"])
def test_bytes_are_those_of_the_files(order: str, ranges: list[FileRange]) -> None:
    """Whatever was said about the order."""
    said = {"same": ranges, "other": random.Random(1).sample(ranges, 6), "none": []}[order]
    ahead = ReadAhead(CPU, said)
    assert taken(ahead, ranges) == [content(part) for part in ranges]
    ahead.close()


def test_reads_a_limited_number_of_bytes_ahead(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)) * 20)
    begun: list[FileRange] = []

    def order() -> Iterator[FileRange]:
        for start in range(0, 2000, 80):
            begun.append(FileRange(path, start, 80))
            yield begun[-1]

    ahead = ReadAhead(CPU, order())
    for start in range(0, 2000, 80):
        ahead.take(FileRange(path, start, 80))
        begun_ahead = 80 * len(begun) - (start + 80)
        left = 2000 - (start + 80)
        assert begun_ahead == min(left, 240)  # the third range reaches the limit of 200
    ahead.close()


def test_end_of_a_shorter_file_is_said(ranges: list[FileRange]) -> None:
    long = ranges[5]
    with long.path.open("r+b") as file:
        file.truncate(long.start + 500)
    ahead = ReadAhead(CPU, ranges)
    assert taken(ahead, ranges[:5]) == [content(part) for part in ranges[:5]]
    with pytest.raises(ValueError, match=rf"5.bin: the file ends after {long.start + 500} bytes"):
        ahead.take(long)
    ahead.close()


def test_a_missing_file_is_an_error_when_it_is_taken(ranges: list[FileRange], tmp_path: Path) -> None:
    ahead = ReadAhead(CPU, [ranges[0], FileRange(tmp_path / "none", 0, 8)])
    ahead.take(ranges[0])
    with pytest.raises(FileNotFoundError):
        ahead.take(FileRange(tmp_path / "none", 0, 8))
    ahead.close()


def test_threads_end(ranges: list[FileRange]) -> None:
    ahead = ReadAhead(CPU, ranges)
    ahead.take(ranges[0])
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
