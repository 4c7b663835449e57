"""The whole engine against Hugging Face generate: in this process, and over tp × pp ranks under mpirun."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from engine.engine import Control, Engine, follow
from engine.request import EngineBusy, Request, SamplingParams
from tests.support.engines import NEW_TOKENS, SEEDED, finish, hf_greedy, make_engine, prompts, request
from tests.support.ranks import first_outputs, greedy_items, run_engine
from tests.support.traffic import make_request, results, run_alone, vocabulary

GRIDS = [(2, 1), (1, 2), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def engine(converted: Callable[[int], Path]) -> Engine:
    return make_engine(converted(1), max_batch_size=9, max_step_tokens=24, block_size=4)


class Channel:
    """A world of rank 0, then of another rank that hears the same."""

    def __init__(self) -> None:
        self.messages: deque[Any] = deque()
        self.limits: list[float | None] = []

    def post(self, message: Any) -> None:
        self.messages.append(message)

    send = post

    def barrier(self) -> None: ...

    def receive(self, timeout_s: float | None) -> Any:
        self.limits.append(timeout_s)
        return self.messages.popleft()


def test_another_rank_waits_without_a_limit_until_all_are_warm(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three stages, the last one's first part once took so long that the second one gave rank 0 up."""
    channel = Channel()
    monkeypatch.setattr(engine, "world", channel)
    engine.warm_up()
    num_first = len(channel.messages)
    finish(engine, [request([1], SamplingParams(2))])
    channel.send(Control.STOP)
    num_messages = len(channel.messages)
    follow(channel, SimpleNamespace(execute=lambda plan: None), engine.watchdog, 7.0)
    assert num_first == 3 and num_messages == 6
    assert channel.limits == [None] * 3 + [7.0] * 3


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


def test_requests_take_turns_with_those_of_other_submissions(engine: Engine) -> None:
    order: list[int] = []
    many, one = [request([i], SamplingParams(2)) for i in range(20)], request([20], SamplingParams(2))
    for r in [*many, one]:
        r.on_update = lambda r: order.append(r.prompt_ids[0]) if r.is_finished else None
    engine.submit(*many)
    engine.submit(one)
    while engine.step():
        pass
    assert order.index(20) < 9  # of the first that the engine runs, and not behind all others


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


def test_biases_penalties_min_p_and_alternatives_are_the_same_on_ranks(
    engine: Engine, converted: Callable[[int], Path]
) -> None:
    """Here one after the other, there in a crowd over two stages of two ranks."""
    kinds: list[dict[str, Any]] = [
        {"logit_bias": [[3, 4.0], [7, -100.0]], "prompt_log_probs": True, "num_prompt_log_probs": 3},
        {"top_p": 1.0, "min_p": 0.3, "temperature": 1.4},
        {"top_k": 30, "min_p": 0.05, "openai_penalties": True, "presence_penalty": 0.9, "repetition_penalty": 1.2},
    ]
    items = [
        {"prompt_ids": ids, "sampling": {"max_new_tokens": 12, "random_seed": place, **kinds[place % 3]}}
        for place, ids in enumerate(prompts(9))
    ]
    alone = [make_request(item, vocabulary()) for item in items]
    run_alone(engine, alone)
    for one, there in zip(alone, run_engine(converted(2), items, 2, 2), strict=True):
        here = results(one)
        assert there["outputs"][0]["token_ids"] == here["outputs"][0]["token_ids"]
        assert len(there["prompt_alternatives"]) == (len(one.prompt_ids) - 1 if one.sampling.prompt_log_probs else 0)
        np.testing.assert_allclose(there["prompt_alternatives"], here["prompt_alternatives"], atol=1e-4)


def test_the_queue_has_a_bound_and_a_request_that_exceeds_it_is_refused(engine: Engine) -> None:
    engine.max_queue_size = 3
    try:
        with pytest.raises(ValueError, match="^the request has 4 prompts; at most 3 may wait$"):
            engine.submit(*(request([1], SamplingParams(2)) for _ in range(4)))
        with pytest.raises(ValueError, match="^the request has 4 prompts; at most 3 may wait$"):
            engine.check_room(4)
        engine.check_room(3)
        waiting = [request([1], SamplingParams(2)) for _ in range(3)]
        engine.submit(*waiting)
        with pytest.raises(EngineBusy, match="^3 requests wait already, and at most 3 may$"):
            engine.submit(request([1], SamplingParams(2)))
        with pytest.raises(EngineBusy, match="^3 requests wait already, and at most 3 may$"):
            engine.check_room(1)
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
