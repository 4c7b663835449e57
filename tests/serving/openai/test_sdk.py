"""OpenAI's own Python SDK against the API."""

from __future__ import annotations

import openai
import pytest

from engine.request import EngineBusy, Request
from tests.support.counting_engine import CountingEngine
from tests.support.openai_api import Api, letters

PROMPT = "Once upon a time there was a king who"
MESSAGES = [{"role": "user", "content": "Who came?"}]


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="any")


def test_completions(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").id == "stories"
    whole = client.completions.create(
        model="stories", prompt=PROMPT, max_tokens=12, seed=4, logprobs=2, n=2, user="me", stop=["zzz"]
    )
    assert whole.usage is not None and whole.usage.completion_tokens == 24
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    pieces = list(
        client.completions.create(
            model="stories",
            prompt=PROMPT,
            max_tokens=12,
            seed=4,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = ["", ""]
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="stories", messages=MESSAGES, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=1
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 8
    assert all(entry.top_logprobs[0].token == entry.token for entry in logprobs.content)
    with client.chat.completions.create(
        model="stories", messages=MESSAGES, max_completion_tokens=8, temperature=0, stream=True
    ) as stream:
        text = "".join(piece.choices[0].delta.content or "" for piece in stream)
    assert text == whole.choices[0].message.content


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="stories", prompt=PROMPT, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with letters(api_key="right") as api, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="wrong").models.list()


def test_a_busy_server_is_asked_again() -> None:
    class Busy(CountingEngine):
        num_asked = 0

        def submit(self, *requests: Request) -> None:
            self.num_asked += 1
            if self.num_asked <= 2:
                raise EngineBusy("1024 requests wait already")
            super().submit(*requests)

    engine = Busy()
    with letters(engine) as api:
        client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="any")
        assert client.completions.create(model="letters", prompt="ab", max_tokens=3).choices[0].text == "abc"
        assert engine.num_asked == 3
        engine.num_asked = -10
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=0).completions.create(model="letters", prompt="ab", max_tokens=3)
