"""What rank 0 sends to every rank for one step, and what it gets back. Numbers only: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.beam import Candidate
from engine.request import SamplingParams


@dataclass(frozen=True)
class NewSequences:
    """A request that enters its slots, one per sample or beam: all that the ranks need of it, sent once.

    block_ids: per slot. The first slot's blocks hold the prompt and the tokens after it. The others' hold only the
    tokens after it: they read the prompt from the first one's. Sequences grow: a plan's new_blocks follow these.

    A request that was preempted enters again with the tokens it had: output_ids, per slot. sample_ids: per slot, which
    of the samples it is; empty: all of them. num_computed: tokens of the first slot that its blocks hold already.
    """

    seq_slots: list[int]
    prompt_ids: list[int]
    sampling: SamplingParams
    end_ids: tuple[int, ...]
    block_ids: list[list[int]]
    banned_ids: list[int] = field(default_factory=list)  # in every step
    output_ids: list[list[int]] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)
    num_computed: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a slot, and the slots that get a token sampled after the last of them.

    scored_from: from this one on, each token's successor in the prompt gets a log-probability; None: none does.
    """

    seq_slot: int
    start: int
    length: int
    sampled_slots: list[int] = field(default_factory=list)
    scored_from: int | None = None


@dataclass(frozen=True)
class BeamReorder:
    """Before a step: seq_slots[i] continues the first `length` tokens of parents[i] with token_ids[i], scores[i]."""

    seq_slots: list[int]
    parents: list[int]
    length: int
    token_ids: list[int]
    scores: list[float]


def _no_rows() -> np.ndarray:
    return np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Plan:
    """One step of the whole job, the same on every rank.

    A decode row computes one token, at decode_positions[row] of decode_slots[row], and samples the next one. Both are
    [rows] arrays of small integers, so that a plan of some hundred rows travels in one broadcast. Chunks hold
    everything else: pieces of prompts, or any number of tokens that are known and not computed yet.

    new_blocks: (slot, position, block ids): the blocks hold the slot's tokens from that position on.
    """

    decode_slots: np.ndarray = field(default_factory=_no_rows)
    decode_positions: np.ndarray = field(default_factory=_no_rows)
    chunks: list[Chunk] = field(default_factory=list)
    new_sequences: list[NewSequences] = field(default_factory=list)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    beam_reorders: list[BeamReorder] = field(default_factory=list)
    banned_ids: dict[int, list[int]] = field(default_factory=dict)  # seq_slot → ids, in this step

    @property
    def num_steps(self) -> int:
        """Forward passes of this plan (the watchdog's limit grows with it)."""
        return 1

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values this plan computes."""
        return len(self.decode_slots) + sum(chunk.length for chunk in self.chunks)

    @property
    def num_sequences(self) -> int:
        """Sequences that get a token."""
        return len(self.decode_slots) + sum(len(chunk.sampled_slots) for chunk in self.chunks)


@dataclass
class StepOutput:
    """What a plan gave. Rows are the decode rows, then each chunk's sampled slots."""

    token_ids: list[int]  # per row; not used for beams
    log_probs: list[float]  # per row
    alternatives: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # row → (id, log-prob) pairs
    candidates: list[list[Candidate]] = field(default_factory=list)  # per beam search
    prompt_log_probs: list[list[float]] = field(default_factory=list)  # per chunk that has scored_from
    prompt_alternatives: dict[int, list[tuple[tuple[int, float], ...]]] = field(default_factory=dict)  # of such a chunk
    next_token_logits: list[Sequence[float]] = field(default_factory=list)  # per prompt that ended and asked
