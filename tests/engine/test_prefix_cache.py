"""Requests that begin with the same tokens share blocks: which are found, which go first, and that nothing changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.blocks import BlockAllocator, block_keys
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from tests.support.engines import finish, make_engine
from tests.support.paper_device import VOCAB_SIZE, PaperDevice, run


def scheduler(num_blocks: int = 100, has_prefix_cache: bool = True) -> Scheduler:
    return Scheduler(8, 1000, 64, block_size=4, num_blocks=num_blocks, has_prefix_cache=has_prefix_cache)


def request(prompt_ids: list[int], output_len: int = 4, **sampling: Any) -> Request:
    return Request(prompt_ids, SamplingParams(output_len, **sampling), ())


def num_computed(s: Scheduler, device: PaperDevice, *requests: Request) -> int:
    """Tokens that are computed until the requests end."""
    before = device.num_computed
    run(s, device, list(requests))
    return device.num_computed - before


def test_a_block_has_a_key_of_its_tokens_and_of_all_before_them() -> None:
    keys = block_keys([1, 2, 3, 4, 5, 6, 7], 2)
    assert len(set(keys)) == len(keys) == 3
    assert block_keys([1, 2, 3, 4, 5, 6], 2, keys[:2]) == keys
    assert [a == b for a, b in zip(keys, block_keys([1, 2, 0, 4, 5, 6], 2), strict=True)] == [True, False, False]
    assert block_keys([3, 4], 2)[0] != keys[1]
    assert block_keys([1], 2) == []


def test_what_was_freed_first_goes_first_and_of_one_text_its_end() -> None:
    blocks = BlockAllocator(8)
    keys = block_keys(list(range(12)), 2)
    first, second = blocks.allocate(3), blocks.allocate(3)
    for block_id, key in zip([*first, *second], keys, strict=True):
        blocks.keep(block_id, key)
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_free == 8
    assert blocks.find(keys) == [*first, *second]
    assert blocks.find(keys[1:2]) == [1] and blocks.find([b"other", *keys]) == []
    assert sorted(blocks.allocate(4)) == [1, 2, 6, 7]  # the two that keep nothing, then the first text's last ones
    assert blocks.find(keys[:3]) == [0] and blocks.find(keys[3:]) == second
    blocks.share(second)
    assert (blocks.num_free, blocks.allocate(2)) == (1, None)
    assert blocks.allocate(1) == [0]  # a block with an owner keeps its content
    assert blocks.find(keys[:3]) == [] and blocks.find(keys[3:]) == second
    blocks.free(second)
    assert blocks.allocate(3) == second
    assert blocks.find(keys) == blocks.find(keys[3:]) == []


def test_a_prompt_shares_the_full_blocks_that_it_begins_with() -> None:
    s, device = scheduler(), PaperDevice(4)
    prompt = list(range(18))
    assert num_computed(s, device, request(prompt)) == 18 + 3
    assert num_computed(s, device, request(prompt)) == 2 + 3  # 4 blocks are found
    assert num_computed(s, device, request(prompt[:16])) == 4 + 3  # the last token is computed always
    assert num_computed(s, device, request([*prompt[:9], 19, *prompt[10:]])) == 10 + 3
    assert num_computed(s, device, request(prompt[1:])) == 17 + 3
    assert num_computed(s, device, request(prompt, n=3, top_k=2), request(prompt, beam_width=2)) == 4 + 9 + 6
    assert s.blocks.num_free == 100


def test_requests_share_a_prompt_while_the_first_one_still_runs() -> None:
    s, device = scheduler(), PaperDevice(4)
    first, second = request(list(range(16)), 9), request([*range(16), 5], 9)
    s.add(first)
    progress = s.commit(device.execute(s.schedule()))
    assert (progress.num_queried, progress.num_hit) == (16, 0)
    s.add(second)
    plan = s.schedule()
    assert plan.new_sequences[0].num_computed == 16
    assert plan.new_sequences[0].block_ids[0][:4] == s._running[first].sequences[0].block_ids[:4]
    progress = s.commit(device.execute(plan))
    assert (progress.num_queried, progress.num_hit) == (17, 16)
    run(s, device, [])
    assert (len(first.output_ids), len(second.output_ids)) == (9, 9)


def test_a_chats_next_turn_finds_the_answer() -> None:
    s, device = scheduler(), PaperDevice(4)
    turn = request(list(range(10)), 11)
    num_computed(s, device, turn)
    answered = [*turn.prompt_ids, *turn.output_ids]
    assert num_computed(s, device, request([*answered, 1, 2, 3])) == 24 - 20 + 3  # all of the 20 computed tokens


def test_a_prompts_log_probabilities_are_computed_all() -> None:
    s, device = scheduler(), PaperDevice(4)
    prompt = list(range(16))
    run(s, device, [request(prompt)])
    scored = request(prompt, prompt_log_probs=True)
    assert num_computed(s, device, scored) == 16 + 3
    assert len(scored.prompt_log_probs) == 15


def test_a_preempted_request_finds_what_is_left_of_its_blocks() -> None:
    s, device = scheduler(num_blocks=9), PaperDevice(4)
    first, second = request([1] * 12, 10), request([2] * 12, 10)
    assert run(s, device, [first, second]) == 1
    assert device.num_computed < 2 * 21 + 12  # not all of the second one's tokens twice
    assert (len(first.output_ids), len(second.output_ids)) == (10, 10)


@pytest.mark.parametrize("num_blocks", [45, 200])
@pytest.mark.parametrize("ahead", [0, 1])
def test_results_are_the_same_with_and_without(num_blocks: int, ahead: int) -> None:
    """Prompts that begin alike, with few blocks: what is kept comes and goes, and requests are preempted."""
    rng = random.Random(num_blocks)
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(30)] for _ in range(3)]
    found = []
    for has_prefix_cache in (True, False):
        rng.seed(1)
        requests = []
        for index in range(100):
            sampling = rng.choice([{}, {"n": 3, "top_k": 2}, {"beam_width": 3}, {"prompt_log_probs": True}])
            prompt_ids = rng.choice(texts)[: rng.randint(1, 30)] + [rng.randrange(VOCAB_SIZE)] * rng.randint(0, 3)
            requests.append(request(prompt_ids, rng.randint(1, 30), random_seed=index, **sampling))
        s, device = scheduler(num_blocks, has_prefix_cache), PaperDevice(4)
        run(s, device, requests, ahead)
        assert s.blocks.num_free == num_blocks
        results = [(r.prompt_log_probs, [(o.token_ids, o.log_probs) for o in r.outputs]) for r in requests]
        found.append((results, device.num_computed))
    assert found[0][0] == found[1][0]
    assert found[0][1] < 0.9 * found[1][1]


def test_a_models_tokens_are_the_same_with_and_without(converted: Callable[[int], Path]) -> None:
    rng = random.Random(0)
    text = [rng.randrange(302) for _ in range(50)]
    prompts = [text[: rng.randint(10, 50)] + [rng.randrange(302)] for _ in range(12)]
    found = []
    for flag in ({}, {"no_prefix_cache": True}):
        engine = make_engine(converted(1), max_batch_size=4, max_step_tokens=24, block_size=4, **flag)
        requests = [
            Request(ids, SamplingParams(8, random_seed=7, **sampling), ())
            for ids in prompts
            for sampling in ({}, {"top_p": 0.9, "repetition_penalty": 1.2})
        ]
        found.append(finish(engine, requests))
        is_kept = any(engine.scheduler.blocks.find(block_keys(ids, 4)) for ids in prompts)
        assert is_kept == (not flag)
    assert found[0] == found[1]
