"""A step's output as one flat tensor on its way to rank 0, and what rank 0 reads from it.

Both ends know from the plan alone what the tensor holds (`OutputLayout`), so no sizes travel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.beam import Candidate
from engine.plan import Plan, StepOutput
from engine.request import Token
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState


@dataclass(frozen=True)
class BeamRows:
    """The rows [first, first + count) of one beam search."""

    first: int
    count: int
    num_candidates: int


@dataclass(frozen=True)
class ScoredTokens:
    """Step tokens [first, first + count) whose successors in the prompt get a log-probability; start: of the first.

    num_alternatives: the likeliest tokens that are reported in each successor's place.
    """

    first: int
    count: int
    seq_slot: int
    start: int
    num_alternatives: int

    @property
    def size(self) -> int:
        """Numbers in the step's tensor."""
        return self.count * (1 + 2 * self.num_alternatives)


@dataclass
class OutputLayout:
    """What a plan's tensor holds. Rows are StepOutput's."""

    rows: SamplingRows
    token_index: np.ndarray  # [rows]: the step token whose logits a row has
    vocab_size: int
    alternatives: list[tuple[int, int]] = field(default_factory=list)  # (row, how many)
    beams: list[BeamRows] = field(default_factory=list)
    scored: list[ScoredTokens] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)
    has_drafts: bool = False  # then a slot may have several rows, one after another

    @classmethod
    def of(cls, plan: Plan, state: SlotState, vocab_size: int) -> OutputLayout:
        """state: with the plan's new sequences."""
        slots, positions = plan.decode_slots.astype(np.int64), plan.decode_positions.astype(np.int64) + 1
        token_index = np.arange(len(slots))
        scored: list[ScoredTokens] = []
        logits_rows: list[int] = []
        if plan.chunks:
            sampled_slots: list[int] = []
            sampled_positions: list[int] = []
            step_tokens: list[int] = []
            first = num_rows = len(slots)
            for chunk in plan.chunks:
                request = state.requests[chunk.seq_slot]
                params, prompt_len, end = request.params, request.prompt_len, chunk.start + chunk.length
                if (start := chunk.scored_from) is not None:
                    count, alternatives = min(end, prompt_len - 1) - start, params.num_prompt_log_probs
                    scored.append(ScoredTokens(first + start - chunk.start, count, chunk.seq_slot, start, alternatives))
                if chunk.sampled_slots and params.next_token_logits and end == prompt_len:
                    logits_rows.append(num_rows + len(sampled_slots))
                first += chunk.length
                num_slots, num_drafts = len(chunk.sampled_slots), len(chunk.draft_ids)  # several slots have no drafts
                sampled_slots += chunk.sampled_slots * (1 + num_drafts)
                sampled_positions += [*range(end - num_drafts, end + 1)] * num_slots
                step_tokens += [*range(first - 1 - num_drafts, first)] * num_slots
            columns = np.array([sampled_slots, sampled_positions, step_tokens], dtype=np.int64)
            slots, positions, token_index = (
                np.concatenate(pair) for pair in zip((slots, positions, token_index), columns, strict=True)
            )
        rows = SamplingRows(state, slots, positions, plan.banned_ids)
        layout = cls(rows, token_index, vocab_size, scored=scored, logits_rows=logits_rows, has_drafts=plan.has_drafts)
        if state.has_extras[slots].any():
            layout._add_extras()
        return layout

    @property
    def has_extras(self) -> bool:
        """Whether it holds more than each row's token and log-probability."""
        return bool(self.alternatives or self.beams or self.scored or self.logits_rows)

    def _add_extras(self) -> None:
        previous = None
        for row, request in enumerate(self.rows.requests):
            if request.params.num_log_probs:
                self.alternatives.append((row, request.params.num_log_probs))
            if (width := request.params.beam_width) > 1:
                start, count = (row, 1) if request.new is not previous else self._last_beam()
                self.beams.append(BeamRows(start, count, min(2 * width, count * self.vocab_size)))
            previous = request.new

    def _last_beam(self) -> tuple[int, int]:
        beam = self.beams.pop()
        return beam.first, beam.count + 1

    @property
    def sizes(self) -> list[int]:
        """How many numbers each part has: tokens, log-probabilities, and then per part as `parse` takes them."""
        num_rows = len(self.rows)
        alternatives = [2 * count for _, count in self.alternatives]
        beams = [4 * beam.num_candidates for beam in self.beams]
        scored = [part.size for part in self.scored]
        return [num_rows, num_rows, *alternatives, *beams, *scored, *[self.vocab_size] * len(self.logits_rows)]

    def parse(self, values: torch.Tensor) -> StepOutput:
        """Read the tensor, on the CPU."""
        token_ids, log_probs = values[: 2 * len(self.rows)].numpy().reshape(2, -1)
        output = StepOutput(token_ids.astype(np.int64).tolist(), log_probs.tolist())
        if not self.has_extras:
            return output
        parts = iter(values.split(self.sizes)[2:])
        output.alternatives = {row: _pairs(next(parts).view(1, 2, -1))[0] for row, _ in self.alternatives}
        for beam in self.beams:
            rows = range(beam.first, beam.first + beam.count)
            output.candidates.append(_candidates(next(parts), [output.alternatives.get(row, ()) for row in rows]))
        for place, scored in enumerate(self.scored):
            log_probs, alternatives = next(parts).split([scored.count, scored.size - scored.count])
            output.prompt_log_probs.append(log_probs.tolist())
            if scored.num_alternatives:
                output.prompt_alternatives[place] = _pairs(alternatives.view(scored.count, 2, scored.num_alternatives))
        output.next_token_logits = [next(parts).float().numpy() for _ in self.logits_rows]
        return output


_Pairs = tuple[tuple[int, float], ...]


def _pairs(values: torch.Tensor) -> list[_Pairs]:
    """values: [places, 2, alternatives], token ids and log-probabilities."""
    token_ids, log_probs = values[:, 0].long().tolist(), values[:, 1].tolist()
    return [tuple(zip(*both, strict=True)) for both in zip(token_ids, log_probs, strict=True)]


def _candidates(values: torch.Tensor, alternatives: list[_Pairs]) -> list[Candidate]:
    """alternatives: per beam, of the row that it continues."""
    columns = zip(*values.view(4, -1).tolist(), strict=True)
    return [
        Candidate(int(parent), score, Token(int(token_id), log_prob, alternatives[int(parent)]))
        for token_id, parent, score, log_prob in columns
        if score > float("-inf")
    ]
