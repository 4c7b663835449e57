"""A running request as the scheduler sees it: its sequences, and how far each is computed. Numbers only: no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.beam import Beams, BeamSearch
from engine.metrics import Progress
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
    sampled_at: float = 0.0  # when its last tokens came; kept where it is stepwise


@dataclass(eq=False, slots=True)
class PendingOutput:
    """Who gets the output of a plan that is on its way, in the order of engine.plan.StepOutput's lists."""

    sequences: list[Sequence | None]  # per token; None for a beam's
    beam_groups: list[SequenceGroup] = field(default_factory=list)
    scored_prompts: list[Request] = field(default_factory=list)
    first_logits: list[Request] = field(default_factory=list)
    stepwise_groups: list[SequenceGroup] = field(default_factory=list)
    started: list[SequenceGroup] = field(default_factory=list)  # they get their first tokens

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
            group.sampled_at = now
        return progress, num_tokens
