"""A request as the scheduler sees it: its sequences, and how far each is computed. Numbers only: no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engine.beam import Beams, BeamSearch
from engine.metrics import Progress
from engine.ngram import NgramDrafter
from engine.plan import StepOutput
from engine.request import Output, Request

if TYPE_CHECKING:
    from engine.cohorts import Cohort

NO_SLOT = -1


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample or beam. A step computes some of the tokens from `num_computed` to `num_tokens`.

    prefill_len: the known tokens that it computes before it samples one: the prompt, or all but the last one that it
    had when it was preempted.

    The blocks hold the tokens from `first_own` on. Those before it are a prompt's that another sequence of the group
    computes: `shared_ids` are its blocks.
    """

    group: SequenceGroup
    index: int  # of the sample or beam
    output: Output
    prefill_len: int
    num_computed: int = 0
    seq_slot: int = NO_SLOT
    block_ids: list[int] = field(default_factory=list)
    shared_ids: list[int] = field(default_factory=list)
    first_own: int = 0

    @property
    def num_tokens(self) -> int:
        """The prompt and every token that a plan samples, known by now or not, and at least one of them."""
        return max(self.prefill_len, self.num_computed) + 1


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """The sequences of one request that have not ended; for beam search, all of them. All have as many tokens.

    The first sequence computes the prompt for the group. max_tokens: of a sequence, prompt and output together.
    """

    request: Request
    max_tokens: int
    beam_search: BeamSearch | None
    is_stepwise: bool  # the host decides on each token (beams, bad words) before it plans the next one
    sequences: list[Sequence] = field(default_factory=list)
    prompt_keys: list[bytes] | None = None  # of the prompt's full blocks (engine.blocks), once they were looked for
    known_keys: list[bytes] | None = None  # of all known tokens', once they were looked for while it waits
    capacity: int = 0  # tokens of each sequence that can be computed until its group needs more blocks, or has ended
    beams: Beams | None = None  # the beams that the next step continues
    is_running: bool = False  # it has slots and blocks
    cohort: int = 0  # where it runs, or ran last (engine.cohorts)
    is_settled: bool = True  # without slots: all its tokens are known
    is_prefilling: bool = True
    is_steady: bool = False  # each step computes one token of each sequence (engine.decode_rows)
    is_resumed: bool = False  # it computes tokens again that it had before it was preempted
    num_scored: int = 0  # prompt tokens whose log-probabilities need no more steps
    num_in_flight: int = 0  # plans on their way that sample for it; counted where it is stepwise
    sampled_at: float = 0.0  # when its last tokens came; kept where it is stepwise, preempted or speculating
    drafter: NgramDrafter | None = None  # once it has been asked for drafts
    draft_ids: list[int] = field(default_factory=list)  # they may follow the known tokens
    is_speculating: bool = False  # it has drafts, or had some in its last plan: it needs its last tokens to be planned

    @classmethod
    def of(cls, request: Request) -> SequenceGroup:
        """The group of a request that has not run."""
        sampling, words, prompt_len = request.sampling, request.words, len(request.prompt_ids)
        beam_search = BeamSearch(request) if sampling.beam_width > 1 else None
        is_stepwise = beam_search is not None or (words is not None and words.has_bad)
        group = cls(request, prompt_len + sampling.max_new_tokens, beam_search, is_stepwise)
        outputs = [Output() for _ in range(sampling.width)] if beam_search else request.outputs
        group.sequences = [Sequence(group, index, output, prompt_len) for index, output in enumerate(outputs)]
        return group

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def can_speculate(self) -> bool:
        return not self.is_stepwise and self.request.sampling.n == 1

    @property
    def num_plannable(self) -> int:
        """Known tokens that the next step may compute. All but the first sequence wait until the prompt is computed."""
        first = self.sequences[0]
        ready = self.sequences if first.num_computed >= self.prompt_len else [first]
        return sum(sequence.num_tokens - 1 - sequence.num_computed for sequence in ready)

    @property
    def has_unknown(self) -> bool:
        """Whether a token is on its way; of a group without beams."""
        first = self.sequences[0]
        return first.num_tokens > self.prompt_len + len(first.output.token_ids)

    def output_ids(self, sequence: Sequence) -> list[int]:
        """The tokens after the prompt that a sequence's slot holds; all of them are known."""
        if self.beam_search is None:
            return sequence.output.token_ids
        beams = self.beam_search.running
        return beams[sequence.index][1].token_ids if sequence.index < len(beams) else []

    def settle(self) -> None:
        """Let a group without slots, whose tokens are all known, be computed again from its first token on."""
        num_known = len(self.output_ids(self.sequences[0]))
        self.is_settled = self.is_prefilling = True
        self.is_resumed = num_known > 0
        self.is_speculating, self.draft_ids, self.known_keys = False, [], None
        for sequence in self.sequences:
            sequence.prefill_len = self.prompt_len + max(num_known - 1, 0)
            sequence.num_computed = 0
        if self.beams is not None:  # each slot gets a beam with its last token: it continues itself
            self.beams = replace(self.beams, parents=list(range(len(self.beams.parents))))


@dataclass(eq=False, slots=True)
class Drafted:
    """A sequence with drafts in a plan that is on its way. first_row: of its 1 + len(draft_ids) rows of the output."""

    sequence: Sequence
    draft_ids: list[int]
    first_row: int

    def take(self, step: StepOutput, now: float, progress: Progress) -> str | None:
        """Give the sequence its tokens, up to the first that is not the draft in its place; returns why it ends, if so.

        now: when they came.
        """
        sequence, group, output = self.sequence, self.sequence.group, self.sequence.output
        num_drafts, sampled_ids = len(self.draft_ids), step.token_ids[self.first_row :]
        num_accepted = next((i for i in range(num_drafts) if self.draft_ids[i] != sampled_ids[i]), num_drafts)
        sequence.num_computed -= num_drafts - num_accepted
        num_before, reason = len(output.token_ids), None
        for row in range(self.first_row, self.first_row + num_accepted + 1):
            if row in step.alternatives:
                output.alternatives.append(step.alternatives[row])
            output.append(step.token_ids[row], step.log_probs[row])
            reason = group.request.reason_to_end(output.token_ids)
            if reason is not None:
                break
        num_tokens = len(output.token_ids) - num_before
        progress.num_tokens += num_tokens
        progress.gaps.append(((now - group.sampled_at) / num_tokens, num_tokens))  # they share the time
        group.sampled_at = now
        progress.num_drafts += 1
        progress.num_drafted += num_drafts
        progress.num_accepted += num_accepted
        return reason


@dataclass(eq=False, slots=True)
class PendingOutput:
    """Who gets the output of a plan that is on its way, in the order of engine.plan.StepOutput's lists."""

    sequences: list[Sequence | None]  # per token; None for a beam's and for those of `drafted`
    cohort: Cohort
    beam_groups: list[SequenceGroup] = field(default_factory=list)
    scored_prompts: list[Request] = field(default_factory=list)
    first_logits: list[Request] = field(default_factory=list)
    skipping_groups: list[SequenceGroup] = field(default_factory=list)  # they may have got nothing from the last plan
    started: list[SequenceGroup] = field(default_factory=list)  # they get their first tokens
    drafted: list[Drafted] = field(default_factory=list)
    preempted: list[SequenceGroup] = field(default_factory=list)  # this is the last plan on its way that knows them

    def measure(self, now: float) -> tuple[Progress, int]:
        """The progress so far: who gets a first token, or one after plans that skipped it; and how many tokens.

        Call it before the tokens are given out, at the time that they came. Beams' tokens are not counted.
        """
        started = [group.request for group in self.started if not group.request.is_finished]
        for request in started:
            request.times.first_token = now
        num_tokens = sum(request.sampling.n for request in started if request.sampling.beam_width == 1)
        progress = Progress(started)
        for group in self.skipping_groups:
            if group.sampled_at and group.sequences and group.beam_search is None:
                progress.gaps.append((now - group.sampled_at, len(group.sequences)))
                num_tokens += len(group.sequences)
            group.sampled_at = now if group.is_stepwise else 0.0
        return progress, num_tokens

    def give_extras(self, step: StepOutput) -> None:
        """Give requests what they asked for beyond tokens."""
        for request, log_probs in zip(self.scored_prompts, step.prompt_log_probs, strict=True):
            if not request.is_finished:
                request.prompt_log_probs += log_probs
        for place, per_token in step.prompt_alternatives.items():
            request = self.scored_prompts[place]
            if not request.is_finished:
                request.prompt_alternatives += per_token
        for request, logits in zip(self.first_logits, step.next_token_logits, strict=True):
            if not request.is_finished:
                request.next_token_logits = logits
        for row, alternatives in step.alternatives.items():
            sequence = self.sequences[row]
            if sequence is not None and sequence.output.finish_reason is None:
                sequence.output.alternatives.append(alternatives)
