"""Requests with the engine's fields, tokenized and checked: the sentences name the engine's parameters."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from engine.request import ParameterError, SamplingParams
from serving.request import GenerationRequest
from serving.tokenization import RequestEncoder
from tests.support.counting_engine import END, LetterTokenizer, letter_encoder


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
    encoder = RequestEncoder(LetterTokenizer(), (END,), 10, 300, spells_bad_words=True)
    request = ask(stop_words=["bc"], bad_words=["d", "ab"])
    ((_, encoded),) = encoder.encode([request])
    assert encoded.words is not None and encoded.words.stops([0, 1, 2]) and not encoded.words.stops([2, 1])
    assert encoded.words.always_banned == [3]
    assert encoded.bad_word_ids == [[3], [0, 1]]
    ((_, encoded),) = letter_encoder().encode([request])
    assert encoded.bad_word_ids == []  # only FasterTransformer's op needs them


@pytest.mark.parametrize("prompt", ["abcde", b"abcde", [0, 1, 2, 3, 4], np.array([0, 1, 2, 3, 4])])
@pytest.mark.parametrize(("most", "kept"), [(1, [4]), (3, [2, 3, 4]), (5, [0, 1, 2, 3, 4]), (300, [0, 1, 2, 3, 4])])
def test_the_last_tokens_of_a_prompt_are_kept(prompt: Any, most: int, kept: list[int]) -> None:
    ((_, encoded),) = letter_encoder().encode([ask(prompt, truncate_prompt_tokens=most)])
    assert encoded.prompt_ids == kept


def test_a_long_prompt_is_cut_to_what_is_served() -> None:
    ids = list(range(9)) * 50
    ((_, encoded),) = letter_encoder().encode([ask(ids, truncate_prompt_tokens=300)])
    assert encoded.prompt_ids == ids[-300:]


@pytest.mark.parametrize("adds", [True, False])
def test_special_tokens_are_added_unless_they_are_not_wanted(adds: bool) -> None:
    class Beginning(LetterTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [8] * add_special_tokens + super().encode(text)

    encoder = RequestEncoder(Beginning(), (END,), 10, 300)
    ((_, encoded),) = encoder.encode([ask("ab", add_special_tokens=adds)])
    assert encoded.prompt_ids == ([8, 0, 1] if adds else [0, 1])


def test_words_of_all_prompts_are_counted_first_and_equal_ones_compiled_once() -> None:
    """1024 prompts with 256 words each once cost half a minute before they were refused."""
    encoder = letter_encoder()
    encoder.tokenizer = None
    for words in ([["abc"] * 256] * 1024, [[f"{row}-{i}" for i in range(256)] for row in range(1024)]):
        started = time.process_time()
        with pytest.raises(ParameterError) as error:
            encoder.encode([ask(bad_words=own) for own in words])
        assert str(error.value) == "stop_words and bad_words are 262144 words in all; at most 16384 are taken"
        assert time.process_time() - started < 0.5
    encoder = letter_encoder()
    pairs = encoder.encode([ask(stop_words=[f"{i}" for i in range(8)], bad_words=["abc"] * 8) for _ in range(1024)])
    assert len({id(encoded.words) for _, encoded in pairs}) == 1


def test_all_prompts_are_checked_before_any_is_tokenized() -> None:
    encoder = letter_encoder()
    encoder.tokenizer = None
    with pytest.raises(ParameterError, match=r"^bad_words\[1\] has a word of 257 bytes"):
        encoder.encode([ask(), ask(bad_words=["a" * 257])])


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
        (dict(sampling={"logit_bias": ((10, 1.0),)}), "logit_bias has token 10; the vocabulary has 10 tokens"),
        (
            dict(sampling={"prompt_log_probs": True, "num_prompt_log_probs": 11}),
            "num_prompt_log_probs is 11; the vocabulary has 10 tokens",
        ),
        (
            dict(truncate_prompt_tokens=0),
            "truncate_prompt_tokens is 0; it must be between 1 and the 300 tokens of the longest sequence served",
        ),
        (
            dict(truncate_prompt_tokens=301),
            "truncate_prompt_tokens is 301; it must be between 1 and the 300 tokens of the longest sequence served",
        ),
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


def test_alternatives_of_prompts_have_a_limit() -> None:
    sampling = {"prompt_log_probs": True, "num_prompt_log_probs": 10}
    requests = [ask([1] * 256, sampling=sampling)] * 102
    letter_encoder().encode(requests)
    with pytest.raises(ParameterError) as error:
        letter_encoder().encode([*requests, *requests[:1]])
    expected = "num_prompt_log_probs asks for 263680 alternatives in one request; at most 262144 are kept"
    assert str(error.value) == expected


@pytest.mark.parametrize("deadline_s", [0.0, -3.0, float("nan")])
def test_a_deadline_is_above_0(deadline_s: float) -> None:
    with pytest.raises(ParameterError, match=f"^deadline_s is {deadline_s:g}; it must be above 0$"):
        ask(deadline_s=deadline_s)
