"""Appends the tokens that a step with drafts chose: each slot's up to the first that is not the draft in its place.

One launch for all rows; torch needs twenty.
"""

from __future__ import annotations

import torch

from kernels import runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

_MOST_ROWS = 64  # of the kernel, which compares each row with each


def reference(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    row_slots: torch.Tensor,
    row_positions: torch.Tensor,
    chosen_ids: torch.Tensor,
) -> None:
    """The same in plain torch, on any device, for any number of rows."""
    chosen_ids = chosen_ids.long()
    rows = torch.arange(len(row_slots), device=row_slots.device)
    first_rows = torch.where(row_slots != row_slots.roll(1), rows, 0).cummax(0).values  # of each row's slot
    is_wrong = (token_ids[row_slots, row_positions] != chosen_ids).long()
    wrong_before = is_wrong.cumsum(0) - is_wrong
    is_kept = wrong_before == wrong_before[first_rows]
    token_ids[row_slots, row_positions] = chosen_ids
    kept = torch.where(is_kept, row_positions, 0)
    positions.scatter_reduce_(0, row_slots, kept, "amax", include_self=False)


def accept_tokens(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    row_slots: torch.Tensor,
    row_positions: torch.Tensor,
    chosen_ids: torch.Tensor,
) -> None:
    """Write each row's token to its place, and set each slot's position to its last token that counts.

    A slot may have several rows one after another, at positions one after another; a row's place holds the draft of the
    row after it. A token counts if all tokens of the slot before it are the drafts in their places.

    token_ids: [slots, max_seq_len] int64; positions: [slots] int64; row_slots, row_positions: [rows] int64, of the
    tokens; chosen_ids: [rows], the tokens, int64 or fp64. All rows of the dummy slot are at one position.
    """
    rows = len(row_slots)
    if not runs_on(token_ids.device) or rows > _MOST_ROWS:
        return reference(token_ids, positions, row_slots, row_positions, chosen_ids)
    block = max(16, triton.next_power_of_2(rows))
    _accept_tokens[(1,)](
        token_ids, positions, row_slots, row_positions, chosen_ids, token_ids.stride(0), rows, block=block
    )


if triton is not None:

    @triton.jit
    def _accept_tokens(
        token_ids,
        positions,
        row_slots,
        row_positions,
        chosen_ids,
        token_stride,
        rows,
        block: tl.constexpr,
    ):
        """All rows: each is a column, and the rows of its slot are the lines of a square."""
        row = tl.arange(0, block)
        is_row = row < rows
        slot = tl.load(row_slots + row, mask=is_row, other=-1)
        position = tl.load(row_positions + row, mask=is_row, other=0)
        chosen_id = tl.load(chosen_ids + row, mask=is_row, other=0).to(tl.int64)
        place = token_ids + slot * token_stride + position
        is_wrong = tl.load(place, mask=is_row, other=0) != chosen_id
        is_of_slot = slot[:, None] == slot[None, :]
        is_before = is_of_slot & (row[:, None] < row[None, :])
        is_kept = tl.sum((is_before & is_wrong[:, None]).to(tl.int32), 0) == 0
        kept = tl.where(is_kept, position, 0)
        last = tl.max(tl.where(is_of_slot, kept[:, None], 0), 0)
        tl.store(place, chosen_id, mask=is_row)
        tl.store(positions + slot, last, mask=is_row)
