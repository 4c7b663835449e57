"""A device that executes plans on paper: no torch, no model, and it checks every place that a step reads.

A location of its cache holds the digest of all tokens up to the one stored there, as keys and values depend on all of
them. A step asserts that the locations of a sequence hold the digests of its own tokens. A sampled token is a function
of the text's digest, of the seed and of the position, so a request's tokens say whether it was computed right. Where it
is a function of the last tokens only, texts repeat themselves. Log-probabilities are always functions of all tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.beam import Candidate
from engine.plan import Chunk, NewSequences, Plan, StepOutput
from engine.request import Request, Token
from engine.scheduler import Scheduler

VOCAB_SIZE = 20


@dataclass
class _Slot:
    new: NewSequences
    seed: int
    token_ids: list[int]
    locs: dict[int, int]  # position → location
    score: float = 0.0
    digests: list[int] = field(default_factory=list)  # of the first 1, 2, … tokens

    def write(self, position: int, token_ids: list[int]) -> None:
        """Let the text go on with these tokens."""
        self.token_ids[position:] = token_ids
        del self.digests[position:]

    def digest(self, num_tokens: int) -> int:
        """Of the first tokens."""
        while len(self.digests) < num_tokens:
            before = self.digests[-1] if self.digests else 0
            self.digests.append(_number(before, self.token_ids[len(self.digests)]))
        return self.digests[num_tokens - 1]


class PaperDevice:
    """Executes each plan when it is launched, in order; its output may be read later."""

    def __init__(self, block_size: int, reach: int | None = None) -> None:
        """reach: how many of the last tokens a sampled token depends on; None: all, and its position."""
        self.block_size = block_size
        self.reach = reach
        self.num_computed = 0  # tokens
        self._slots: dict[int, _Slot] = {}
        self._cache: dict[int, int] = {}  # location → digest

    def execute(self, plan: Plan) -> StepOutput:
        self._update(plan)
        rows = zip(plan.decode_slots.tolist(), plan.decode_positions.tolist(), strict=True)
        pieces = [Chunk(slot, position, 1, [slot]) for slot, position in rows] + plan.chunks
        assert len({piece.seq_slot for piece in pieces}) == len(pieces), "two pieces of one slot"
        for piece in pieces:
            slot = self._slots[piece.seq_slot]
            if piece.draft_ids:
                slot.write(piece.start + piece.length - len(piece.draft_ids), piece.draft_ids)
            for position in range(piece.start):
                assert self._cache.get(slot.locs[position]) == slot.digest(position + 1), (piece, position)
        written = set()
        for piece in pieces:
            slot = self._slots[piece.seq_slot]
            for position in range(piece.start, piece.start + piece.length):
                loc = slot.locs[position]
                assert loc not in written, "two tokens share a location"
                written.add(loc)
                self._cache[loc] = slot.digest(position + 1)
                self.num_computed += 1
        return self._output(pieces, plan)

    def _update(self, plan: Plan) -> None:
        for new in plan.new_sequences:
            for index, seq_slot in enumerate(new.seq_slots):
                output_ids = new.output_ids[index] if new.output_ids else []
                sample = new.sample_ids[index] if new.sample_ids else index
                first_own = 0 if index == 0 else len(new.prompt_ids)
                slot = _Slot(new, new.sampling.random_seed + sample, [*new.prompt_ids, *output_ids], {})
                if index:
                    first = self._slots[new.seq_slots[0]]
                    slot.locs = {position: first.locs[position] for position in range(first_own)}
                self._slots[seq_slot] = slot
                self._place(seq_slot, first_own, new.block_ids[index])
        for seq_slot, position, block_ids in plan.new_blocks:
            self._place(seq_slot, position, block_ids)
        for reorder in plan.beam_reorders:
            parents = [(self._slots[slot].token_ids, self._slots[slot].locs) for slot in reorder.parents]
            for index, seq_slot in enumerate(reorder.seq_slots):
                slot, (token_ids, locs) = self._slots[seq_slot], parents[index]
                assert len(token_ids) >= reorder.length
                slot.token_ids = [*token_ids[: reorder.length], reorder.token_ids[index]]
                slot.locs = slot.locs | {position: locs[position] for position in range(reorder.length)}
                slot.digests, slot.score = [], reorder.scores[index]

    def _place(self, seq_slot: int, position: int, block_ids: list[int]) -> None:
        locs = (block_id * self.block_size + i for block_id in block_ids for i in range(self.block_size))
        self._slots[seq_slot].locs.update(enumerate(locs, position))

    def _output(self, pieces: list[Chunk], plan: Plan) -> StepOutput:
        output = StepOutput([], [])
        beams: list[tuple[NewSequences, list[_Slot]]] = []
        for piece in pieces:
            end = piece.start + piece.length
            slot = self._slots[piece.seq_slot]
            if piece.scored_from is not None:
                last = min(end, len(slot.new.prompt_ids) - 1)
                log_probs = [
                    _log_prob(slot.digest(p + 1), slot.token_ids[p + 1]) for p in range(piece.scored_from, last)
                ]
                output.prompt_log_probs.append(log_probs)
            for seq_slot in piece.sampled_slots:
                own = self._slots[seq_slot]
                if own.new.sampling.beam_width == 1:
                    self._sample(own, end, len(piece.draft_ids), plan.banned_ids.get(seq_slot, []), output)
                    continue
                if beams and beams[-1][0] is own.new:
                    beams[-1][1].append(own)
                else:
                    beams.append((own.new, [own]))
                output.token_ids.append(0)
                output.log_probs.append(0.0)
        output.candidates = [_candidates(new, slots) for new, slots in beams]
        return output

    def _sample(self, slot: _Slot, end: int, num_drafts: int, banned: list[int], output: StepOutput) -> None:
        """Sample after each of the last drafts and before them; the slot keeps tokens up to the first wrong draft."""
        kept = None
        for position in range(end - num_drafts, end + 1):
            digest = slot.digest(position)
            seen = [digest, slot.seed, position]
            if self.reach is not None:
                seen = [slot.seed, *slot.token_ids[max(0, position - self.reach) : position]]
            token_id = _number(*seen) % VOCAB_SIZE
            while token_id in banned:
                token_id = (token_id + 1) % VOCAB_SIZE
            output.token_ids.append(token_id)
            output.log_probs.append(_log_prob(digest, token_id))
            if kept is None and (position == end or slot.token_ids[position] != token_id):
                kept = position, token_id
        assert kept is not None
        slot.write(kept[0], [kept[1]])


def _candidates(new: NewSequences, slots: list[_Slot]) -> list[Candidate]:
    found = []
    for parent, slot in enumerate(slots):
        digest = slot.digest(len(slot.token_ids))
        score = slot.score if len(slot.token_ids) > len(new.prompt_ids) else 0.0
        for token_id in range(VOCAB_SIZE):
            log_prob = _log_prob(digest, token_id)
            found.append(Candidate(parent, score + log_prob, Token(token_id, log_prob)))
    return sorted(found, key=lambda candidate: -candidate.score)[: 2 * new.sampling.beam_width]


def _number(*values: int) -> int:
    return hash(values) & 0x7FFFFFFFFFFFFFFF  # of integers: the same in every process


def _log_prob(digest: int, token_id: int) -> float:
    return -1 - _number(digest, token_id, -1) % 1000 / 100


def run(scheduler: Scheduler, device: PaperDevice, requests: list[Request], ahead: int = 0) -> int:
    """Run requests to their ends, committing each plan `ahead` plans of its cohort late, as engine.engine does; returns
    the number of preemptions."""
    for request in requests:
        scheduler.check(request)
        scheduler.add(request)
    launched: deque[StepOutput] = deque()
    num_preempted = 0
    for _ in range(100_000):
        plan = scheduler.schedule()
        if plan is not None:
            launched.append(device.execute(plan))
        if launched and plan is None:
            num_preempted += scheduler.commit(launched.popleft()).num_preempted
        while len(launched) >= scheduler.num_cohorts * (1 + ahead):
            num_preempted += scheduler.commit(launched.popleft()).num_preempted
        if not launched and not scheduler.has_work:
            return num_preempted
    raise AssertionError("the scheduler never came to an end")
