"""Speculation: which sequences get drafts, how many, and how many of them were right. Numbers only: no torch.

A step that computes a token and k drafts after it samples k + 1 tokens. Each is the token of plain decoding if the
drafts before it are. So a sequence gets 1 to k + 1 tokens from such a step, the same ones as without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.metrics import Progress
from engine.ngram import NgramDrafter
from engine.plan import StepOutput
from engine.plan_builder import PlanBuilder
from engine.request import Request
from engine.sequence import PendingOutput, Sequence, SequenceGroup


class Speculation:
    """Looks for drafts after each commit.

    A request with drafts is planned step by step: its next plan needs its newest tokens. One without is planned ahead
    as ever, so a text that does not repeat itself costs the look only.

    Drafts are for few sequences. A step of up to `max_rows` rows takes little longer than one of a single row: it takes
    the time to read the weights. Beyond it each row has its price, and a wrong draft is a loss. So the running
    sequences share the rows evenly.

    Requests with several samples, beams or bad words have no drafts.
    """

    def __init__(self, max_drafts: int, max_rows: int) -> None:
        """max_drafts: of a sequence in one step."""
        self._max_drafts = max_drafts
        self._max_rows = max_rows
        self._has_drafts = False

    def share(self, num_sequences: int) -> int:
        """How many drafts each of the running sequences may have."""
        return min(self._max_drafts, self._max_rows // max(1, num_sequences) - 1)

    def plan(self, group: SequenceGroup, builder: PlanBuilder, num_sequences: int) -> None:
        """Plan a sequence's last token, known by now, with its drafts; without drafts, it is planned ahead again."""
        (sequence,) = group.sequences
        room = group.capacity - sequence.num_computed - 1  # no other sequence loses blocks for a draft
        draft_ids = group.draft_ids[: max(0, min(room, self.share(num_sequences)))]
        if draft_ids:
            builder.add_drafts(sequence, draft_ids)
        else:
            group.is_speculating = False
            builder.expect(group)
            builder.add_decode(sequence, sequence.num_computed)
        sequence.num_computed += 1 + len(draft_ids)

    def look(self, groups: Iterable[SequenceGroup], num_sequences: int, now: float) -> list[SequenceGroup]:
        """Look for drafts of the running groups; returns those that have some. now: when the newest tokens came."""
        share = self.share(num_sequences)
        if share < 1 and not self._has_drafts:
            return []
        for group in groups:
            if group.can_speculate and not group.is_prefilling:
                self._look_at(group, share, now)
        drafted = [group for group in groups if group.draft_ids]
        self._has_drafts = bool(drafted)
        return drafted

    def _look_at(self, group: SequenceGroup, share: int, now: float) -> None:
        request, output_ids = group.request, group.sequences[0].output.token_ids
        if not output_ids:  # the first token is on its way
            return
        if group.drafter is None:
            group.drafter = NgramDrafter(request.prompt_ids)
        new_ids = output_ids[group.drafter.num_tokens - len(request.prompt_ids) :]
        group.drafter.extend(new_ids)
        # A step samples a token more than it has drafts.
        most = min(share, request.sampling.max_new_tokens - len(output_ids) - 1)
        group.draft_ids = group.drafter.draft(most)
        if group.draft_ids:
            group.is_speculating = True
        if group.is_speculating and new_ids:
            group.sampled_at = now


def append_drafted(
    pending: PendingOutput,
    step: StepOutput,
    now: float,
    progress: Progress,
    end: Callable[[Sequence, str, Progress], None],
) -> list[Request]:
    """Give each sequence that had drafts its tokens, which came `now`; returns the updated requests.

    end: called for a sequence that ends with them, with the reason.
    """
    alive = [drafted for drafted in pending.drafted if drafted.sequence.output.finish_reason is None]
    for drafted in alive:
        reason = drafted.take(step, now, progress)
        if reason is not None:
            end(drafted.sequence, reason, progress)
    return [drafted.sequence.group.request for drafted in alive]
