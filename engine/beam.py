"""Beam search on the host: it selects beams, keeps hypotheses and ends the search. No torch here.

The rules are those of Hugging Face's generate (transformers 5, GenerationMixin._beam_search): of the 2 · beam_width
best continuations the best beam_width that do not end go on; those that end and are among the beam_width best
become hypotheses, scored by log-probability / length ** len_penalty (the length of the generated text, end token
included), of which the best beam_width are kept. early_stopping "true" ends the search with the beam_width-th
hypothesis, "false" once the best running beam, at its present length, scores below the worst hypothesis, and
"never" once not even the longest possible one could score above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from engine.request import LENGTH, Output, Request, Token

_DEFAULT_LEN_PENALTY = 1.0  # as in Hugging Face's generate


@dataclass(frozen=True)
class Candidate:
    """A continuation of beam `parent` (its place among the running ones) by a token; score: of the whole text."""

    parent: int
    score: float
    token: Token


@dataclass(frozen=True)
class Beams:
    """The beams of the next step, best first: each one's parent, last token and score."""

    parents: list[int]
    token_ids: list[int]
    scores: list[float]


class BeamSearch:
    """The beams of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.width = request.sampling.beam_width
        penalty = request.sampling.len_penalty
        self.len_penalty = _DEFAULT_LEN_PENALTY if penalty is None else penalty
        self.running: list[tuple[float, Output]] = [(0.0, Output())]
        self._hypotheses: list[tuple[float, Output]] = []  # (score with length penalty, text), best first

    def advance(self, candidates: list[Candidate]) -> Beams | None:
        """Take the best 2 · beam_width continuations, best first. Returns None when the search is over."""
        is_full = len(self._hypotheses) == self.width
        accepts_more = not (is_full and self.request.sampling.early_stopping == "true")
        going_on: list[tuple[float, Output, Candidate]] = []
        for rank, candidate in enumerate(candidates):
            output = self.running[candidate.parent][1].extended(candidate.token)
            reason = self.request.reason_to_end(output.token_ids)
            if reason is None:
                going_on.append((candidate.score, output, candidate))
            elif rank < self.width and accepts_more:
                output.finish_reason = reason
                self._keep(candidate.score, output)
        self.running = [(score, output) for score, output, _ in going_on[: self.width]]
        if self._is_over():
            return None
        chosen = [candidate for _, _, candidate in going_on[: self.width]]
        return Beams(
            [candidate.parent for candidate in chosen],
            [candidate.token.token_id for candidate in chosen],
            [candidate.score for candidate in chosen],
        )

    def results(self) -> list[Output]:
        """The best beam_width texts, best first; running beams come after the hypotheses."""
        running = (output for _, output in self.running)
        found = list(islice((*(output for _, output in self._hypotheses), *running), self.width))
        return found or [Output(finish_reason=LENGTH)]  # every continuation is banned

    def _keep(self, score: float, output: Output) -> None:
        normalized = self._normalized(score, len(output.token_ids))
        place = sum(kept >= normalized for kept, _ in self._hypotheses)
        self._hypotheses.insert(place, (normalized, output))
        del self._hypotheses[self.width :]

    def _normalized(self, score: float, length: int) -> float:
        return score / length**self.len_penalty

    def _is_over(self) -> bool:
        if not self.running:
            return True
        if len(self._hypotheses) < self.width:
            return False
        sampling = self.request.sampling
        if sampling.early_stopping == "true":
            return True
        best_score, output = self.running[0]
        is_longest_best = sampling.early_stopping == "never" and self.len_penalty > 0
        length = sampling.max_new_tokens if is_longest_best else len(output.token_ids)
        return self._normalized(best_score, length) <= self._hypotheses[-1][0]
