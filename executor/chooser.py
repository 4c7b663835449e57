"""Chooses tokens by kernels; where there are many rows, each rank of the tp group for its share of them.

The ranks tell each other their tokens, so all hold the same.
"""

from __future__ import annotations

import torch

from executor.layers import LMHead, rows_of_a_rank
from executor.slots import SlotState
from kernels import choose_tokens


class Chooser:
    """Holds the memory that kernels.choose_tokens works in."""

    def __init__(self, lm_head: LMHead, slots: SlotState, max_rows: int) -> None:
        """For steps of at most `max_rows`."""
        self._lm_head = lm_head
        self._slots = slots
        num_rows, max_seq_len = most_rows(max_rows, lm_head.comm.parallel.tp), slots.token_ids.shape[1]
        self._workspace = choose_tokens.make_workspace(num_rows, lm_head.vocab_size, max_seq_len, slots.device)

    def append(self, logits: torch.Tensor, seq_slots: torch.Tensor) -> torch.Tensor:
        """Choose each slot's next token, and append it to its sequence.

        logits: this rank's part [rows, vocab_local]; seq_slots: [rows] int64, different but for the dummy's. Returns
        [2, rows] fp64: the tokens, and their log-probabilities.
        """
        slots, lm_head = self._slots, self._lm_head
        if rows_of_a_rank(len(logits), lm_head.comm.parallel.tp) == len(logits):  # the kernel itself appends
            whole = lm_head.gather(logits)
            return choose_tokens.choose_tokens(whole, seq_slots, slots.tensors, self._workspace)
        positions = slots.positions[seq_slots] + slots.advance[seq_slots]
        chosen = self.choose(logits, seq_slots, positions)
        slots.append(seq_slots, positions, chosen[0].long())
        return chosen

    def choose(self, logits: torch.Tensor, seq_slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `append`, for tokens at these positions [rows] int64. A slot may have several rows; nothing is written."""

        def choose_rows(whole: torch.Tensor, rows: slice) -> torch.Tensor:
            tensors = self._slots.tensors
            return choose_tokens.choose_tokens(whole, seq_slots[rows], tensors, self._workspace, positions[rows])

        return self._lm_head.choose(logits, choose_rows)


def most_rows(max_rows: int, tp: int) -> int:
    """The most rows that a rank chooses for in steps of at most `max_rows`."""
    return max(rows_of_a_rank(rows, tp) for rows in range(max_rows + 1))
