#!/usr/bin/env python3
"""Memory of a server under mixed load for a long time: resident memory of each process at the start, then at intervals.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 2 --settle-minutes 1

Starts a server of its own (2 ranks, models/stories). 16 clients ask it without a pause, each time in another way: over
OpenAI's API and over Triton, whole and streamed, greedy, sampled, with beams, samples, penalties, words and
log-probabilities; some leave in the middle. The exit code is 1 where a process grew by more than 3 % and 4 MB after the
settling time, or where an answer is not what it must be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import report
from tests.support.launch import serving
from tests.support.mixed_load import Row, grown, soak
from tests.support.ranks import ROOT

_GROWTH = 0.03
_NOISE_MB = 4.0  # of a small process, 3 % are a few pages


def main() -> int:
    flags = parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--hf-model-name", str(ROOT / "models/stories"), "--tp", "2", "--output-dir", folder]
        with serving(2, Path(folder, "log"), *options, environment={"OMP_NUM_THREADS": "1"}) as server:
            rows, counts = soak(server, flags.settle_minutes, flags.minutes)
    return show(flags, rows, counts)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (default: 30)")
    parser.add_argument("--settle-minutes", type=float, default=5.0, help="until memory is compared (default: 5)")
    return parser.parse_args()


def show(flags: argparse.Namespace, rows: list[Row], counts: dict[str, int]) -> int:
    """Print the tables; 1 where something is wrong."""
    names = sorted(rows[-1][1])
    print(f"{'minutes':>8} " + " ".join(f"{name:>24}" for name in names))
    for minutes, found in rows:
        print(f"{minutes:>8.1f} " + " ".join(f"{found.get(name, 0.0):>24.1f}" for name in names))
    for outcome, count in sorted(counts.items()):
        print(f"{count:>8} {outcome}")
    growth = grown(rows, _GROWTH, _NOISE_MB)
    for name, megabytes in growth.items():
        print(f"WRONG: {name} grew by {megabytes:.1f} MB after {rows[1][0]:g} minutes")
    is_wrong = bool(growth) or any("ERROR" in outcome for outcome in counts)
    report(torch.device("cpu"), benchmark="soak", model="stories", minutes=flags.minutes, rows=rows, counts=counts)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
