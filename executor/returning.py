"""Results that are on their way from the last pipeline stage to the first one.

The first stage goes on to other sequences' plans meanwhile. It waits for a plan's tokens where a later plan computes
them, or gives their slots to others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from engine.plan import Plan
from executor.collectives import Transfer
from executor.output_layout import OutputLayout


class ReturningResults:
    """Of the plans on their way, oldest first."""

    def __init__(self, num_slots: int, keep: Callable[[OutputLayout, torch.Tensor], None]) -> None:
        """keep: called for each plan's results when they are there. A GPU's stream has waited for them by then."""
        self._num_slots = num_slots
        self._keep = keep
        self._plans: deque[tuple[OutputLayout, Transfer]] = deque()

    def add(self, layout: OutputLayout, transfer: Transfer) -> None:
        """A plan's results, into the transfer's tensor."""
        self._plans.append((layout, transfer))

    def take_for(self, plan: Plan) -> None:
        """Take the results that came before, up to the last one of a slot that the plan uses."""
        if not self._plans:
            return
        is_used = np.zeros(self._num_slots, dtype=bool)
        is_used[plan.decode_slots] = True
        is_used[[chunk.seq_slot for chunk in plan.chunks]] = True
        is_used[[slot for new in plan.new_sequences for slot in new.seq_slots]] = True
        places = [i for i, (layout, _) in enumerate(self._plans) if is_used[layout.rows.seq_slots].any()]
        for _ in range(places[-1] + 1 if places else 0):
            layout, transfer = self._plans.popleft()
            transfer.wait()
            self._keep(layout, transfer.tensor)

    def settle(self) -> None:
        """Wait for all results; nobody needs them any more."""
        while self._plans:
            self._plans.popleft()[1].wait()
