"""A step's logits → its output: each row's token, its log-probability, and everything else that a request asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from executor.output_layout import BeamRows, OutputLayout, ScoredTokens
from executor.penalties import add_bias, ban, current_top_p, penalize
from executor.sampler import sample
from executor.sampling_rows import SamplingRows

_ROWS_AT_ONCE = 256  # of a prompt's log-probabilities: their logits are large
MOST_ROWS_ASKED = 64  # of a step's rows, for the same reason


def choose(rows: SamplingRows, logits: torch.Tensor) -> torch.Tensor:
    """Choose each row's token. logits: [rows, vocab] fp32. Returns [2, rows] fp64: tokens, log-probabilities."""
    penalized = penalize(add_bias(logits, rows), rows)
    has_decay = any(request.params.top_p_decay < 1 for request in rows.requests)
    chosen = sample(ban(penalized, rows), rows, current_top_p(rows) if has_decay else None)
    log_probs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.stack([chosen.double(), log_probs.double()])


def in_batches(rows: Sequence[Any] | np.ndarray) -> Iterator[Any]:
    """Parts of the rows, of MOST_ROWS_ASKED at most."""
    for first in range(0, len(rows), MOST_ROWS_ASKED):
        yield rows[first : first + MOST_ROWS_ASKED]


def gather(
    layout: OutputLayout,
    chosen: torch.Tensor,
    row_logits: Callable[[Sequence[int] | np.ndarray], torch.Tensor],
    hidden_logits: Callable[[slice], torch.Tensor],
) -> torch.Tensor:
    """Put the rows' tokens and everything else that the layout holds together.

    chosen: [2, rows], as from `choose`. row_logits: the logits [n, vocab] fp32 of some of the rows; hidden_logits: of a
    slice of the step's tokens. Every rank of a tp group calls this, as these two are collective. Returns the layout's
    flat tensor, fp64 (which holds token ids exactly).
    """
    rows = layout.rows
    parts = [chosen.flatten()]
    for alternatives in in_batches(layout.alternatives):
        logits = row_logits([row for row, _ in alternatives])
        for own, (_, count) in zip(logits, alternatives, strict=True):
            parts.append(_likeliest(own, own.logsumexp(dim=-1), count))
    for beam in layout.beams:
        index = np.arange(beam.first, beam.first + beam.count)
        parts.append(_beam_candidates(beam, rows.part(index), row_logits(index)))
    for scored in layout.scored:
        parts += _score_prompt(scored, rows.state.token_ids, hidden_logits)
    parts += [row_logits(own).double().flatten() for own in in_batches(layout.logits_rows)]
    return torch.cat(parts)


def _beam_candidates(beam: BeamRows, rows: SamplingRows, logits: torch.Tensor) -> torch.Tensor:
    """[token ids, parents, scores, log-probabilities] of the best continuations, best first.

    beam_search_diversity_rate · rank is added to a beam's own rank-th best continuation where they are compared
    (FasterTransformer, beam_search_topk_kernels.cu, beam_topK_kernel), not to its score.
    """
    params = rows.requests[0].params
    penalized = penalize(add_bias(logits, rows), rows)
    scores = ban((penalized / (params.temperature or 1.0)).log_softmax(dim=-1), rows)
    if rows.positions[0] > rows.requests[0].prompt_len:
        scores = scores + rows.state.beam_scores[rows.on_device[0]][:, None]
    per_beam = min(beam.num_candidates, scores.shape[1])
    scores, token_ids = scores.topk(per_beam, dim=-1)  # [beams, per_beam]
    rank = torch.arange(per_beam, device=logits.device)
    ranked = scores + params.beam_search_diversity_rate * rank
    best = ranked.flatten().topk(beam.num_candidates).indices
    parents = best // per_beam
    token_ids = token_ids.flatten()[best]
    log_probs = logits[parents, token_ids] - logits.logsumexp(dim=-1)[parents]
    return torch.cat([part.double() for part in (token_ids, parents, scores.flatten()[best], log_probs)])


def _likeliest(logits: torch.Tensor, logsumexp: torch.Tensor, count: int) -> torch.Tensor:
    """[…, vocab], […] → [… · 2 · count] fp64: per row the likeliest tokens' ids, then their log-probabilities."""
    values, token_ids = logits.topk(count, dim=-1)
    return torch.cat([token_ids.double(), (values - logsumexp[..., None]).double()], dim=-1).flatten()


def _score_prompt(
    scored: ScoredTokens, token_ids: torch.Tensor, hidden_logits: Callable[[slice], torch.Tensor]
) -> list[torch.Tensor]:
    """`scored.size` numbers, fp64: the log-probability of each token's successor, then each one's alternatives."""
    log_probs: list[torch.Tensor] = []
    alternatives: list[torch.Tensor] = []
    for offset in range(0, scored.count, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, scored.count - offset)
        logits = hidden_logits(slice(scored.first + offset, scored.first + offset + count))
        start = scored.start + offset + 1
        following = token_ids[scored.seq_slot, start : start + count, None]
        logsumexp = logits.logsumexp(dim=-1)
        log_probs.append((logits.gather(1, following)[:, 0] - logsumexp).double())
        if scored.num_alternatives:
            alternatives.append(_likeliest(logits, logsumexp, scored.num_alternatives))
    return log_probs + alternatives
