"""The modules of this folder take turns: each sizes its KV cache by the GPU's free memory."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def gpu_for_one_module() -> Iterator[None]:
    with Path(tempfile.gettempdir(), f"test-gpu-{os.getuid()}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
