"""A running request as the scheduler sees it: its sequences, and how far each is computed. Numbers only: no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.beam import Beams, BeamSearch
from engine.metrics import Progress
from engine.ngram import NgramDrafter
from engine.plan import StepOutput
from engine.request import Output, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample or beam. A step computes some of the tokens from `num_computed` to `num_tokens`.

    num_tokens counts the prompt and every token that a plan samples, known by now or not.
    """

    group: SequenceGroup
    seq_slot: int
    block_ids: list[int]
    output: Output
    num_tokens: int
    num_computed: int = 0


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request that have not ended; for beam search, all of them.

    The first sequence computes the prompt for the group. max_tokens: of a sequence, prompt and output together.
    """

    request: Request
    max_tokens: int
    beam_search: BeamSearch | None
    sequences: list[Sequence] = field(default_factory=list)
    beams: Beams | None = None  # the beams that the next step continues
    is_prefilling: bool = True
    is_stepwise: bool = False  # the host decides on each token (beams, bad words) before it plans the next one
    num_in_flight: int = 0  # plans on their way that sample for it; counted where it is stepwise
    sampled_at: float = 0.0  # when its last tokens came; kept where it is stepwise or speculating
    drafter: NgramDrafter | None = None  # once it has been asked for drafts
    draft_ids: list[int] = field(default_factory=list)  # they may follow the known tokens
    is_speculating: bool = False  # it has drafts, or had some for its last plan: the next one needs its last tokens

    @property
    def can_speculate(self) -> bool:
        return not self.is_stepwise and self.request.sampling.n == 1


@dataclass(eq=False, slots=True)
class Drafted:
    """A sequence with drafts in a plan that is on its way. first_row: of its 1 + len(draft_ids) rows of the output."""

    sequence: Sequence
    draft_ids: list[int]
    first_row: int

    def num_accepted(self, step: StepOutput) -> int:
        """How many of the drafts are the tokens that were sampled in their places."""
        pairs = enumerate(zip(self.draft_ids, step.token_ids[self.first_row :], strict=False))
        return next((place for place, (draft, sampled) in pairs if draft != sampled), len(self.draft_ids))


@dataclass(eq=False, slots=True)
class PendingOutput:
    """Who gets the output of a plan that is on its way, in the order of engine.plan.StepOutput's lists."""

    sequences: list[Sequence | None]  # per token; None for a beam's and for those of `drafted`
    beam_groups: list[SequenceGroup] = field(default_factory=list)
    scored_prompts: list[Request] = field(default_factory=list)
    first_logits: list[Request] = field(default_factory=list)
    stepwise_groups: list[SequenceGroup] = field(default_factory=list)
    started: list[SequenceGroup] = field(default_factory=list)  # they get their first tokens
    drafted: list[Drafted] = field(default_factory=list)

    def measure(self, now: float) -> tuple[Progress, int]:
        """The progress so far: who gets a first token, or one after plans that skipped it; and how many tokens.

        Call it before the tokens are given out, at the time that they came. Beams' tokens are not counted.
        """
        started = [group.request for group in self.started if not group.request.is_finished]
        for request in started:
            request.times.first_token = now
        num_tokens = sum(request.sampling.n for request in started if request.sampling.beam_width == 1)
        progress = Progress(started)
        for group in self.stepwise_groups:
            if group.sampled_at and group.sequences and group.beam_search is None:
                progress.gaps.append((now - group.sampled_at, len(group.sequences)))
                num_tokens += len(group.sequences)
            group.sampled_at = now if group.is_stepwise else 0.0
        return progress, num_tokens
