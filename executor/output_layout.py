"""What comes of a step's logits, as one flat tensor on its way to rank 0, and what rank 0 reads from it.

Both ends know from the plan alone what the tensor holds (`Layout`), so no sizes travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from engine.beam import Candidate
from engine.plan import NewSequences, Plan, StepOutput
from engine.request import SamplingParams, Token
from executor.penalties import SamplingRow, ban, current_top_p, penalize
from executor.sampler import sample

_ROWS_AT_ONCE = 256  # of a prompt's log-probabilities: their logits are large


@dataclass(frozen=True)
class Admitted:
    """Whose a slot is, and the parameters of its own sample."""

    admission: NewSequences
    params: SamplingParams
    always_banned: torch.Tensor | None = None  # the admission's banned_ids, on the device


@dataclass(frozen=True)
class BeamRows:
    """The rows [first, first + count) of one beam search."""

    first: int
    count: int
    num_candidates: int


@dataclass(frozen=True)
class Scored:
    """Step tokens [first, first + count) whose successors in the prompt get a log-probability."""

    first: int
    count: int
    slot: int
    start: int


@dataclass
class Layout:
    """What a plan's tensor holds. Rows are in the order of the plan's chunks and their sampled slots."""

    rows: list[SamplingRow] = field(default_factory=list)
    token_index: list[int] = field(default_factory=list)  # per row: the step token whose logits it has
    beams: list[BeamRows] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)
    vocab_size: int = 0

    @classmethod
    def of(cls, plan: Plan, admitted: Mapping[int, Admitted], vocab_size: int) -> Layout:
        """admitted: per slot, whose it is."""
        layout = cls(vocab_size=vocab_size)
        first = 0
        previous = None
        for chunk in plan.chunks:
            admission = admitted[chunk.slot].admission
            params, prompt_len = admission.sampling, len(admission.prompt_ids)
            end = chunk.start + chunk.length
            if params.prompt_log_probs and chunk.start < prompt_len:
                count = min(end, prompt_len - 1) - chunk.start
                layout.scored.append(Scored(first, count, chunk.slot, chunk.start))
            if chunk.sampled_slots and params.next_token_logits and end == prompt_len:
                layout.logits_rows.append(len(layout.rows))
            first += chunk.length
            if chunk.sampled_slots and params.beam_width > 1:
                layout._add_beam(params.beam_width, is_new=admission is not previous)
            previous = admission
            for slot in chunk.sampled_slots:
                own = admitted[slot]
                row = SamplingRow(
                    slot, own.params, admission.end_id, prompt_len, end, chunk.banned_ids, own.always_banned
                )
                layout.rows.append(row)
                layout.token_index.append(first - 1)
        return layout

    def _add_beam(self, width: int, is_new: bool) -> None:
        start, count = (len(self.rows), 1) if is_new else (self.beams[-1].first, self.beams.pop().count + 1)
        self.beams.append(BeamRows(start, count, min(2 * width, count * self.vocab_size)))

    @property
    def is_plain(self) -> bool:
        """Whether each row wants its likeliest token, that token's log-probability, and nothing else."""
        return not (self.beams or self.scored or self.logits_rows) and all(row.is_plain for row in self.rows)

    @property
    def sizes(self) -> list[int]:
        """How many numbers each part has: tokens, log-probabilities, and then per part as `parse` takes them."""
        num_rows = len(self.rows)
        alternatives = [2 * row.params.num_log_probs for row in self.rows if row.params.num_log_probs]
        beams = [4 * beam.num_candidates for beam in self.beams]
        scored = [part.count for part in self.scored]
        return [num_rows, num_rows, *alternatives, *beams, *scored, *[self.vocab_size] * len(self.logits_rows)]

    def parse(self, values: torch.Tensor) -> StepOutput:
        """Read the tensor, on the CPU."""
        parts = iter(values.split(self.sizes))
        token_ids, log_probs = next(parts).long().tolist(), next(parts).tolist()
        tokens = [
            Token(token_id, log_prob, _pairs(next(parts)) if row.params.num_log_probs else ())
            for token_id, log_prob, row in zip(token_ids, log_probs, self.rows, strict=True)
        ]
        candidates = [_candidates(next(parts), tokens[beam.first : beam.first + beam.count]) for beam in self.beams]
        prompt_log_probs = [next(parts).tolist() for _ in self.scored]
        logits = [next(parts).float().numpy() for _ in self.logits_rows]
        return StepOutput(tokens, candidates, prompt_log_probs, logits)


def choose(
    layout: Layout,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    beam_scores: torch.Tensor,
    hidden_logits: Callable[[slice], torch.Tensor],
) -> torch.Tensor:
    """Choose each row's token, and gather whatever else was asked for.

    logits: [rows, vocab] fp32; tokens: [slots, max_seq_len] int64, what each slot has so far; beam_scores: [slots]
    fp32; hidden_logits: the logits of a slice of the step's tokens. Returns the layout's flat tensor, fp64 (which
    holds token ids exactly).
    """
    rows = layout.rows
    parts: list[torch.Tensor] = []
    if rows:
        penalized = penalize(logits, rows, tokens)
        top_p = current_top_p(rows, tokens) if any(row.params.top_p_decay < 1 for row in rows) else None
        chosen = sample(ban(penalized, rows), [row.params for row in rows], [row.position for row in rows], top_p)
        whole = logits.logsumexp(dim=-1)  # [rows]
        parts += [chosen.double(), (logits.gather(1, chosen[:, None])[:, 0] - whole).double()]
        parts += _alternatives(rows, logits, whole)
        for beam in layout.beams:
            part = slice(beam.first, beam.first + beam.count)
            parts.append(_beam_candidates(beam, rows[part], logits[part], penalized[part], whole[part], beam_scores))
    for scored in layout.scored:
        parts.append(_prompt_log_probs(scored, tokens, hidden_logits))
    parts += [logits[row].double() for row in layout.logits_rows]
    return torch.cat(parts) if parts else logits.new_empty(0, dtype=torch.float64)


def _alternatives(rows: Sequence[SamplingRow], logits: torch.Tensor, whole: torch.Tensor) -> list[torch.Tensor]:
    """Per row that asked: the ids of its num_log_probs likeliest tokens, then their log-probabilities."""
    parts = []
    for i, row in enumerate(rows):
        if row.params.num_log_probs:
            values, token_ids = logits[i].topk(row.params.num_log_probs)
            parts.append(torch.cat([token_ids.double(), (values - whole[i]).double()]))
    return parts


def _beam_candidates(
    beam: BeamRows,
    rows: Sequence[SamplingRow],
    logits: torch.Tensor,
    penalized: torch.Tensor,
    whole: torch.Tensor,
    beam_scores: torch.Tensor,
) -> torch.Tensor:
    """[token ids, parents, scores, log-probabilities] of the best continuations, best first.

    beam_search_diversity_rate · rank is added to a beam's own rank-th best continuation where they are compared
    (FasterTransformer, beam_search_topk_kernels.cu, beam_topK_kernel), not to its score.
    """
    params = rows[0].params
    scores = ban((penalized / (params.temperature or 1.0)).log_softmax(dim=-1), rows)
    if rows[0].num_generated > 0:
        slots = torch.tensor([row.slot for row in rows]).to(logits.device)
        scores = scores + beam_scores[slots][:, None]
    per_beam = min(beam.num_candidates, scores.shape[1])
    scores, token_ids = scores.topk(per_beam, dim=-1)  # [beams, per_beam]
    rank = torch.arange(per_beam, device=logits.device)
    ranked = scores + params.beam_search_diversity_rate * rank
    best = ranked.flatten().topk(beam.num_candidates).indices
    parents = best // per_beam
    token_ids = token_ids.flatten()[best]
    log_probs = logits[parents, token_ids] - whole[parents]
    return torch.cat([part.double() for part in (token_ids, parents, scores.flatten()[best], log_probs)])


def _prompt_log_probs(
    scored: Scored, tokens: torch.Tensor, hidden_logits: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """[count] fp64: the log-probability of each token's successor."""
    parts = [tokens.new_empty(0, dtype=torch.float64)]
    for offset in range(0, scored.count, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, scored.count - offset)
        logits = hidden_logits(slice(scored.first + offset, scored.first + offset + count))
        start = scored.start + offset + 1
        following = tokens[scored.slot, start : start + count, None]
        parts.append((logits.gather(1, following)[:, 0] - logits.logsumexp(dim=-1)).double())
    return torch.cat(parts)


def _pairs(values: torch.Tensor) -> tuple[tuple[int, float], ...]:
    token_ids, log_probs = values.view(2, -1).tolist()
    return tuple((int(token_id), log_prob) for token_id, log_prob in zip(token_ids, log_probs, strict=True))


def _candidates(values: torch.Tensor, beams: list[Token]) -> list[Candidate]:
    columns = zip(*values.view(4, -1).tolist(), strict=True)
    return [
        Candidate(int(parent), score, Token(int(token_id), log_prob, beams[int(parent)].alternatives))
        for token_id, parent, score, log_prob in columns
        if score > float("-inf")
    ]
