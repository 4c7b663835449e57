"""The scheduler alone: plans and commits with made-up tokens, and the block allocator under it."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest

from engine.blocks import BlockAllocator
from engine.memory import most_blocks
from engine.plan import Chunk, Plan, StepOutput
from engine.request import CANCELLED, END_ID, Request, SamplingParams
from engine.scheduler import Scheduler

END = 999


def request(prompt_len: int, output_len: int, updates: list[str | None] | None = None, **sampling: Any) -> Request:
    """`updates` gets the finish reason at each update."""
    sink = updates if updates is not None else []
    return Request(
        list(range(prompt_len)), SamplingParams(output_len, **sampling), (END,), lambda r: sink.append(r.finish_reason)
    )


def output(plan: Plan, *token_ids: int) -> StepOutput:
    """What a plan gave: these tokens, the last one again and again where they are too few."""
    count = plan.num_sequences
    return StepOutput([*token_ids, *token_ids[-1:] * count][:count], [0.0] * count)


def chunks(plan: Plan) -> list[Chunk]:
    """All that a plan computes, its decode rows as chunks of one token."""
    rows = zip(plan.decode_slots.tolist(), plan.decode_positions.tolist(), strict=True)
    return [Chunk(slot, position, 1, [slot]) for slot, position in rows] + plan.chunks


def scheduler(max_batch_size: int = 4, max_step_tokens: int = 16, num_blocks: int = 64) -> Scheduler:
    return Scheduler(max_batch_size, 1000, max_step_tokens, block_size=4, num_blocks=num_blocks, has_prefix_cache=False)


def run(s: Scheduler, ahead: int = 0, token: int = 1, most: int = 10_000) -> list[Plan]:
    """Drive to the end, committing each plan `ahead` plans late."""
    plans, uncommitted = [], []
    for _ in range(most):
        plan = s.schedule()
        if plan is not None:
            plans.append(plan)
            uncommitted.append(plan)
        if uncommitted and (plan is None or len(uncommitted) > ahead):
            s.commit(output(uncommitted.pop(0), token))
        if not uncommitted and not s.has_work:
            return plans
    raise AssertionError("the scheduler never came to an end")


def test_long_prompt_is_cut_into_pieces_and_samples_once_at_its_end() -> None:
    s = scheduler(max_step_tokens=16)
    s.add(request(40, 2))
    assert [chunks(plan) for plan in run(s)] == [
        [Chunk(0, 0, 16)],
        [Chunk(0, 16, 16)],
        [Chunk(0, 32, 8, [0])],
        [Chunk(0, 40, 1, [0])],
    ]


def test_requests_join_between_steps_and_decodes_come_first() -> None:
    s = scheduler()
    s.add(request(3, 5))
    s.commit(output(s.schedule(), 1))
    s.add(request(4, 2))
    plan = s.schedule()
    assert chunks(plan) == [Chunk(0, 3, 1, [0]), Chunk(1, 0, 4, [1])]
    assert [a.seq_slots for a in plan.new_sequences] == [[1]]


def test_a_short_request_leaves_at_once_and_its_slot_is_used_again() -> None:
    s = scheduler(max_batch_size=2)
    updates: list[str | None] = []
    s.add(request(2, 50))
    s.add(request(2, 1, updates))
    s.add(request(2, 1))
    s.commit(output(s.schedule(), 1))
    assert updates == ["length"]
    plan = s.schedule()
    assert [a.seq_slots for a in plan.new_sequences] == [[1]]


def test_a_cache_with_the_most_blocks_keeps_no_request_waiting() -> None:
    """4 requests as long as they may be take 3 blocks each at once, and the last one leaves half of 3 free."""
    for num_blocks, num_entered in ((most_blocks(4, max_seq_len=12, block_size=4), 4), (4 * 3, 3)):
        s = scheduler(max_step_tokens=64, num_blocks=num_blocks)
        for _ in range(4):
            s.add(request(11, 1))
        assert sum(len(a.seq_slots) for a in s.schedule().new_sequences) == num_entered


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_same_plans_whether_tokens_are_known_late_or_not(ahead: int) -> None:
    s = scheduler(max_batch_size=8)
    requests = [request(n, m) for n, m in ((1, 4), (7, 1), (30, 6))]
    for r in requests:
        s.add(r)
    plans = run(s, ahead)
    assert [len(r.output_ids) for r in requests] == [4, 1, 6]
    computed = {}
    for plan in plans:
        for chunk in chunks(plan):
            assert chunk.start == computed.get(chunk.seq_slot, 0)  # no token twice, none left out
            computed[chunk.seq_slot] = chunk.start + chunk.length
    assert sorted(computed.values()) == [1 + 3, 7, 30 + 5]  # the last token is never computed


def test_end_id_ends_a_request_and_the_token_already_on_its_way_is_dropped() -> None:
    s = scheduler()
    updates: list[str | None] = []
    r = request(2, 50, updates)
    s.add(r)
    plans = [s.schedule(), s.schedule()]  # the second before the first token is known
    s.commit(output(plans[0], END))
    s.commit(output(plans[1], 5))
    assert r.output_ids == [END]
    assert updates == ["end_id"]
    assert not s.has_work
    assert s.blocks.num_free == s.blocks.num_blocks


def test_requests_take_blocks_as_they_grow_and_none_is_lost() -> None:
    s = scheduler(num_blocks=4)  # 16 tokens
    first, second, third = requests = [request(6, 7) for _ in range(3)]  # 2 blocks at first, 3 at last
    for r in requests:
        s.add(r)
    plan = s.schedule()
    assert [new.block_ids for new in plan.new_sequences] == [[[0, 1]], [[2, 3]]]
    s.commit(output(plan, 1))
    while second in s._running:
        s.commit(output(s.schedule(), 1))
    assert (len(first.output_ids), len(second.output_ids)) == (4, 3)  # the step after 8 tokens is the first one's alone
    assert list(s.waiting) == [second, third]
    run(s)
    assert [len(r.output_ids) for r in requests] == [7, 7, 7]
    assert s.blocks.num_free == 4


def test_a_part_of_the_blocks_stays_free_for_running_sequences() -> None:
    """Half a block for each of them, when a request enters."""
    s = scheduler(max_batch_size=40, max_step_tokens=1000, num_blocks=40)
    for _ in range(40):
        s.add(request(3, 20))
    plan = s.schedule()
    assert (len(plan.new_sequences), s.blocks.num_free) == (27, 13)


def test_what_can_never_run_is_refused_with_the_numbers() -> None:
    s = scheduler(num_blocks=4)
    with pytest.raises(ValueError, match="max_new_tokens is 10; with the prompt's 8 tokens that is 18, .* is 16 tok"):
        s.check(request(8, 10))
    with pytest.raises(ValueError, match="longest sequence served is 1000 tokens"):
        s.check(request(8, 993))


def test_abort_ends_all_and_frees_all() -> None:
    s = scheduler(max_batch_size=1)
    updates: list[str | None] = []
    s.add(request(2, 9, updates))
    s.add(request(2, 9, updates))
    plan = s.schedule()
    s.abort_all()
    s.commit(output(plan, 1))
    assert updates == ["shutdown", "shutdown"]
    assert not s.has_work
    assert s.blocks.num_free == s.blocks.num_blocks


def test_random_traffic_always_ends_with_everything_free() -> None:
    rng = random.Random(0)
    s = scheduler(max_batch_size=5, max_step_tokens=11, num_blocks=30)
    requests = [request(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(60)]
    for r in requests:
        s.add(r)
    for plan in run(s, ahead=1):
        assert sum(chunk.length for chunk in chunks(plan)) <= 11
        assert len({chunk.seq_slot for chunk in chunks(plan)}) == len(chunks(plan))
    assert all(len(r.output_ids) == r.sampling.max_new_tokens for r in requests)
    assert s.blocks.num_free == 30


def test_blocks_are_consecutive_where_they_can_be() -> None:
    blocks = BlockAllocator(8)
    first, second, third = blocks.allocate(3), blocks.allocate(2), blocks.allocate(3)
    assert (first, second, third) == ([0, 1, 2], [3, 4], [5, 6, 7])
    blocks.free(first)
    blocks.free(third)
    assert blocks.allocate(2) == [0, 1]
    assert blocks.allocate(4) == [2, 5, 6, 7]
    assert blocks.allocate(1) is None
    with pytest.raises(AssertionError, match="free already"):
        blocks.free([0, 0])


def test_samples_share_the_blocks_of_their_prompt_and_leave_one_by_one() -> None:
    s = scheduler(num_blocks=40)
    r = request(10, 9, n=3, top_k=5)
    s.add(r)
    plan = s.schedule()
    assert chunks(plan) == [Chunk(0, 0, 10, [0, 1, 2])]
    assert [len(ids) for ids in plan.new_sequences[0].block_ids] == [3, 1, 1]  # 10 tokens and one; one of their own
    assert s.blocks.num_free == 35
    s.commit(output(plan, 1, END, 3))
    assert [o.finish_reason for o in r.outputs] == [None, END_ID, None]
    assert s.blocks.num_free == 36
    plan = s.schedule()
    assert chunks(plan) == [Chunk(0, 10, 1, [0]), Chunk(2, 10, 1, [2])]
    s.commit(output(plan, END, 4))  # the prompt's blocks are still read
    assert s.blocks.num_free == 36
    run(s)
    assert [len(o.token_ids) for o in r.outputs] == [2, 1, 9]
    assert s.blocks.num_free == 40


@pytest.mark.parametrize("is_running", [False, True])
def test_a_cancelled_request_leaves_at_once(is_running: bool) -> None:
    s = scheduler(max_batch_size=3)
    updates: list[str | None] = []
    other, r = request(2, 20), request(2, 20, updates, n=2, top_k=5)
    if not is_running:
        s.add(request(2, 2, n=2, top_k=2))
    s.add(other)
    s.add(r)
    plans = [s.schedule(), s.schedule()]
    s.commit(output(plans[0], 1))
    s.cancel(r, CANCELLED)
    s.cancel(r, CANCELLED)  # once more does nothing
    s.commit(output(plans[1], 1))
    assert updates[-1] == CANCELLED
    assert [len(o.token_ids) for o in r.outputs] == ([1, 1] if is_running else [0, 0])
    run(s)
    assert len(other.output_ids) == 20
    assert s.blocks.num_free == s.blocks.num_blocks


def test_a_request_with_bad_words_is_planned_once_its_last_token_is_known() -> None:
    class Words:
        always_banned, has_bad, has_stop = [7], True, False

        def banned(self, prompt_ids: list[int], output_ids: list[int]) -> list[int]:
            return [len(output_ids)]

    s = scheduler()
    s.add(Request([1, 2], SamplingParams(3), (END,), words=Words()))
    plan = s.schedule()
    assert (plan.new_sequences[0].banned_ids, plan.banned_ids.get(0, [])) == ([7], [0])
    assert s.schedule() is None
    s.commit(output(plan, 5))
    assert s.schedule().banned_ids[0] == [1]


def test_width_is_checked_against_slots_and_blocks() -> None:
    s = scheduler(max_batch_size=4, num_blocks=10)
    with pytest.raises(ValueError, match="^n is 5; at most 4 sequences run at once$"):
        s.check(request(2, 2, n=5, top_k=2))
    with pytest.raises(ValueError, match="^beam_width is 4; .* takes 16 blocks, and the key-value cache has 10$"):
        s.check(request(1, 16, beam_width=4))


def test_to_cancel_what_never_came_does_nothing() -> None:
    """A stop by id once overtook its request's submission, and the engine's loop ended over it."""
    s = scheduler()
    stranger = request(2, 5)
    s.cancel(stranger, CANCELLED)
    assert not stranger.is_finished


def test_a_plan_of_many_rows_is_small() -> None:
    """512 rows travel in the control channel's one broadcast of 3584 bytes."""
    for rows, most in ((256, 3000), (512, 3576)):
        s = scheduler(max_batch_size=rows, max_step_tokens=4096, num_blocks=rows * 300)
        for _ in range(rows):
            s.add(request(2, 998))
        s.commit(output(s.schedule(), 1))
        plan = s.schedule()
        assert len(plan.decode_slots) == rows
        assert len(pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL)) <= most


def test_tokens_that_are_known_and_not_computed_are_one_chunk() -> None:
    """A sequence whose keys and values are lost computes its prompt and its output again, in as few steps."""
    s = scheduler(max_step_tokens=8, num_blocks=5)
    first, second = request(4, 9), request(4, 9)  # 3 blocks each, at last
    s.add(first)
    s.add(second)
    plans = run(s, token=7)
    again = next(i for i, plan in enumerate(plans) if plan.new_sequences and i)
    (new,) = plans[again].new_sequences
    assert (new.prompt_ids, new.output_ids) == ([0, 1, 2, 3], [[7] * 5])
    (slot,) = new.seq_slots
    assert chunks(plans[again]) == [Chunk(slot, 0, 8)]  # the last token is left to the next step, which samples
    assert chunks(plans[again + 1]) == [Chunk(slot, 8, 1, [slot])]
    assert first.output_ids == second.output_ids == [7] * 9
