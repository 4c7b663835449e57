"""Token embedding plus position embedding of a step's tokens, with one launch; torch needs four. Stateless."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import dependent_launch, runs_on

try:
    import triton
    import triton.language as tl

    from kernels.dependent_launch import start_dependents
except ImportError:  # a CPU-only torch comes without it
    triton = None


def reference(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    position_rows: torch.Tensor | None,
    first_id: int = 0,
) -> torch.Tensor:
    """The same in plain torch, on any device."""
    places = token_ids[slots, positions] - first_id
    is_here = (places >= 0) & (places < len(rows))
    embedded = F.embedding(places.where(is_here, 0), rows) * is_here[:, None]
    return embedded if position_rows is None else embedded + F.embedding(positions, position_rows)


def embed(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    position_rows: torch.Tensor | None,
    first_id: int = 0,
) -> torch.Tensor:
    """rows[token_ids[slots, positions] - first_id] + position_rows[positions].

    token_ids: [slots, max_seq_len] int64; slots, positions: [tokens] int64; rows: [any, hidden], of the ids from
    first_id on, zeros stand for all others; position_rows: [max_pos_seq_len, hidden] of the same dtype, or None.
    Returns [tokens, hidden].

    It starts a chain of dependent launches: it waits for all kernels before it, so that those after it may read what
    was written before the step.
    """
    if not runs_on(rows.device):
        return reference(token_ids, slots, positions, rows, position_rows, first_id)
    num_tokens, hidden_size = len(slots), rows.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=rows.dtype, device=rows.device)
    _embed[(num_tokens,)](
        token_ids,
        slots,
        positions,
        rows,
        rows if position_rows is None else position_rows,
        out,
        token_ids.stride(0),
        first_id,
        len(rows),
        has_positions=position_rows is not None,
        hidden_size=hidden_size,
        block=triton.next_power_of_2(hidden_size),
        pdl=dependent_launch.has_dependent_launch(rows.device),  # and no launch_pdl
        num_warps=8,
    )
    return out


if triton is not None:

    @triton.jit
    def _embed(
        token_ids,
        slots,
        positions,
        rows,
        position_rows,
        out,
        token_stride,
        first_id,
        num_ids,
        has_positions: tl.constexpr,
        hidden_size: tl.constexpr,
        block: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One token."""
        if pdl:
            start_dependents()
        token = tl.program_id(0)
        offsets = tl.arange(0, block)
        is_element = offsets < hidden_size
        position = tl.load(positions + token)
        place = tl.load(token_ids + tl.load(slots + token) * token_stride + position) - first_id
        is_here = (place >= 0) & (place < num_ids)
        values = tl.load(rows + place * hidden_size + offsets, mask=is_element & is_here, other=0.0).to(tl.float32)
        if has_positions:
            own = position_rows + position * hidden_size
            values += tl.load(own + offsets, mask=is_element, other=0.0).to(tl.float32)
        places = out + token.to(tl.int64) * hidden_size + offsets
        tl.store(places, values.to(out.dtype.element_ty), mask=is_element)
