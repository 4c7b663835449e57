"""All that a sequence has on the device: tokens, positions, KV locations, beam scores, sampling parameters.

Sequences come and go; each has a slot while it runs. The host sends changes only: new sequences and beam reorders.
Every step reads and writes these tensors by slot, inside CUDA graphs too. One slot more than sequences can use is the
dummy: padding rows of a graph use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.plan import BeamReorder, Chunk, NewSequences
from engine.request import SamplingParams
from executor.kv_cache import PrefillChunk
from kernels.accept_tokens import accept_tokens
from kernels.gumbel import as_int64
from kernels.slot_parameters import MOST_LISTED, Parameter, SlotTensors

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class SlotRequest:
    """The host's view of a slot: its request, and the parameters of its own sample."""

    new: NewSequences
    params: SamplingParams
    always_banned: torch.Tensor | None = None  # [any] int64, the request's banned_ids on the device
    logit_bias: tuple[torch.Tensor, torch.Tensor] | None = None  # different ids [any] int64, biases [any] fp32, there

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
    bias_ids, banned_ids: [slots + 1, MOST_LISTED] int32; biases: as many fp32. `parameters` says how many are in use.
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
        self.bias_ids = torch.zeros(rows, MOST_LISTED, dtype=torch.int32, device=device)
        self.biases = torch.zeros(rows, MOST_LISTED, device=device)
        self.banned_ids = torch.zeros(rows, MOST_LISTED, dtype=torch.int32, device=device)
        self._offsets = np.arange(block_size)  # of a block's tokens
        # The host's side, by slot.
        self.requests: dict[int, SlotRequest] = {}
        self.has_long_list = np.zeros(rows, dtype=bool)  # longer than the device's: banned_ids has none of it
        self.has_extras = np.zeros(rows, dtype=bool)  # more is asked for than a token and its log-probability
        self.unbanned_from = np.zeros(rows, dtype=np.int64)  # position from which no token is banned in every step
        self.has_penalty = np.zeros(rows, dtype=bool)
        self.has_bias = np.zeros(rows, dtype=bool)
        self.has_min_p = np.zeros(rows, dtype=bool)
        self.is_greedy = np.ones(rows, dtype=bool)
        self._run_len = np.zeros(rows, dtype=np.int64)  # how many of the first locations are consecutive
        self._first_loc = np.zeros(rows, dtype=np.int64)

    @staticmethod
    def num_bytes(num_slots: int, max_seq_len: int) -> int:
        """Bytes of the tensors on the device, nearly."""
        return (num_slots + 1) * (max_seq_len * (8 + 4) + 8 * (len(Parameter) + 4) + MOST_LISTED * 3 * 4)

    @property
    def tensors(self) -> SlotTensors:
        """What kernels need to choose tokens."""
        return SlotTensors(
            self.token_ids,
            self.positions,
            self.advance,
            self.parameters,
            self.seeds,
            self.bias_ids,
            self.biases,
            self.banned_ids,
        )

    def start(self, new_sequences: Sequence[NewSequences]) -> None:
        """Give slots to new sequences. Everything but lists of ids travels in one copy."""
        if not new_sequences:
            return
        slots: list[int] = []
        parameters: list[list[float]] = []
        seeds: list[int] = []
        positions: list[int] = []
        tokens: list[np.ndarray] = []  # per slot, the first columns of token_ids
        locs: list[np.ndarray] = []  # per slot, the first columns of kv_loc_table
        for new in new_sequences:
            banned, logit_bias = self._write_lists(new)
            sample_ids = new.sample_ids or range(len(new.seq_slots))
            for seq_slot, own_locs, own_tokens, sample_id in zip(
                new.seq_slots, self._locs(new), _tokens(new), sample_ids, strict=True
            ):
                request = SlotRequest(new, new.sampling.for_sample(sample_id), banned, logit_bias)
                self._describe(seq_slot, request)
                slots.append(seq_slot)
                parameters.append(_parameters(request))
                seeds.append(as_int64(request.params.random_seed))
                positions.append(new.num_computed if seq_slot == new.seq_slots[0] else request.prompt_len)
                tokens.append(own_tokens)
                locs.append(own_locs)
                if self.device.type == "cpu":
                    self._set_run(seq_slot, own_locs)
        parts = [self._placed(slots, tokens), self._placed(slots, locs)]
        parts.append(np.array([slots, seeds, positions], dtype=np.int64))
        parts.append(np.array(parameters, dtype=np.float64).view(np.int64))
        on_device = self.tensor(np.concatenate([part.ravel() for part in parts])).split([part.size for part in parts])
        (token_places, token_ids), (loc_places, kv_locs) = (values.view(2, -1) for values in on_device[:2])
        index, on_device_seeds, on_device_positions = on_device[2].view(3, -1)
        self.token_ids.view(-1)[token_places] = token_ids
        self.kv_loc_table.view(-1)[loc_places] = kv_locs.int()
        self.positions[index] = on_device_positions
        self.seeds[index] = on_device_seeds
        self.parameters[index] = on_device[3].view(torch.float64).view(len(slots), -1)

    def grow(self, new_blocks: Sequence[tuple[int, int, list[int]]]) -> None:
        """Give slots more blocks: (slot, position, block ids), for the slot's tokens from that position on."""
        if not new_blocks:
            return
        size, max_seq_len = self.block_size, self.token_ids.shape[1]
        blocks = [  # a block's first place in the flat table, its first location, the end of its slot's row
            (seq_slot * max_seq_len + start + index * size, block_id * size, (seq_slot + 1) * max_seq_len)
            for seq_slot, start, block_ids in new_blocks
            for index, block_id in enumerate(block_ids)
        ]
        firsts = np.array(blocks, dtype=np.int64).T[:, :, None]
        values = firsts[:2] + self._offsets
        places, kv_locs = self.tensor(values[:, values[0] < firsts[2]])
        self.kv_loc_table.view(-1)[places] = kv_locs.int()
        if self.device.type == "cpu":
            for seq_slot, start, own_ids in new_blocks:
                self._extend_run(seq_slot, start, self._locs_of(own_ids)[: max_seq_len - start])

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

    def write_drafts(self, chunks: Sequence[Chunk]) -> None:
        """Write the chunks' drafts to their places, as if they were known."""
        drafts = [
            (chunk.seq_slot, chunk.start + chunk.length - len(chunk.draft_ids) + place, token_id)
            for chunk in chunks
            for place, token_id in enumerate(chunk.draft_ids)
        ]
        if drafts:
            slots, positions, token_ids = self.tensor(np.array(drafts).T)
            self.token_ids[slots, positions] = token_ids

    def accept(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """As `append`, of slots that may have several rows one after another, at positions one after another.

        Such a slot goes on after its first token that is not the draft in its place; what is behind it is computed
        again.
        """
        accept_tokens(self.token_ids, self.positions, slots, positions, token_ids)

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
        self.requests[seq_slot] = request
        self.has_long_list[seq_slot] = len(_listed_ids(request.new)) > MOST_LISTED
        self.has_extras[seq_slot] = params.beam_width > 1 or params.num_log_probs > 0
        first_end = request.prompt_len + params.min_length if request.new.end_ids else 0
        self.unbanned_from[seq_slot] = first_end if request.always_banned is None else _NEVER
        self.has_penalty[seq_slot] = params.has_penalty
        self.has_bias[seq_slot] = bool(params.logit_bias)
        self.has_min_p[seq_slot] = params.min_p > 0
        self.is_greedy[seq_slot] = params.is_greedy

    def _logit_bias(self, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not params.logit_bias:
            return None
        sums: dict[int, float] = {}
        for token_id, bias in params.logit_bias:
            sums[token_id] = sums.get(token_id, 0.0) + bias
        values = torch.tensor(list(sums.values()), dtype=torch.float32).to(self.device, non_blocking=True)
        return self.tensor(list(sums)), values

    def _write_lists(self, new: NewSequences) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Write a request's lists of ids, where they fit. Returns its banned ids and its logit_bias, on the device."""
        banned = self.tensor(new.banned_ids) if new.banned_ids else None
        logit_bias = self._logit_bias(new.sampling)
        listed_ids = _listed_ids(new)
        is_listed = 0 < len(listed_ids) <= MOST_LISTED
        if logit_bias is not None or is_listed:
            own = self.tensor(new.seq_slots)
            if logit_bias is not None:
                self.bias_ids[own, : len(logit_bias[0])] = logit_bias[0].int()
                self.biases[own, : len(logit_bias[1])] = logit_bias[1]
            if is_listed:
                self.banned_ids[own, : len(listed_ids)] = self.tensor(listed_ids).int()
        return banned, logit_bias

    def _locs(self, new: NewSequences) -> list[np.ndarray]:
        """Per slot the KV locations of its tokens; all but the first slot read the prompt at the first one's."""
        all_locs: list[np.ndarray] = []
        for block_ids in new.block_ids:
            own = self._locs_of(block_ids)
            if all_locs:
                own = np.concatenate([all_locs[0][: len(new.prompt_ids)], own])
            all_locs.append(own[: self.token_ids.shape[1]])
        return all_locs

    def _locs_of(self, block_ids: list[int]) -> np.ndarray:
        blocks = np.asarray(block_ids, dtype=np.int64)[:, None] * self.block_size
        return (blocks + self._offsets).ravel()

    def _placed(self, slots: Sequence[int], columns: list[np.ndarray]) -> np.ndarray:
        """[2, values]: the places of each slot's first columns in a flat table of slots, and the values."""
        lens = np.array([len(values) for values in columns])
        shifts = np.array(slots) * self.token_ids.shape[1] - (lens.cumsum() - lens)
        return np.stack([np.repeat(shifts, lens) + np.arange(lens.sum()), np.concatenate(columns)])

    def _measure_run(self, seq_slot: int) -> None:
        """Runs of locations spare a copy on a CPU. A GPU's kernels read the table, and never a run."""
        if self.device.type == "cpu":
            self._set_run(seq_slot, self.kv_loc_table[seq_slot].numpy())
        else:
            self._run_len[seq_slot] = 0

    def _extend_run(self, seq_slot: int, start: int, locs: np.ndarray) -> None:
        """Locations from `start` on are new: a run that reaches so far goes on there, or ends."""
        if self._run_len[seq_slot] >= start:
            expected = self._first_loc[seq_slot] + start + np.arange(len(locs))
            breaks = np.flatnonzero(locs != expected)
            self._run_len[seq_slot] = start + (breaks[0] if len(breaks) else len(locs))

    def _set_run(self, seq_slot: int, locs: np.ndarray) -> None:
        breaks = np.flatnonzero(np.diff(locs) != 1)
        self._run_len[seq_slot] = breaks[0] + 1 if len(breaks) else len(locs)
        self._first_loc[seq_slot] = locs[0] if len(locs) else 0


def _tokens(new: NewSequences) -> list[np.ndarray]:
    """Per slot its known tokens."""
    outputs = new.output_ids or [[]] * len(new.seq_slots)
    return [np.array([*new.prompt_ids, *output_ids], dtype=np.int64) for output_ids in outputs]


def _parameters(request: SlotRequest) -> list[float]:
    """A slot's row, in the order of Parameter.

    FasterTransformer's penalties count in full after the temperature divides the logits: they are multiplied by it.
    """
    params = request.params
    num_end_ids, num_listed = len(_early_end_ids(request.new)), len(_listed_ids(request.new))
    temperature = 1.0 if params.openai_penalties else params.temperature or 1.0
    presence, output_presence = params.presence_penalty * temperature, 0.0
    if params.openai_penalties:
        presence, output_presence = output_presence, presence
    return [
        request.prompt_len,
        params.temperature,
        params.top_k,
        params.top_p,
        params.top_p_decay,
        params.top_p_min,
        params.top_p_reset_id,
        params.repetition_penalty,
        presence,
        params.frequency_penalty * temperature,
        output_presence,
        params.min_p,
        params.min_length,
        params.has_penalty,
        len({token_id for token_id, _ in params.logit_bias}),
        num_listed if num_listed <= MOST_LISTED else 0,
        num_end_ids if num_listed <= MOST_LISTED else 0,
    ]


def _listed_ids(new: NewSequences) -> list[int]:
    """The banned ids that the device gets: end ids first, if a min_length bans them at all."""
    return [*_early_end_ids(new), *new.banned_ids]


def _early_end_ids(new: NewSequences) -> tuple[int, ...]:
    return new.end_ids if new.sampling.min_length else ()
