"""Beam search through the engine against Hugging Face's generate, and its rules on made-up candidates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2LMHeadModel

from engine.engine import Engine
from engine.request import Request, SamplingParams
from tests.support.engines import finish, hf_beams, make_engine, prompts

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def engine(converted: Callable[[int], Path]) -> Engine:
    return make_engine(converted(1), max_batch_size=40, max_step_tokens=40, block_size=4)


def ours(request: Request) -> list[tuple[list[int], float]]:
    """The same of a finished request."""
    penalty = 1.0 if request.sampling.len_penalty is None else request.sampling.len_penalty
    return [(output.token_ids, output.cum_log_prob / len(output.token_ids) ** penalty) for output in request.outputs]


def frequent_token(model: GPT2LMHeadModel, prompt_ids: list[int]) -> int:
    """A token that the beams of a random model do produce, after a while: a good end token for a test."""
    beams = hf_beams(model, prompt_ids, SamplingParams(NEW_TOKENS, beam_width=4), end_id=302)
    return beams[0][0][NEW_TOKENS // 3]


SETTINGS = [
    SamplingParams(NEW_TOKENS, beam_width=2),
    SamplingParams(NEW_TOKENS, beam_width=4, len_penalty=0.0, early_stopping="true"),
    SamplingParams(NEW_TOKENS, beam_width=4, len_penalty=2.0, early_stopping="never"),
    SamplingParams(NEW_TOKENS, beam_width=3, len_penalty=-1.0, early_stopping="never"),
    SamplingParams(NEW_TOKENS, beam_width=7, len_penalty=0.6, min_length=6),
    SamplingParams(NEW_TOKENS, beam_width=16, len_penalty=1.0, early_stopping="true"),
    SamplingParams(1, beam_width=5),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"{s.beam_width}-{s.len_penalty}-{s.early_stopping}")
def test_beams_equal_hugging_face(
    sampling: SamplingParams, engine: Engine, gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    model = gpt2_source[1]
    inputs = prompts(4, longest=30)
    end_ids = [302, *(frequent_token(model, ids) for ids in inputs[1:])]
    requests = [Request(ids, sampling, (end_id,)) for ids, end_id in zip(inputs, end_ids, strict=True)]
    strangers = [Request(ids, SamplingParams(9 + i), (302,)) for i, ids in enumerate(inputs)]
    finish(engine, [*requests[:2], *strangers, *requests[2:]])
    for request in requests:
        expected = hf_beams(model, request.prompt_ids, sampling, request.end_ids[0])
        got = ours(request)
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], rtol=1e-4, atol=1e-4)
    blocks = engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks


def test_beams_with_nothing_left_end_with_what_they_have(engine: Engine) -> None:
    """Where every token is banned there is no candidate: once an error of the server."""

    class Words:
        always_banned, has_bad, has_stop = list(range(303)), True, False

        def banned(self, prompt_ids: list[int], output_ids: list[int]) -> list[int]:
            return []

    request = Request([1, 2], SamplingParams(5, beam_width=3), (302,), words=Words())
    finish(engine, [request])
    assert request.is_finished
    assert [output.token_ids for output in request.outputs] == [[]]


@pytest.mark.parametrize("len_penalty", [10.0, -10.0])
def test_the_extremes_of_len_penalty_can_be_computed(engine: Engine, len_penalty: float) -> None:
    request = Request(prompts(1)[0], SamplingParams(200, beam_width=3, len_penalty=len_penalty))
    finish(engine, [request])
    assert [len(output.token_ids) for output in request.outputs] == [200] * 3
