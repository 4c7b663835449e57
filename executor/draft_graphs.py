"""Steps with drafts as CUDA graphs: one launch for the kernels of a step, up to the slots' next positions.

A row is a token to compute: a draft, the token before a sequence's drafts, or a sequence's only one. The rows of a slot
are decode rows that see each other's tokens. Every row's token is chosen, and each slot goes on after its first token
that is not the draft in its place. Padding rows use the dummy slot.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.plan import Plan
from executor.chooser import Chooser
from executor.graphs import capture, release, sizes_up_to
from executor.kv_cache import KVCache
from executor.model import GPT, StepInput
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState
from kernels.decode_attention import DecodeMetadata

_SIZES = (2, 4, 8, 16, 24, 32)
_NUM_INPUTS = 4  # of each row


class DraftGraphs:
    """One graph for each number of rows, captured when this is made: every rank must make it."""

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        slots: SlotState,
        workspace: torch.Tensor,
        chooser: Chooser,
        max_rows: int,
    ) -> None:
        """slots: graphs read and write it. workspace, chooser: as DecodeGraphs takes them, for `max_rows`.

        Raises RuntimeError where a graph cannot be made.
        """
        self._model = model
        self._cache = cache
        self._slots = slots
        self._workspace = workspace
        self._chooser = chooser
        self._sizes = sizes_up_to(max_rows, _SIZES)
        most = self._sizes[-1]
        # Zeros: captures use slot 0, which no sequence has yet.
        self._inputs = torch.zeros(_NUM_INPUTS * most, dtype=torch.int64, device=slots.device)
        self._logits = model.new_local_logits(most)
        self._graphs = capture("steps with drafts", self._sizes, self._step, slots.device)

    def close(self) -> None:
        """Free the graphs."""
        release(self._graphs, self._slots.device)

    def fits(self, plan: Plan) -> bool:
        """Whether a graph can compute the plan: drafts and decode rows only, and kernels can choose after drafts."""
        if not plan.chunks or plan.num_tokens > self._sizes[-1]:
            return False
        has_long_list = self._slots.has_long_list
        return all(
            chunk.draft_ids and chunk.length == 1 + len(chunk.draft_ids) and not has_long_list[chunk.seq_slot]
            for chunk in plan.chunks
        )

    def run(self, plan: Plan, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a plan that fits: its rows' tokens, and choose the tokens after them.

        Returns what DecodeGraphs.run returns. The slots get their next tokens and positions. The next step overwrites
        both results.
        """
        num_rows = len(rows)
        size = next(size for size in self._sizes if size >= num_rows)
        inputs = np.zeros((_NUM_INPUTS, size), dtype=np.int64)
        seq_slots, positions, draft_slots, draft_ids = inputs
        seq_slots[:] = draft_slots[:] = self._slots.dummy_slot
        seq_slots[:num_rows] = rows.seq_slots
        positions[:num_rows] = rows.positions - 1
        row = len(plan.decode_slots)
        for chunk in plan.chunks:
            drafts = slice(row + 1, row + chunk.length)
            draft_slots[drafts], draft_ids[drafts] = chunk.seq_slot, chunk.draft_ids
            row += chunk.length
        self._inputs[: inputs.size].copy_(torch.from_numpy(inputs.ravel()), non_blocking=True)
        graph, values = self._graphs[size]
        graph.replay()
        return values[:, :num_rows], self._logits[:num_rows]

    def _step(self, size: int) -> torch.Tensor:
        """Its inputs: each row's slot and position; its slot again and its draft, or the dummy slot for no draft."""
        slots = self._slots
        seq_slots, positions, draft_slots, draft_ids = self._inputs[: _NUM_INPUTS * size].view(_NUM_INPUTS, size)
        slots.token_ids[draft_slots, positions] = draft_ids
        kv_locs = slots.kv_loc_table[seq_slots, positions].long()
        decodes = DecodeMetadata(slots.kv_loc_table, seq_slots, positions, self._workspace, kv_locs)
        step = StepInput(slots.token_ids, seq_slots, positions, None, decodes)
        hidden = self._model.forward(step, self._cache)
        assert hidden is not None, "graphs are made for one pipeline stage only"
        logits = self._model.local_logits(hidden, out=self._logits[:size])
        following = positions + slots.advance[seq_slots]
        values = self._chooser.choose(logits, seq_slots, following)
        slots.accept(seq_slots, following, values[0])
        return values
