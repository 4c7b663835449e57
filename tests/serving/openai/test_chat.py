"""/v1/chat/completions: the template, the form of its answers, /tokenize beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.openai_api import Api, openai_api

MESSAGES = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": "Who came?"}]
RENDERED = "system: Tell a story.\nuser: Who came?\nassistant:"
BODY = {"messages": MESSAGES, "temperature": 0, "max_completion_tokens": 8}


def test_answer_is_that_of_the_rendered_prompt(api: Api, tokenizer: Any, greedy: Any, log_probs: Any) -> None:
    ids = tokenizer.encode(RENDERED)
    new = greedy(ids, 8)
    answer = api.chat(**BODY, logprobs=True, top_logprobs=2).json
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(new), "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(ids)
    entries = choice["logprobs"]["content"]
    expected = log_probs([*ids, *new])
    for k, entry in enumerate(entries):
        row = expected[len(ids) - 1 + k]
        assert bytes(entry["bytes"]).decode() == entry["token"] == tokenizer.decode([new[k]])
        assert entry["logprob"] == pytest.approx(float(row[new[k]]), abs=2e-4)
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(row.topk(2).values.tolist(), abs=2e-4)


def test_stream_has_its_role_with_the_first_text(api: Api) -> None:
    whole = api.chat(**BODY).json["choices"][0]["message"]["content"]
    events = api.chat(**BODY, stream=True).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert deltas[0]["role"] == "assistant" and deltas[0]["content"]
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == whole
    assert all("usage" not in event for event in events)


def test_without_a_limit_the_answer_may_be_as_long_as_there_is_room(api: Api, tokenizer: Any) -> None:
    usage = api.chat(messages=MESSAGES, temperature=0, ignore_eos=True).json["usage"]
    assert usage["total_tokens"] == 512


@pytest.mark.parametrize(("most", "num_kept"), [(None, None), (-1, None), (5, 5), (500, None)])
def test_the_room_is_what_the_kept_prompt_leaves(
    api: Api, tokenizer: Any, most: int | None, num_kept: int | None
) -> None:
    body = {"messages": MESSAGES, "truncate_prompt_tokens": most, "stop": ["e"]}
    usage = api.chat(**body).json["usage"]
    assert usage["prompt_tokens"] == (num_kept or len(tokenizer.encode(RENDERED)))


def test_what_asks_for_text_alone_is_taken(api: Api) -> None:
    plain = api.chat(**BODY).json["choices"]
    assert api.chat(**BODY, modalities=["text"], response_format={"type": "text"}, tools=[]).json["choices"] == plain


def test_content_in_parts_and_template_options(api: Api, tokenizer: Any) -> None:
    def rendered(**fields: Any) -> str:
        return tokenizer.decode(api.post("/tokenize", **fields).json["tokens"])

    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "came?"}]
    assert rendered(messages=[{"role": "user", "content": parts}]) == "user: Who\ncame?\nassistant:"
    assert rendered(messages=MESSAGES, add_generation_prompt=False) == RENDERED.removesuffix("assistant:")
    continued = [*MESSAGES, {"role": "assistant", "content": "A fox"}]
    assert rendered(messages=continued, continue_final_message=True) == RENDERED + " A fox"


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({}, "messages", "at least one"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools", "not supported"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs must be true"),
        ({"messages": MESSAGES, "max_tokens": 600}, "max_tokens", "max_tokens is 600"),
        ({"messages": MESSAGES, "max_completion_tokens": 600}, "max_completion_tokens", "max_completion_tokens is 600"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"messages": MESSAGES, "stop": ["a", "x" * 257]}, "stop", "stop has a word of 257 bytes"),
        ({"messages": MESSAGES * 300}, "messages", "has 600 messages; at most 512"),
        (
            {"messages": [{"role": "user", "content": "a" * 32769}]},
            "messages",
            "32769 bytes of content; at most 32768",
        ),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages", "messages has 2"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    ],
)
def test_wrong_fields_are_named(api: Api, fields: dict[str, Any], param: str | None, part: str) -> None:
    status, found, message = api.chat(**fields).error
    assert status == 400 and part in message, message
    assert param is None or found == param, (found, message)


def test_tokens_there_and_back(api: Api, tokenizer: Any) -> None:
    text = "The king said: “no”.<|endoftext|>"
    found = api.post("/tokenize", model="stories", prompt=text, return_token_strs=True).json
    ids = tokenizer.encode(text)
    assert found == {
        "count": len(ids),
        "max_model_len": 512,
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }
    assert api.post("/detokenize", tokens=ids).json == {"prompt": text}
    assert api.post("/detokenize", tokens=[4096]).error[:2] == (400, "tokens")
    assert api.post("/tokenize").error[:2] == (400, "prompt")
    assert api.post("/detokenize").error[:2] == (400, "tokens")
    info = api.get("/tokenizer_info").json
    assert info["eos_token"] == "<|endoftext|>" and "/" not in str(info["tokenizer_class"])


def test_template_errors_and_no_template(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no place for ' + messages[0].content) }}")
    refused: list[Exception] = []
    with openai_api(tmp_path / "weights", flags={"chat_template": str(template)}, refused=refused) as api:
        assert "no place for Tell a story." in api.chat(messages=MESSAGES).error[2]
        assert [getattr(error, "for_log", "") for error in refused] == ["messages do not fit the chat template"]
        assert api.chat(messages=MESSAGES, chat_template_kwargs={"messages": []}).error[1] == "chat_template_kwargs"
    template.write_text("{% if %}")
    with openai_api(tmp_path / "weights", flags={"chat_template": str(template)}) as api:
        assert api.chat(messages=MESSAGES).error[0] == 500
    with openai_api(tmp_path / "weights") as api:
        status, _, message = api.chat(messages=MESSAGES).error
        assert status == 400 and "--chat-template" in message
