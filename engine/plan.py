"""What rank 0 sends to every rank for one step, and what it gets back. Numbers only: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.beam import Candidate
from engine.request import SamplingParams, Token


@dataclass(frozen=True)
class NewSequences:
    """A request that enters its slots, one per sample or beam: everything that ranks must know of it, once.

    block_ids: per slot. The first slot's hold the prompt and what follows; the others' hold only what follows: they
    read the prompt where the first one has it.
    """

    slots: list[int]
    prompt_ids: list[int]
    sampling: SamplingParams
    end_id: int | None
    block_ids: list[list[int]]
    banned_ids: list[int] = field(default_factory=list)  # in every step


@dataclass(frozen=True)
class Chunk:
    """A slot's tokens [start, start + length) in one step, and the slots that get a token from the last of them."""

    slot: int
    start: int
    length: int
    sampled_slots: list[int] = field(default_factory=list)
    banned_ids: list[int] = field(default_factory=list)  # in this step, besides the admission's


@dataclass(frozen=True)
class BeamReorder:
    """Before a step: slots[i] goes on from parents[i]'s first `length` tokens, with token_ids[i] and scores[i]."""

    slots: list[int]
    parents: list[int]
    length: int
    token_ids: list[int]
    scores: list[float]


@dataclass(frozen=True)
class Plan:
    """One step of the whole job, the same on every rank: chunks that decode come first, then prompts."""

    chunks: list[Chunk]
    new_sequences: list[NewSequences] = field(default_factory=list)
    beam_reorders: list[BeamReorder] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Forward passes that this plan stands for (the watchdog's limit grows with it)."""
        return 1

    @property
    def is_decode(self) -> bool:
        """Whether every chunk is one token of one sequence, from which one token follows."""
        return bool(self.chunks) and all(c.length == 1 and c.sampled_slots == [c.slot] for c in self.chunks)

    @property
    def num_sequences(self) -> int:
        """Sequences that get a token."""
        return sum(len(chunk.sampled_slots) for chunk in self.chunks)


@dataclass
class StepOutput:
    """What a plan gave, in the order of its chunks."""

    tokens: list[Token]  # one per sampled slot; a beam's is of no account
    candidates: list[list[Candidate]] = field(default_factory=list)  # per beam search
    prompt_log_probs: list[list[float]] = field(default_factory=list)  # per chunk of a prompt that asked for them
    next_token_logits: list[Sequence[float]] = field(default_factory=list)  # per prompt that ended and asked
