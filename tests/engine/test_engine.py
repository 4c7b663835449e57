"""The whole engine against Hugging Face generate: in this process, and over tp × pp ranks under mpirun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from engine.engine import Engine
from engine.request import EngineBusy, Request, SamplingParams
from tests.support.engines import NEW_TOKENS, SEEDED, finish, hf_greedy, make_engine, prompts, request
from tests.support.ranks import first_outputs, greedy_items, run_engine

GRIDS = [(2, 1), (1, 2), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def engine(converted: Callable[[int], Path]) -> Engine:
    return make_engine(converted(1), max_batch_size=9, max_step_tokens=24, block_size=4)


def test_greedy_equals_hugging_face(engine: Engine, gpt2_source: tuple[Path, GPT2LMHeadModel]) -> None:
    inputs = prompts(12)
    ours = finish(engine, [request(ids, SamplingParams(NEW_TOKENS)) for ids in inputs])
    assert ours == [hf_greedy(gpt2_source[1], ids) for ids in inputs]
    assert len({tuple(tokens) for tokens in ours}) == len(ours)  # else the model is too dull to tell
    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks


def test_end_id_ends_the_text_and_is_its_last_token(engine: Engine, gpt2_source: tuple[Path, GPT2LMHeadModel]) -> None:
    prompt_ids = prompts(1)[0]
    expected = hf_greedy(gpt2_source[1], prompt_ids)
    end_id = expected[10]
    r = Request(prompt_ids, SamplingParams(NEW_TOKENS), (end_id,))
    finish(engine, [r])
    assert r.output_ids == expected[: expected.index(end_id) + 1]
    assert r.finish_reason == "end_id"


def test_the_last_position_of_the_model_can_be_reached(
    engine: Engine, gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    prompt_ids = prompts(1, longest=200)[0]
    room = 256 - len(prompt_ids)
    assert finish(engine, [request(prompt_ids, SamplingParams(room))]) == [hf_greedy(gpt2_source[1], prompt_ids, room)]
    with pytest.raises(ValueError, match=f"max_new_tokens is {room + 1}; .* that is 257, .* is 256 tokens"):
        engine.submit(request(prompt_ids, SamplingParams(room + 1)))


def test_requests_are_submitted_all_or_none(engine: Engine) -> None:
    fits, too_long = request([1], SamplingParams(4)), request([1], SamplingParams(400))
    with pytest.raises(ValueError, match="max_new_tokens is 400"):
        engine.submit(fits, too_long)
    assert not engine.step()
    assert fits.output_ids == []


def strangers() -> list[Request]:
    kinds = [SamplingParams(n, top_k=n, random_seed=n) for n in (3, 40, 17, 25)] + [SamplingParams(30)] * 4
    return [request(ids, sampling) for ids, sampling in zip(prompts(8, longest=30), kinds, strict=True)]


@pytest.mark.parametrize("sampling", SEEDED, ids=["top_k", "top_p", "full"])
def test_same_seed_same_text_alone_or_among_eight_strangers(engine: Engine, sampling: SamplingParams) -> None:
    prompt_ids = prompts(3)[2]
    alone = finish(engine, [request(prompt_ids, sampling)])[0]
    crowd = strangers()
    again = request(prompt_ids, sampling)
    finish(engine, [*crowd[:4], again, *crowd[4:]])
    assert again.output_ids == alone
    other_seed = SamplingParams(**{**asdict(sampling), "random_seed": 99})
    assert finish(engine, [request(prompt_ids, other_seed)])[0] != alone


def test_scattered_blocks_give_the_same_tokens(converted: Callable[[int], Path]) -> None:
    """A cache too small for runs of blocks: requests of many lengths leave holes, which later ones must fill."""
    roomy = make_engine(converted(1), max_batch_size=6, block_size=4)
    inputs = [request(ids, SamplingParams(4 + 7 * (i % 5))) for i, ids in enumerate(prompts(20, longest=40))]
    expected = finish(roomy, inputs)
    tight = make_engine(converted(1), max_batch_size=6, block_size=4)
    blocks = tight.scheduler.blocks
    blocks.allocate(blocks.num_blocks)  # then give back every other block only
    blocks.free(list(range(0, 160, 2)))
    again = [request(r.prompt_ids, r.sampling) for r in inputs]
    assert finish(tight, again) == expected


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
def test_tokens_are_the_same_at_any_tp_and_pp(
    tp: int,
    pp: int,
    engine: Engine,
    converted: Callable[[int], Path],
    gpt2_source: tuple[Path, GPT2LMHeadModel],
) -> None:
    inputs = prompts(6)
    items = greedy_items(inputs, NEW_TOKENS)
    items += [{"prompt_ids": ids, "sampling": asdict(s)} for ids, s in zip(inputs, SEEDED, strict=False)]
    tokens = first_outputs(run_engine(converted(tp), items, tp, pp))
    assert tokens[:6] == [hf_greedy(gpt2_source[1], ids) for ids in inputs]
    assert tokens[6:] == [
        finish(engine, [request(ids, sampling)])[0] for ids, sampling in zip(inputs, SEEDED, strict=False)
    ]


def test_the_queue_has_a_bound_and_a_request_that_exceeds_it_is_refused(engine: Engine) -> None:
    engine.max_queue_size = 3
    try:
        with pytest.raises(ValueError, match="^the request has 4 prompts; at most 3 may wait$"):
            engine.submit(*(request([1], SamplingParams(2)) for _ in range(4)))
        waiting = [request([1], SamplingParams(2)) for _ in range(3)]
        engine.submit(*waiting)
        with pytest.raises(EngineBusy, match="^3 requests wait already, and at most 3 may$"):
            engine.submit(request([1], SamplingParams(2)))
        while engine.step():
            pass
        assert all(r.is_finished for r in waiting)
    finally:
        engine.max_queue_size = 2048


def test_cancellations_take_no_room_in_the_queue(engine: Engine) -> None:
    """A stop message in the inbox once counted as a waiting request, and the next one was refused."""
    engine.max_queue_size = 2
    try:
        first = request([1], SamplingParams(2))
        engine.submit(first)
        engine.cancel(first)
        engine.cancel(first)
        engine.submit(request([1], SamplingParams(2)))
        with pytest.raises(EngineBusy, match="^2 requests wait already, and at most 2 may$"):
            engine.submit(request([1], SamplingParams(2)))
        while engine.step():
            pass
        engine.submit(request([1], SamplingParams(2)), request([2], SamplingParams(2)))
        while engine.step():
            pass
    finally:
        engine.max_queue_size = 2048
