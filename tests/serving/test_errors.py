"""Every error as a Triton client gets it: its class gives the status, its sentence names tensors."""

from __future__ import annotations

import dataclasses

import pytest

from engine.request import EngineBusy, ParameterError, SamplingParams
from serving.request import GenerationRequest
from serving.triton.errors import BadRequest, InternalError, ServerBusy, one_sentence
from serving.triton.inputs import INPUTS, NAMES


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (ParameterError("max_new_tokens", "is 0"), BadRequest, "request_output_len is 0"),
        (ParameterError("n", "is 2 (set {} or {})", "top_k", "n"), BadRequest, "n is 2 (set runtime_top_k or n)"),
        (ParameterError("prompt_ids", "is empty", index=2), BadRequest, "input_ids[2] is empty"),
        (ParameterError("top_p_reset_id", "is\n9"), BadRequest, "top_p_reset_ids is 9"),
        (ParameterError("end_ids", "is 9"), BadRequest, "end_id is 9"),
        (ParameterError("with_log_probs", "is set"), BadRequest, "is_return_log_probs is set"),
        (ParameterError("next_token_logits", "is"), BadRequest, "is_return_next_token_logits is"),
        (ValueError("two\nlines"), BadRequest, "two lines"),
        (EngineBusy("3 wait"), ServerBusy, "3 wait"),
        (KeyError("slot"), InternalError, "internal error: 'slot'"),
    ],
)
def test_errors_name_tensors(error: Exception, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as raised, one_sentence():
        raise error
    assert type(raised.value) is kind
    assert str(raised.value) == sentence


def test_every_name_is_a_field_and_a_tensor() -> None:
    fields = {field.name for cls in (SamplingParams, GenerationRequest) for field in dataclasses.fields(cls)}
    assert set(NAMES) - fields == {"prompt_ids"}  # a prompt of tokens
    assert set(NAMES.values()) <= set(INPUTS)
