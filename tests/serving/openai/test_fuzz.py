"""Requests that are nearly right: each is answered, none with 500, and every refusal has OpenAI's form."""

from __future__ import annotations

import itertools
import json

from tests.support import fuzz
from tests.support.openai_api import Api


def test_nearly_right_requests(api: Api) -> None:
    right = {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    expected = api.complete(**right).json["choices"]
    statuses: set[int] = set()
    for case in itertools.islice(fuzz.cases(fuzz.openai_requests("stories"), fuzz.OPENAI_PATHS, 0), 200):
        answer = fuzz.send(api.port, case)
        if answer is None:
            assert not case.is_http, case.data[:500]
            continue
        status, body = answer
        assert status < 500, (case.data[:500], body)
        if status >= 400 and case.is_http and not case.data.startswith(b"HEAD"):
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (case.data[:500], body)
        statuses.add(status)
    assert {200, 400, 404, 405} <= statuses
    assert api.complete(**right).json["choices"] == expected


def test_counts_have_an_end(api: Api) -> None:
    """A huge integer is refused: no tensor of the engine could hold it."""
    for name in ("max_tokens", "min_tokens", "n", "best_of", "seed", "logprobs", "prompt_logprobs"):
        for value in (10**400, 1e308, 2**64):
            assert api.complete(**{"prompt": "a", "max_tokens": 1, name: value}).status == 400, name
    assert api.complete(prompt="a", max_tokens=1, top_k=2**64).status == 200  # as in vLLM, all tokens


def test_choices_without_text(api: Api) -> None:
    choices = api.complete(prompt="a", max_tokens=0, n=2, temperature=1).json["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, ""), (1, "")]
