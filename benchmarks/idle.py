#!/usr/bin/env python3
"""Share of a core that each process of an idle server takes.

python benchmarks/idle.py --seconds 30          # beside an idle server on this machine
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    flags = parser.parse_args()
    processes = [p for p in psutil.process_iter(["cmdline", "name"]) if role(p)]
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(flags.seconds)
    shares = {}
    for process, seconds in zip(processes, before, strict=True):
        if not process.is_running():
            continue
        name = f"{role(process)} {process.pid}"
        shares[name] = (sum(process.cpu_times()[:2]) - seconds) / flags.seconds
        print(f"{name:32} {100 * shares[name]:6.2f} % of a core")
    report(torch.device("cpu"), benchmark="idle", seconds=flags.seconds, shares=shares)


def role(process: psutil.Process) -> str:
    """A process's role in the server; empty for other processes."""
    if any(part.endswith("server.py") for part in process.info["cmdline"] or [] if "mpirun" not in part):
        return "" if process.info["name"] in ("mpirun", "prterun", "orterun") else "rank"
    return process.info["name"] if "triton" in process.info["name"] else ""


if __name__ == "__main__":
    main()
