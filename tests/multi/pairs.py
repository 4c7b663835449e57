"""engine.check with gloo in place of NCCL: on ranks that stay, or as a script whose rank 1 does not come to its pair.

mpirun -n 2 python tests/multi/pairs.py FOLDER
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path

from engine import check
from engine.judge import Device
from engine.world import Mail, World
from executor.collectives import TorchPairs

_LIMIT_S = 4.0


class _GlooPairs(TorchPairs):
    num_bytes = 4 << 20

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments, backend="gloo", timeout_s=_LIMIT_S)


class _LatePairs(_GlooPairs):
    def seconds(self, rank: int) -> float:
        if self._rank == 1:
            time.sleep(2 * _LIMIT_S)
        return super().seconds(rank)


def run(world: World, folder: str) -> tuple[int, str]:
    """This rank's exit code, and what it has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = _check(folder, _GlooPairs)
    return code, output.getvalue()


def _check(folder: str, pairs: type[TorchPairs]) -> int:
    """check.run of ranks that seem to have GPUs."""
    device = Device("a GPU on paper", True, 1 << 30, 1 << 30)
    return check.run(Mail(), [], check.Machine(lambda local_rank: device, lambda: None, pairs), Path(folder), 0)


if __name__ == "__main__":
    sys.exit(_check(sys.argv[1], _LatePairs))
