"""A step's logits → its output: each row's token, its log-probability, and everything else that a request asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from executor.output_layout import BeamRows, OutputLayout, ScoredTokens
from executor.penalties import ban, current_top_p, penalize
from executor.sampler import sample
from executor.sampling_rows import SamplingRows

_ROWS_AT_ONCE = 256  # of a prompt's log-probabilities: their logits are large


def sample_tokens(
    layout: OutputLayout, logits: torch.Tensor, hidden_logits: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """Choose each row's token, and gather what else the layout holds.

    logits: [rows, vocab] fp32; hidden_logits: the logits of a slice of the step's tokens. Returns the layout's flat
    tensor, fp64 (which holds token ids exactly).
    """
    rows = layout.rows
    parts: list[torch.Tensor] = []
    if len(rows):
        penalized = penalize(logits, rows)
        has_decay = any(request.params.top_p_decay < 1 for request in rows.requests)
        chosen = sample(ban(penalized, rows), rows, current_top_p(rows) if has_decay else None)
        logsumexp = logits.logsumexp(dim=-1)  # [rows]
        parts += [chosen.double(), (logits.gather(1, chosen[:, None])[:, 0] - logsumexp).double()]
        for row, count in layout.alternatives:
            values, token_ids = logits[row].topk(count)
            parts.append(torch.cat([token_ids.double(), (values - logsumexp[row]).double()]))
        for beam in layout.beams:
            part = slice(beam.first, beam.first + beam.count)
            parts.append(_beam_candidates(beam, rows.part(part), logits[part], penalized[part], logsumexp[part]))
    for scored in layout.scored:
        parts.append(_prompt_log_probs(scored, rows.state.token_ids, hidden_logits))
    parts += [logits[row].double() for row in layout.logits_rows]
    return torch.cat(parts) if parts else logits.new_empty(0, dtype=torch.float64)


def _beam_candidates(
    beam: BeamRows, rows: SamplingRows, logits: torch.Tensor, penalized: torch.Tensor, logsumexp: torch.Tensor
) -> torch.Tensor:
    """[token ids, parents, scores, log-probabilities] of the best continuations, best first.

    beam_search_diversity_rate · rank is added to a beam's own rank-th best continuation where they are compared
    (FasterTransformer, beam_search_topk_kernels.cu, beam_topK_kernel), not to its score.
    """
    params = rows.requests[0].params
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
    log_probs = logits[parents, token_ids] - logsumexp[parents]
    return torch.cat([part.double() for part in (token_ids, parents, scores.flatten()[best], log_probs)])


def _prompt_log_probs(
    scored: ScoredTokens, token_ids: torch.Tensor, hidden_logits: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """[count] fp64: the log-probability of each token's successor."""
    parts = [token_ids.new_empty(0, dtype=torch.float64)]
    for offset in range(0, scored.count, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, scored.count - offset)
        logits = hidden_logits(slice(scored.first + offset, scored.first + offset + count))
        start = scored.start + offset + 1
        following = token_ids[scored.seq_slot, start : start + count, None]
        parts.append((logits.gather(1, following)[:, 0] - logits.logsumexp(dim=-1)).double())
    return torch.cat(parts)
