"""The sum of all ranks' rows through each other's memory, and the norm of residual + sum, in one launch.

For the few rows of a decode step: there the time of a sum is latency, not bytes. Each rank writes its row into the
inbox of every other rank (one shot); or of one rank, which adds up and writes the sum into all inboxes (two shots:
fewer bytes where there are more than two ranks).

A message is a row of 64-bit words: 32 bits of data, 32 bits of stamp. A word arrives whole, so a reader that sees the
stamp of this sum has the data too: no barrier and no flag (NCCL's LL protocol does the same). A row's stamp is the
number of its sums so far. Two buffers take turns. That is enough: a rank writes into a buffer again after a sum in
between, for which each rank sent its part only when the kernel of its last read of the buffer was complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import add_norm, dependent_launch

try:
    import triton
    import triton.language as tl

    from kernels.add_norm import normalize
    from kernels.dependent_launch import start_dependents, wait_for_predecessors
except ImportError:  # a CPU-only torch comes without it
    triton = None

_WORD_BYTES = 4  # of data
_TWO_SHOT_BYTES = 128 << 10  # from here on bytes count more than a second latency, with more than two ranks


@dataclass(frozen=True)
class Peers:
    """The inboxes of a tp group's ranks, each [2, max_rows, ranks, row_words] int64 and zeros at first."""

    rank: int  # this one
    addresses: torch.Tensor  # [ranks] int64: where each rank's inbox is, as this rank's GPU sees it
    inbox: torch.Tensor  # this rank's own
    stamps: torch.Tensor  # [max_rows] int32, zeros at first: how many sums of each row there were

    @property
    def num_ranks(self) -> int:
        return len(self.addresses)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x [rows, hidden_size] fits the inboxes: then `peer_sum` and `peer_sum_add_norm` take it."""
        return len(x) <= self.inbox.shape[1] and x.shape[1] * x.element_size() == self.inbox.shape[3] * _WORD_BYTES


def inbox_shape(num_ranks: int, max_rows: int, row_bytes: int) -> tuple[int, int, int, int]:
    """Of `Peers.inbox`; row_bytes must be a multiple of 4."""
    return 2, max_rows, num_ranks, row_bytes // _WORD_BYTES


def reference(
    addends: Sequence[torch.Tensor],
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in plain torch, from all ranks' addends: (sum, None), or (residual + sum, its norm)."""
    total = torch.zeros_like(addends[0], dtype=torch.float32)
    for addend in addends:
        total += addend.float()
    summed = total.to(addends[0].dtype)
    if residual is None or weight is None:
        return summed, None
    return add_norm.reference(residual, summed, weight, bias, eps)


def peer_sum(addend: torch.Tensor, peers: Peers) -> torch.Tensor:
    """The sum of all ranks' addends [rows, hidden_size], in place of this rank's; returns it.

    Every rank of the group calls this with as many rows. Sums are in fp32, in the ranks' order, and then rounded to
    addend's dtype: the same bits on every rank. Raises ValueError for rows that the inboxes do not take.
    """
    _launch(addend, peers, addend, None, None, None, None, 0.0)
    return addend


def peer_sum_add_norm(
    addend: torch.Tensor,
    peers: Peers,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + sum of all ranks' addends, its norm), as add_norm of `peer_sum`."""
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    _launch(addend, peers, total, normed, residual, weight, bias, eps)
    return total, normed


def _launch(
    addend: torch.Tensor,
    peers: Peers,
    total: torch.Tensor,
    normed: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    if not peers.takes(addend) or not addend.is_contiguous():
        rows, words = peers.inbox.shape[1], peers.inbox.shape[3]
        size = words * _WORD_BYTES // addend.element_size()
        raise ValueError(f"addend is {list(addend.shape)}; it must be contiguous, [up to {rows}, {size}]")
    rows, hidden_size = addend.shape
    block = triton.next_power_of_2(hidden_size)
    is_two_shot = peers.num_ranks > 2 and addend.numel() * addend.element_size() >= _TWO_SHOT_BYTES
    _peer_sum[(rows,)](
        addend,
        addend if residual is None else residual,
        addend if weight is None else weight,
        addend if bias is None else bias,
        total,
        total if normed is None else normed,
        peers.addresses,
        peers.inbox,
        peers.stamps,
        eps,
        peers.inbox.shape[1],
        rank=peers.rank,
        num_ranks=peers.num_ranks,
        is_two_shot=is_two_shot,
        has_norm=normed is not None,
        has_bias=bias is not None,
        hidden_size=hidden_size,
        row_words=peers.inbox.shape[3],
        block=block,
        num_warps=max(4, min(16, block // 512)),
        **dependent_launch.options(addend.device),
    )


if triton is not None:

    @triton.jit
    def _to_words(values):
        """[n] of 32 bits → [n] int32; [n] of 16 bits → [n / 2] int32, a pair in each."""
        if values.dtype.primitive_bitwidth == 32:
            return values.to(tl.int32, bitcast=True)
        else:  # a return alone does not keep Triton from compiling what follows
            low, high = tl.split(values.to(tl.int16, bitcast=True).reshape(values.shape[0] // 2, 2))
            return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)

    @triton.jit
    def _from_words(words, dtype: tl.constexpr):
        """The values that `_to_words` made words of."""
        if dtype.primitive_bitwidth == 32:
            return words.to(dtype, bitcast=True)
        else:
            pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
            return pairs.reshape(words.shape[0] * 2).to(dtype, bitcast=True)

    @triton.jit
    def _send(address, places, values, is_word, stamp):
        """Write a message into an inbox."""
        data = _to_words(values).to(tl.int64) & 0xFFFFFFFF
        inbox = tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.int64)), 16)
        tl.store(inbox + places, (stamp.to(tl.int64) << 32) | data, mask=is_word)

    @triton.jit
    def _receive(places, is_word, stamp, dtype: tl.constexpr):
        """Wait for a message with this stamp."""
        words = tl.load(places, mask=is_word, other=0, volatile=True)
        while tl.max((is_word & ((words >> 32).to(tl.int32) != stamp)).to(tl.int32), 0) != 0:
            words = tl.load(places, mask=is_word, other=0, volatile=True)
        return _from_words(words.to(tl.int32), dtype)

    @triton.jit
    def _sum(own, inbox, row_places, is_word, stamp, rank: tl.constexpr, num_ranks: tl.constexpr, words: tl.constexpr):
        """The messages of all ranks, and this rank's own values in its place; rounded."""
        dtype: tl.constexpr = own.dtype
        total = tl.zeros(own.shape, tl.float32)
        for source in tl.static_range(num_ranks):
            if source == rank:
                total += own.to(tl.float32)
            else:
                places = inbox + row_places + source * words
                total += _receive(places, is_word, stamp, dtype).to(tl.float32)
        return total.to(dtype)

    @triton.jit
    def _peer_sum(
        addend,  # [rows, hidden_size]
        residual,  # as addend
        weight,
        bias,
        total,
        normed,
        addresses,
        inbox,
        stamps,
        eps,
        max_rows,
        rank: tl.constexpr,
        num_ranks: tl.constexpr,
        is_two_shot: tl.constexpr,
        has_norm: tl.constexpr,
        has_bias: tl.constexpr,
        hidden_size: tl.constexpr,
        row_words: tl.constexpr,
        block: tl.constexpr,
        pdl: tl.constexpr,
    ):
        """One row."""
        row = tl.program_id(0)
        offsets = tl.arange(0, block)
        is_element = offsets < hidden_size
        places = row.to(tl.int64) * hidden_size + offsets
        word_block: tl.constexpr = block * row_words // hidden_size
        words = tl.arange(0, word_block)
        is_word = words < row_words
        if pdl:
            start_dependents()
        if has_norm:
            w = tl.load(weight + offsets, mask=is_element, other=0.0).to(tl.float32)
            b = w
            if has_bias:
                b = tl.load(bias + offsets, mask=is_element, other=0.0).to(tl.float32)
        if pdl:
            wait_for_predecessors()
        stamp = tl.load(stamps + row) + 1
        row_places = ((stamp & 1) * max_rows + row).to(tl.int64) * (num_ranks * row_words) + words
        own = tl.load(addend + places, mask=is_element, other=0.0)
        adder = row % num_ranks  # of two shots
        if not is_two_shot:
            for step in tl.static_range(1, num_ranks):  # each rank begins with another one
                _send(addresses + (rank + step) % num_ranks, row_places + rank * row_words, own, is_word, stamp)
            summed = _sum(own, inbox, row_places, is_word, stamp, rank, num_ranks, row_words)
        elif adder == rank:
            summed = _sum(own, inbox, row_places, is_word, stamp, rank, num_ranks, row_words)
            for step in tl.static_range(1, num_ranks):
                _send(addresses + (rank + step) % num_ranks, row_places + rank * row_words, summed, is_word, stamp)
        else:
            _send(addresses + adder, row_places + rank * row_words, own, is_word, stamp)
            summed = _receive(inbox + row_places + adder * row_words, is_word, stamp, own.dtype)
        if has_norm:
            values = tl.load(residual + places, mask=is_element, other=0.0).to(tl.float32) + summed.to(tl.float32)
            stored = values.to(total.dtype.element_ty)
            tl.store(total + places, stored, mask=is_element)
            y = normalize(stored.to(tl.float32), w, b, is_element, eps, has_bias, hidden_size)
            tl.store(normed + places, y.to(normed.dtype.element_ty), mask=is_element)
        else:
            tl.store(total + places, summed, mask=is_element)
        tl.store(stamps + row, stamp)
