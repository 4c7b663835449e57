"""PyTriton's callable, without Triton: arrays in, arrays out, one sentence for what is wrong."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.request import Request
from gpt import BadRequest, GPTModel, InternalError

END = 9


class LetterTokenizer:
    """One token per letter; j is the end token, and the model does not know k."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return ["abcdefghijk".index(letter) for letter in text]

    def decode(self, token_ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return "".join("abcdefghijk"[i] for i in token_ids)


def counting_engine(*requests: Request) -> None:
    """Answers from another thread with 0, 1, 2 …; a prompt that begins with b ends early."""

    def work() -> None:
        for request in requests:
            while not request.is_finished:
                count = len(request.output_ids)
                request.append(END if request.prompt_ids[0] == 1 and count == 1 else count)
                request.publish(request.output_ids[-1:])

    threading.Thread(target=work).start()


def infer(arrays: dict[str, Any], submit: Callable[[Request], None] = counting_engine) -> dict[str, np.ndarray]:
    model = GPTModel(submit, LetterTokenizer(), END, 10)
    return asyncio.run(model.infer([arrays]))[0]


def column(values: list[Any], dtype: Any) -> np.ndarray:
    return np.array(values, dtype=dtype)[:, None]


def good(**more: Any) -> dict[str, np.ndarray]:
    return {"prompts": column([b"ab", b"bcde"], object), "request_output_len": column([4, 6], np.uint32), **more}


def test_rows_keep_their_own_length_and_shapes_are_tritons() -> None:
    answer = infer(good())
    assert answer["sentences"].tolist() == [[[b"ababcd"]], [[b"bcdea"]]]  # end_id is no text …
    assert answer["sequence_length"].tolist() == [[6], [6]]  # … but a token
    assert answer["output_ids"].tolist() == [[[0, 1, 0, 1, 2, 3]], [[1, 2, 3, 4, 0, END]]]
    assert (answer["output_ids"].dtype, answer["sequence_length"].dtype) == (np.int32, np.int64)


def test_short_rows_are_padded_with_end_id() -> None:
    answer = infer(good(request_output_len=column([1, 2], np.uint32)))
    assert answer["output_ids"].tolist() == [[[0, 1, 0, END, END, END]], [[1, 2, 3, 4, 0, END]]]


def test_parameters_reach_their_own_request() -> None:
    seen: list[Request] = []

    def submit(*requests: Request) -> None:
        seen.extend(requests)
        counting_engine(*requests)

    infer(
        good(
            runtime_top_k=column([0, 3], np.uint32),
            runtime_top_p=column([0.5, 0], np.float32),
            temperature=column([2, 0.25], np.float32),
            random_seed=column([1, 2**64 - 1], np.uint64),
        ),
        submit,
    )
    chosen = [(r.sampling.top_k, r.sampling.top_p, r.sampling.temperature, r.sampling.random_seed) for r in seen]
    assert chosen == [(0, 0.5, 2.0, 1), (3, 0.0, 0.25, 2**64 - 1)]


def test_nothing_runs_where_one_row_is_wrong() -> None:
    def submit(*requests: Request) -> None:
        raise AssertionError("submitted")

    with pytest.raises(BadRequest, match=r"^request_output_len is 0; it must be at least 1$"):
        infer(good(request_output_len=column([4, 0], np.uint32)), submit)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": column([b"a", b""], object)}, "prompts[1] is empty; it must have at least one token"),
        (
            {"prompts": column([b"a", b"\xf0\x9f"], object)},
            "prompts[1] is not valid UTF-8: unexpected end of data at byte 0",
        ),
        ({"prompts": column([b"a", b"ak"], object)}, "prompts[1] has token 10; the vocabulary has 10 tokens"),
        (
            {"temperature": column([1.0], np.float32)},
            "temperature has 1 values; it must have one for each of the 2 prompts",
        ),
        ({"temperature": column([1.0, np.nan], np.float32)}, "temperature is nan; it must be 0 or more"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        infer(good(**changes))
    assert str(caught.value) == sentence


def test_what_pytriton_would_send_of_an_error_is_the_sentence() -> None:
    """PyTriton formats exceptions with traceback.format_exception and sends the text to the client."""
    for kind in (BadRequest, InternalError):
        try:
            raise kind("the sentence")
        except kind as error:
            text = "".join(traceback.format_exception(None, error, error.__traceback__))
        assert text == f"{kind.__name__}: the sentence\n"


def test_a_defect_is_one_sentence_too(caplog: pytest.LogCaptureFixture) -> None:
    def submit(*requests: Request) -> None:
        raise KeyError("slot")

    with pytest.raises(InternalError, match="^internal error: 'slot'$"):
        infer(good(), submit)
    assert "Traceback" in caplog.text  # the log has it all
