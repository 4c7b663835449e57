"""Mixed load over both front ends for a minute: every answer as it must be, memory as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import serving
from tests.support.mixed_load import grown, soak
from tests.support.ranks import ROOT

KINDS = {f"{front_end}, {how}" for front_end in ("OpenAI", "Triton") for how in ("whole", "streamed")}


@pytest.mark.slow("a minute of load")
def test_mixed_load_leaves_the_memory_as_it_was(tmp_path: Path) -> None:
    """`make soak` has a lower bound: in half a minute not all numbers of rows come, which cost memory on a CPU.

    With few sequences the key-value cache is small: the prefix cache has touched all of it by then.
    """
    flags = ["--hf-model-name", str(ROOT / "models/stories"), "--tp", "2", "--output-dir", str(tmp_path)]
    flags += ["--max-batch-size", "16"]
    with serving(2, tmp_path / "log", *flags, environment={"OMP_NUM_THREADS": "1"}) as server:
        rows, counts = soak(server, settle_minutes=0.5, minutes=1.0)
        print(rows, counts)
        assert KINDS <= set(counts) <= {*KINDS, "OpenAI, left", "Triton, left"}
        assert set(rows[-1][1]) == {"rank 0", "rank 1", "tritonserver", "stub of stories", "stub of stories_streaming"}
        assert grown(rows, share=0.06, noise_mb=8.0) == {}


def test_growth_is_told_from_noise() -> None:
    rows = [(0.0, {"a": 1.0}), (5.0, {"a": 100.0, "b": 10.0}), (30.0, {"a": 104.5, "b": 13.9, "c": 5.0})]
    assert grown(rows, share=0.03, noise_mb=4.0) == {"a": 4.5, "c": 5.0}
    assert grown(rows, share=0.05, noise_mb=4.0) == {"c": 5.0}
