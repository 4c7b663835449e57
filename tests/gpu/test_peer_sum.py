"""Sums over a tp group through the GPUs' memory, on every GPU of this machine."""

from __future__ import annotations

import pytest
import torch

from tests.support.ranks import call_ranks

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason="no two GPUs here")


@pytest.mark.parametrize("two_shot_bytes", [0, 1 << 40], ids=["two shots", "one shot"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_sums_are_those_of_one_gpu(num_ranks: int, two_shot_bytes: int) -> None:
    """With two ranks there is one shot only."""
    if num_ranks > NUM_GPUS:
        pytest.skip(f"{num_ranks} GPUs needed, {NUM_GPUS} here")
    assert len(call_ranks(num_ranks, "tests.multi.peer_sums:check", two_shot_bytes)) == num_ranks
