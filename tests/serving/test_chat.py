"""Chat templates: the text of transformers' apply_chat_template, within limits of time and memory."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine.request import ParameterError
from gpt import GPTModel
from serving.chat import ChatTemplate, TemplateFailure
from serving.generation import Generator
from serving.tokenization import RequestEncoder
from serving.triton.errors import BadRequest
from tests.support.counting_engine import CountingEngine
from tests.support.ranks import ROOT

TALK = [
    {"role": "system", "content": "  Be kind.\n"},
    {"role": "user", "content": "Who came?"},
    {"role": "assistant", "content": "A “fox” <b> ", "name": None},
    {"role": "user", "content": "And then?"},
]
# Each has what templates of models on the Hub have: named blocks, filters, loop controls, functions.
TEMPLATES = {
    "llama 3": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    "chatml": """{% for message in messages %}
{{'<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "loops": """{% set ns = namespace(n=0) %}
{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}
[{{ ns.n }}] {{ message.content }}{{ eos_token }}
{% endfor %}""",
    "json": "{{ messages | tojson(indent=2) }}{% if tools is none and documents is none %}{{ tone }}{% endif %}",
    "answer": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ dict(a=1).items() | list }}{{ messages[2].name is defined }}",
}
SPINNING = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = "messages take the chat template more than "  # of memory or, on a busy machine, of time
DOUBLING = "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models/stories")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"variables": {"tone": "calm", "eos_token": "!"}}]
)
def test_text_is_that_of_transformers(tokenizer: Any, name: str, options: dict[str, Any]) -> None:
    given = {"add_generation_prompt": True} | options
    variables = given.pop("variables", {})
    expected = tokenizer.apply_chat_template(TALK, chat_template=TEMPLATES[name], tokenize=False, **given, **variables)
    assert ChatTemplate(tokenizer, TEMPLATES[name]).render(TALK, **options) == expected


@pytest.mark.parametrize("name", ["llama 3", "chatml"])
@pytest.mark.parametrize("content", ["A fox", "A fox "])
def test_a_last_message_that_goes_on(tokenizer: Any, name: str, content: str) -> None:
    talk = [*TALK, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = tokenizer.apply_chat_template(talk, chat_template=TEMPLATES[name], tokenize=False, **options)
    assert ChatTemplate(tokenizer, TEMPLATES[name]).render(talk, **options) == expected
    assert talk[-1]["content"] == content


def test_a_named_default_template(tokenizer: Any) -> None:
    class Named:
        chat_template = {"tool_use": "no", "default": "{{ messages[0].content }}"}
        special_tokens_map: dict[str, str] = {}

    assert ChatTemplate(Named()).render([{"role": "user", "content": "yes"}]) == "yes"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SPINNING, "messages take the chat template more than 2 s"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "messages do not fit the chat template"),
        ("{{ 'a' * 10**10 }}", TOO_MUCH),
        (DOUBLING, TOO_MUCH),
        ("{{ 'a'.ljust(10**10) }}", TOO_MUCH),
        ("{{ '%010000000000d' % 1 }}", TOO_MUCH),
        ("{{ messages[0].content * 2**23 }}", TOO_MUCH),
        ("{{ range(10**9) | list }}", "messages do not fit the chat template"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "messages do not fit the chat template (access to attribute",
        ),
        ("{{ messages.append(1) }}", "messages do not fit the chat template (access to attribute 'append'"),
        ("{% set n = namespace(__class__=1) %}", "messages do not fit the chat template (a namespace takes no name"),
        ("{% include '/etc/passwd' %}", "messages do not fit the chat template"),
        ("{% if %}", "messages cannot be taken: the chat template of this server is not valid (Expected"),
        ("{{" + "(" * 9999 + "1" + ")" * 9999 + "}}", "messages do not fit the chat template"),
        ("{{ 1 / 0 }}", "messages do not fit the chat template"),
        ("{{ raise_exception('one\ntwo ' + 'x' * 999) }}", "messages do not fit the chat template (one two xxx"),
    ],
)
def test_a_hostile_template_fails_in_one_sentence_and_the_next_chat_goes_on(template: str, expected: str) -> None:
    class Plain:
        chat_template = "{% if messages[0].content == 'bad' %}" + template + "{% else %}fine{% endif %}"
        special_tokens_map: dict[str, str] = {}

    is_broken = "not valid" in expected or template.startswith("{{(((")
    chat, began = ChatTemplate(Plain()), time.monotonic()
    with pytest.raises(TemplateFailure) as caught:
        chat.render([{"role": "user", "content": "bad"}])
    assert time.monotonic() - began < 15  # 2 s, on an idle machine
    assert str(caught.value).startswith(expected) and len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    if not is_broken:
        assert chat.render([{"role": "user", "content": "good"}]) == "fine"


def test_a_template_is_tried_when_the_server_starts(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    for template in (SPINNING, DOUBLING):
        with pytest.raises(ValueError) as caught:
            ChatTemplate(tokenizer, template).check("folder")
        found = re.sub("256 MiB", "2 s", str(caught.value))
        assert found == "folder: a chat of one word takes the chat template more than 2 s"
    ChatTemplate(tokenizer, "{{ raise_exception('no user') }}").check("folder")
    ChatTemplate(tokenizer).check("folder")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        ChatTemplate(tokenizer, "{% if %}").check("folder")
    assert "the chat template of this server is not valid" in caplog.text


def infer(tokenizer: Any, template: str | None, *messages: bytes, **more: np.ndarray) -> Any:
    """(the tokens of each prompt, the arrays of the answer)"""
    engine = CountingEngine()
    encoder = RequestEncoder(tokenizer, (9,), len(tokenizer), 64, chat_template=ChatTemplate(tokenizer, template))
    arrays = {
        "messages": np.array([[text] for text in messages], object),
        "request_output_len": np.full((len(messages), 1), 3, np.uint32),
        **more,
    }
    (answer,) = asyncio.run(GPTModel(Generator(engine, encoder)).infer([arrays]))
    return [request.prompt_ids for request in engine.seen], answer


def test_messages_of_triton_become_prompts_and_the_text_is_the_answer(tokenizer: Any) -> None:
    template = TEMPLATES["chatml"]
    talks = [TALK, TALK[1:2]]
    prompts, answer = infer(tokenizer, template, *(json.dumps(talk).encode() for talk in talks))
    for talk, prompt_ids in zip(talks, prompts, strict=True):
        text = tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert prompt_ids == tokenizer.encode(text, add_special_tokens=False)
    assert answer["sentences"].tolist() == [[[tokenizer.decode([0, 1, 2], skip_special_tokens=True).encode()]]] * 2
    shown = {"exclude_input_in_output": np.array([[False]])}
    _, answer = infer(tokenizer, template, json.dumps(TALK).encode(), **shown)
    assert b"Who came?" in answer["sentences"].item()


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            None,
            b'[{"role": "user", "content": "a"}]',
            "messages[0] is set; the model has no chat template: start the server with --chat-template FILE",
        ),
        ("x", b"[", "messages[0] is not valid JSON"),
        ("x", b"\xff", "messages[0] is not valid UTF-8: invalid start byte at byte 0"),
        ("x", b"[" * 3000, "messages[0] is not valid JSON"),
        ("x", b"[]", "messages[0] must be a JSON list of at least one message"),
        ("x", b'{"role": "user"}', "messages[0] must be a JSON list of at least one message"),
        ("x", b'[{"role": "user"}]', "messages[0] has message 0 without role and content; both must be strings"),
        ("x", b"[1]", "messages[0] has message 0 without role and content; both must be strings"),
        ("", b'[{"role": "user", "content": "a"}]', "messages[0] is set; the model has no chat template"),
        ("{# #}", b'[{"role": "user", "content": "a"}]', "messages[0] is empty; it must have at least one token"),
        ("{{ messages[0].content }}", b'[{"role": "a", "content": "\\udcff"}]', "messages[0] is not valid text"),
        ("{{ messages[0].content }}", b'[{"role": "a", "content": "' + b"a" * 9999 + b'"}]', "messages[0] has 10"),
        ("{{ 'a' * 9999 }}", b'[{"role": "a", "content": ""}]', "messages[0] has 9999 bytes; at most"),
        (
            "{{ raise_exception('no') }}",
            b'[{"role": "a", "content": ""}]',
            "messages[0] do not fit the chat template (no",
        ),
    ],
)
def test_errors_of_triton_name_the_messages(
    tokenizer: Any, template: str | None, messages: bytes, expected: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        infer(tokenizer, template, messages)
    assert str(caught.value).startswith(expected)


def test_messages_stand_in_place_of_prompts(tokenizer: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        infer(tokenizer, "x", b"[]", prompts=np.array([[b"a"]], object))
    assert str(caught.value) == "prompts and messages are both given; one of the two must be"
    with pytest.raises(ParameterError):
        ChatTemplate(tokenizer).render(TALK)
