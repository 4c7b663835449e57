"""Files read onto a GPU in threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weights import read_ahead
from weights.read_ahead import FileRange, ReadAhead

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SIZE = 3_000_000
SLEEP_CYCLES = 20_000_000  # some 10 ms


@pytest.mark.parametrize("chunk_bytes", [1 << 16, 8 << 20])
def test_bytes_are_those_of_the_file(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the memory that they go to was freed by work that still runs."""
    monkeypatch.setattr(read_ahead, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 2 * SIZE)
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(256, (20 * SIZE,), dtype=torch.uint8, generator=generator)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    parts = [FileRange(tmp_path / "file", first, SIZE) for first in range(0, 20 * SIZE, SIZE)]
    device = torch.device("cuda", torch.cuda.current_device())

    def busy() -> None:
        torch.cuda._sleep(SLEEP_CYCLES)
        torch.full((SIZE,), 255, dtype=torch.uint8, device=device)  # its memory is free, and not yet written

    torch.cuda.empty_cache()
    with torch.inference_mode():
        busy()
        ahead = ReadAhead(device, parts)
        for part in parts:
            value = ahead.take(part)
            assert torch.equal(value.cpu(), content[part.start : part.start + SIZE]), part
            del value
            busy()
        ahead.close()
