"""Parameters alone: what is refused, and how a front end puts its own names into the sentences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.request import ParameterError, SamplingParams

NAMES = {"max_new_tokens": "request_output_len", "top_k": "runtime_top_k", "top_p": "runtime_top_p"}


@pytest.mark.parametrize(
    ("changes", "own", "renamed"),
    [
        (
            dict(max_new_tokens=0),
            "max_new_tokens is 0; it must be at least 1",
            "request_output_len is 0; it",
        ),
        (dict(top_k=-1), "top_k is -1; it must be between 0 and 2^32 - 1", "runtime_top_k is -1; it must be"),
        (dict(top_p=1.5), "top_p is 1.5; it must be between 0 and 1", "runtime_top_p is 1.5; it must be between 0"),
        (
            dict(min_length=2**32),
            f"min_length is {2**32}; it must be between 0 and 2^32 - 1",
            f"min_length is {2**32}; it",
        ),
        (
            dict(num_log_probs=-1),
            "num_log_probs is -1; it must be between 0 and 2^32 - 1",
            "num_log_probs is -1; it must be",
        ),
        (
            dict(n=2),
            "n is 2; with greedy choice it must be 1 (set top_k or top_p)",
            "n is 2; with greedy choice it must be 1 (set runtime_top_k or runtime_top_p)",
        ),
        (
            dict(early_stopping="{top_k}"),
            "early_stopping is {top_k}; it must be false, true or never",
            "early_stopping is {top_k}; it must be false, true or never",
        ),
        (
            dict(repetition_penalty=1.5, presence_penalty=0.5),
            "repetition_penalty is 1.5 and presence_penalty 0.5; at most one of the two can be set",
            "repetition_penalty is 1.5 and presence_penalty 0.5; at most one of the two can be set",
        ),
        (dict(min_p=1.5), "min_p is 1.5; it must be between 0 and 1", "min_p is 1.5; it must be"),
        (
            dict(logit_bias=((0, 0.5),) * 1025),
            "logit_bias has 1025 tokens; at most 1024 are allowed",
            "logit_bias has 1025 tokens",
        ),
        (dict(logit_bias=((-1, 1.0),)), "logit_bias has token -1; it must be 0 or more", "logit_bias has token -1"),
        (
            dict(logit_bias=((3, float("nan")),)),
            "logit_bias has nan for token 3; it must be between -1000 and 1000",
            "logit_bias has nan for token 3",
        ),
        (
            dict(num_prompt_log_probs=2),
            "num_prompt_log_probs is 2; it needs prompt_log_probs",
            "num_prompt_log_probs is 2; it needs prompt_log_probs",
        ),
        (dict(n=2, beam_width=3), "n is 2 and beam_width 3; one of the two must be 1", "n is 2 and beam_width 3; one"),
    ],
)
def test_a_front_end_names_its_own_fields(changes: dict[str, Any], own: str, renamed: str) -> None:
    with pytest.raises(ParameterError) as error:
        SamplingParams(**{"max_new_tokens": 1, **changes})
    assert isinstance(error.value, ValueError)
    assert str(error.value) == error.value.sentence({}) == own
    assert error.value.sentence(NAMES).startswith(renamed)
    assert error.value.field in {field.name for field in dataclasses.fields(SamplingParams)}


def test_openais_penalties_go_with_a_repetition_penalty() -> None:
    sampling = SamplingParams(1, repetition_penalty=1.5, presence_penalty=0.5, openai_penalties=True)
    assert sampling.has_penalty


def test_the_prompts_place_follows_the_name() -> None:
    error = ParameterError("prompt", "is empty", index=3)
    assert (str(error), error.sentence({"prompt": "prompts"})) == ("prompt[3] is empty", "prompts[3] is empty")
