#!/usr/bin/env python3
"""server.py, in which SIGUSR2 to a rank makes that rank's next step fail as the variable FAULT says.

exception: the step raises one. memory: the step asks for more memory than there is.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import server
from engine.plan import Plan
from executor.runner import StepResult, TorchExecutor

_execute = TorchExecutor.execute
_signals: list[int] = []


def _fail(executor: TorchExecutor, plan: Plan) -> StepResult | None:
    if _signals and os.environ["FAULT"] == "memory":
        torch.empty(2**50)
    if _signals:
        raise ArithmeticError("a fault was injected")
    return _execute(executor, plan)


if __name__ == "__main__":
    TorchExecutor.execute = _fail  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR2, lambda number, _: _signals.append(number))
    sys.exit(server.main())
