"""Requests with the engine's fields, tokenized and checked: the sentences name the engine's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.request import ParameterError, SamplingParams
from serving.request import GenerationRequest
from tests.support.counting_engine import END, letter_encoder


def ask(prompt: Any = "ab", output_len: int = 4, *, sampling: dict[str, Any] | None = None, **options: Any) -> Any:
    return GenerationRequest(prompt, SamplingParams(output_len, **sampling or {}), **options)


@pytest.mark.parametrize("prompt", ["abc", b"abc", [0, 1, 2], (0, 1, 2), np.array([0, 1, 2], np.int32)])
def test_text_and_token_ids_are_prompts(prompt: Any) -> None:
    ((request, encoded),) = letter_encoder().encode([ask(prompt)])
    assert request.prompt is prompt
    assert encoded.prompt_ids == [0, 1, 2]
    assert all(type(token_id) is int for token_id in encoded.prompt_ids)  # they are sent to other ranks


def test_start_id_stands_for_an_empty_prompt_alone() -> None:
    encoder = letter_encoder()
    pairs = encoder.encode([ask("", start_id=4), ask([], start_id=4), ask("ab", start_id=4)])
    assert [encoded.prompt_ids for _, encoded in pairs] == [[4], [4], [0, 1]]


@pytest.mark.parametrize(
    ("options", "end_ids"),
    [({}, (END,)), ({"end_ids": (3, 4)}, (3, 4)), ({"end_ids": ()}, ()), ({"ignore_eos": True, "end_ids": (3,)}, ())],
)
def test_end_ids_default_to_the_models(options: dict[str, Any], end_ids: tuple[int, ...]) -> None:
    ((_, encoded),) = letter_encoder().encode([ask(**options)])
    assert encoded.end_ids == end_ids


def test_words_are_matched_and_spelled_as_tokens() -> None:
    ((_, encoded),) = letter_encoder().encode([ask(stop_words=["bc"], bad_words=["d", "ab"])])
    assert encoded.words is not None and encoded.words.stops([0, 1, 2]) and not encoded.words.stops([2, 1])
    assert encoded.words.always_banned == [3]
    assert encoded.bad_word_ids == [[3], [0, 1]]


MANY = {"num_log_probs": 9}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(prompt=""), "prompt[1] is empty; it must have at least one token"),
        (dict(prompt=[]), "prompt_ids[1] is empty; it must have at least one token"),
        (dict(prompt=[1, -2]), "prompt_ids[1] has token -2; the vocabulary has 10 tokens"),
        (dict(prompt="abk"), "prompt[1] has token 10; the vocabulary has 10 tokens"),
        (dict(prompt=[1] * 301), "prompt_ids[1] has 301 tokens; the longest sequence served is 300 tokens"),
        (dict(prompt=b"a\xff"), "prompt[1] is not valid UTF-8: invalid start byte at byte 1"),
        (dict(prompt="a\ud800"), "prompt[1] is not valid text: surrogates not allowed at 1"),
        (
            dict(prompt="a" * 19201),
            "prompt[1] has 19201 bytes; at most 19200 are taken for the 300 tokens of the longest sequence served",
        ),
        (
            dict(prompt="é" * 9601),
            "prompt[1] has 19202 bytes; at most 19200 are taken for the 300 tokens of the longest sequence served",
        ),
        (dict(prompt="", start_id=10), "start_id is 10; the vocabulary has 10 tokens"),
        (dict(end_ids=(3, 10)), "end_ids is 10; the vocabulary has 10 tokens"),
        (dict(end_ids=(10,), ignore_eos=True), "end_ids is 10; the vocabulary has 10 tokens"),
        (dict(sampling={"top_k": 11}), "top_k is 11; the vocabulary has 10 tokens"),
        (dict(sampling={"num_log_probs": 65}), "num_log_probs is 65; the vocabulary has 10 tokens"),
        (dict(sampling={"top_p_reset_id": 10}), "top_p_reset_id is 10; the vocabulary has 10 tokens"),
        (dict(stop_words=["a"] * 257), "stop_words[1] has 257 words; at most 256 are allowed"),
        (dict(bad_words=["a" * 256] * 17), "bad_words[1] has words of 4352 bytes; at most 4096 are allowed"),
        (dict(stop_words=["é" * 129]), "stop_words[1] has a word of 258 bytes; at most 256 are allowed"),
        (dict(bad_words=list("abcdefghij")), "bad_words leaves no token of the vocabulary to choose from"),
        (
            dict(bad_words=list("abcdefghi"), sampling={"min_length": 1}),
            "bad_words leaves no token of the vocabulary to choose from",
        ),
        (
            dict(output_len=30000, sampling=MANY),
            "num_log_probs asks for 270000 alternatives in one request; at most 262144 are kept",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError) as error:
        letter_encoder().encode([ask(), ask(**changes)])
    assert str(error.value) == sentence


def test_alternatives_have_a_limit_in_any_vocabulary() -> None:
    encoder = letter_encoder()
    encoder.vocab_size = 1000
    with pytest.raises(ParameterError, match="^num_log_probs is 65; it must be between 0 and 64$"):
        encoder.encode([ask(sampling={"num_log_probs": 65})])


def test_logits_of_all_prompts_together_have_a_limit() -> None:
    encoder = letter_encoder()
    encoder.vocab_size = 1 << 20
    one = ask(sampling={"next_token_logits": True})
    encoder._check_memory([one.sampling] * 16)
    with pytest.raises(ParameterError) as error:
        encoder.encode([one] * 17)
    expected = "next_token_logits asks for 17825792 logits in one request; at most 16777216 are kept"
    assert str(error.value) == expected


def test_memory_is_counted_before_anything_is_tokenized() -> None:
    encoder = letter_encoder()
    encoder.tokenizer = None
    with pytest.raises(ParameterError, match="^num_log_probs asks for"):
        encoder.encode([ask(output_len=30000, sampling=MANY)])


def test_an_iterator_parses_as_it_goes() -> None:
    def parse() -> Iterator[GenerationRequest]:
        yield ask("a")
        raise ParameterError("prompt", "cannot be parsed", index=1)

    with pytest.raises(ParameterError, match=r"^prompt\[1\] cannot be parsed$"):
        letter_encoder().encode(parse())


@pytest.mark.parametrize("deadline_s", [0.0, -3.0, float("nan")])
def test_a_deadline_is_above_0(deadline_s: float) -> None:
    with pytest.raises(ParameterError, match=f"^deadline_s is {deadline_s:g}; it must be above 0$"):
        ask(deadline_s=deadline_s)
