"""All that a sequence has on the device: tokens, positions, KV locations, beam scores, sampling parameters.

Sequences come and go; each has a slot while it runs. The host sends changes only: new sequences and beam reorders.
Every step reads and writes these tensors by slot, inside CUDA graphs too. One slot more than sequences can use is the
dummy: padding rows of a graph use it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.plan import BeamReorder, NewSequences
from engine.request import SamplingParams
from executor.kv_cache import PrefillChunk

_NEVER = np.iinfo(np.int64).max


class Parameter(enum.IntEnum):
    """Columns of SlotState.parameters. Additive penalties are there multiplied by the temperature, see penalties."""

    PROMPT_LEN = 0
    TEMPERATURE = 1
    TOP_K = 2
    TOP_P = 3
    TOP_P_DECAY = 4
    TOP_P_MIN = 5
    TOP_P_RESET_ID = 6
    REPETITION_PENALTY = 7
    PRESENCE_PENALTY = 8
    FREQUENCY_PENALTY = 9


@dataclass(frozen=True)
class SlotRequest:
    """The host's view of a slot: its request, and the parameters of its own sample."""

    new: NewSequences
    params: SamplingParams
    always_banned: torch.Tensor | None = None  # [any] int64, the request's banned_ids on the device

    @property
    def prompt_len(self) -> int:
        return len(self.new.prompt_ids)


class SlotState:
    """State of `num_slots` sequences of up to `max_seq_len` tokens, and of the dummy slot, the last one.

    token_ids: [slots + 1, max_seq_len] int64, the tokens of each sequence so far.
    positions: [slots + 1] int64, the next token to compute of each sequence; 0 for the dummy, always.
    kv_loc_table: [slots + 1, max_seq_len] int32, where the keys and values of each token are in the flat cache.
    beam_scores: [slots + 1] fp32.
    parameters: [slots + 1, len(Parameter)] fp64; seeds: [slots + 1] int64, the bits of random_seed.
    advance: [slots + 1] int64, by how much a decode step moves the position: 1, and 0 for the dummy.
    """

    def __init__(
        self, num_slots: int, max_seq_len: int, block_size: int, num_blocks: int, device: torch.device
    ) -> None:
        """The flat cache has num_blocks · block_size locations, and one more for the dummy."""
        self.dummy_slot = num_slots
        self.block_size = block_size
        self.device = device
        rows = num_slots + 1
        self.token_ids = torch.zeros(rows, max_seq_len, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.kv_loc_table = torch.full((rows, max_seq_len), num_blocks * block_size, dtype=torch.int32, device=device)
        self.beam_scores = torch.zeros(rows, device=device)
        self.parameters = torch.zeros(rows, len(Parameter), dtype=torch.float64, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.advance = torch.ones(rows, dtype=torch.int64, device=device)
        self.advance[num_slots] = 0
        # The host's side, by slot.
        self.requests: dict[int, SlotRequest] = {}
        self.plain_from = np.full(rows, _NEVER)  # position from which the likeliest token is all that is asked for
        self.unbanned_from = np.zeros(rows, dtype=np.int64)  # position from which no token is banned in every step
        self.has_penalty = np.zeros(rows, dtype=bool)
        self.is_greedy = np.ones(rows, dtype=bool)
        self._run_len = np.zeros(rows, dtype=np.int64)  # how many of the first locations are consecutive
        self._first_loc = np.zeros(rows, dtype=np.int64)

    @staticmethod
    def num_bytes(num_slots: int, max_seq_len: int) -> int:
        """Bytes of the tensors on the device, nearly."""
        return (num_slots + 1) * (max_seq_len * (8 + 4) + 8 * (len(Parameter) + 4))

    def start(self, new_sequences: Sequence[NewSequences]) -> None:
        """Give slots to new sequences."""
        if not new_sequences:
            return
        slots: list[int] = []
        rows: list[list[float]] = []
        seeds: list[int] = []
        for new in new_sequences:
            banned = self.tensor(new.banned_ids) if new.banned_ids else None
            own = self.tensor(new.seq_slots)
            self.token_ids[own, : len(new.prompt_ids)] = self.tensor(new.prompt_ids)
            for number, seq_slot in enumerate(new.seq_slots):
                request = SlotRequest(new, new.sampling.for_sample(number), banned)
                self._describe(seq_slot, request)
                slots.append(seq_slot)
                rows.append(_parameters(request))
                seeds.append(as_int64(request.params.random_seed))
            self._assign(new)
        index = self.tensor(slots)
        self.positions[index] = 0
        self.parameters[index] = torch.tensor(rows, dtype=torch.float64).to(self.device, non_blocking=True)
        self.seeds[index] = self.tensor(seeds)

    def reorder(self, reorder: BeamReorder) -> None:
        """Let each beam continue the first `length` tokens of its parent, in place of its own, and with a new token.

        Only indices are copied: a slot writes each token to a location of its own, which no other slot ever writes,
        so shared keys and values stay as they are (FasterTransformer's cache_indirection does the same).
        """
        slots, parents, token_ids = self.tensor([reorder.seq_slots, reorder.parents, reorder.token_ids])
        length = reorder.length
        for table in (self.token_ids, self.kv_loc_table):
            table[slots, :length] = table[parents, :length]
        self.token_ids[slots, length] = token_ids
        self.positions[slots] = length
        self.beam_scores[slots] = torch.tensor(reorder.scores, dtype=torch.float32).to(self.device, non_blocking=True)
        for seq_slot in reorder.seq_slots:
            self._measure_run(seq_slot)

    def append(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write the token at each slot's position, the next to compute; all [rows] int64 on the device."""
        self.token_ids[slots, positions] = token_ids
        self.positions[slots] = positions

    def chunk(self, seq_slot: int, first_row: int, start: int, length: int) -> PrefillChunk:
        """Describe a slot's tokens [start, start + length), which are the step's rows from `first_row`."""
        kv_len = start + length
        if kv_len <= self._run_len[seq_slot]:
            first = int(self._first_loc[seq_slot])
            return PrefillChunk(first_row, length, kv_len, slice(first, first + kv_len))
        return PrefillChunk(first_row, length, kv_len, self.kv_loc_table[seq_slot, :kv_len].long())

    def tensor(self, values: np.ndarray | Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        """An int64 tensor on the device."""
        return torch.as_tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def _describe(self, seq_slot: int, request: SlotRequest) -> None:
        params = request.params
        is_changed = params.has_penalty or params.num_log_probs or request.always_banned is not None
        is_plain = params.is_greedy and params.beam_width == 1 and not is_changed
        self.requests[seq_slot] = request
        self.plain_from[seq_slot] = request.prompt_len + params.min_length if is_plain else _NEVER
        first_end = request.prompt_len + params.min_length if request.new.end_ids else 0
        self.unbanned_from[seq_slot] = first_end if request.always_banned is None else _NEVER
        self.has_penalty[seq_slot] = params.has_penalty
        self.is_greedy[seq_slot] = params.is_greedy

    def _assign(self, new: NewSequences) -> None:
        """Note where the new sequences' tokens go; all but the first read the prompt at the first one's locations."""
        prompt_len = len(new.prompt_ids)
        first_slot = new.seq_slots[0]
        for seq_slot, block_ids in zip(new.seq_slots, new.block_ids, strict=True):
            start = 0 if seq_slot == first_slot else prompt_len
            blocks = np.asarray(block_ids, dtype=np.int32)[:, None] * self.block_size
            locs = (blocks + np.arange(self.block_size, dtype=np.int32)).ravel()[: self.token_ids.shape[1] - start]
            row = self.kv_loc_table[seq_slot]
            if start:
                row[:start] = self.kv_loc_table[first_slot, :start]
            row[start : start + len(locs)] = torch.from_numpy(locs).to(self.device, non_blocking=True)
            if start:
                self._measure_run(seq_slot)
            else:
                self._set_run(seq_slot, locs)

    def _measure_run(self, seq_slot: int) -> None:
        """Runs of locations spare a copy on a CPU. A GPU's kernels read the table, and never a run."""
        if self.device.type == "cpu":
            self._set_run(seq_slot, self.kv_loc_table[seq_slot].numpy())
        else:
            self._run_len[seq_slot] = 0

    def _set_run(self, seq_slot: int, locs: np.ndarray) -> None:
        breaks = np.flatnonzero(np.diff(locs) != 1)
        self._run_len[seq_slot] = breaks[0] + 1 if len(breaks) else len(locs)
        self._first_loc[seq_slot] = locs[0] if len(locs) else 0


def _parameters(request: SlotRequest) -> list[float]:
    """A slot's row, in the order of Parameter."""
    params = request.params
    temperature = params.temperature or 1.0
    return [
        request.prompt_len,
        params.temperature,
        params.top_k,
        params.top_p,
        params.top_p_decay,
        params.top_p_min,
        params.top_p_reset_id,
        params.repetition_penalty,
        params.presence_penalty * temperature,
        params.frequency_penalty * temperature,
    ]


def as_int64(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - 2**64 if value >= 2**63 else value
