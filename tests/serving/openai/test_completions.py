"""/v1/completions beside Hugging Face's model: texts, log-probabilities, usage, streams, parameters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.openai_api import Api

PROMPT = "Once upon a time there was a king who"
CLOSE = 2e-4  # log-probabilities of two implementations in fp32


def test_greedy_text_usage_and_form(api: Api, tokenizer: Any, greedy: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    answer = api.complete(model="stories", prompt=PROMPT, max_tokens=12, temperature=0, unheard_of=1).json
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == "stories"
    (choice,) = answer["choices"]
    text = tokenizer.decode(greedy(ids, 12))
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12}


def test_default_is_16_tokens_at_temperature_1(api: Api) -> None:
    answers = [api.complete(prompt=PROMPT).json for _ in range(4)]
    assert {a["usage"]["completion_tokens"] for a in answers} == {16}
    assert len({a["choices"][0]["text"] for a in answers}) > 1  # each draws a seed of its own


@pytest.mark.parametrize("seed", [7, -7, 2**64 - 1])
def test_a_seed_gives_the_same_text(api: Api, seed: int) -> None:
    texts = {api.complete(prompt=PROMPT, seed=seed).json["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1


def test_prompts_as_list_ids_and_lists_of_ids(api: Api, tokenizer: Any, greedy: Any) -> None:
    prompts = [PROMPT, "The children"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    texts = [tokenizer.decode(greedy(own, 5)) for own in ids]
    for given, expected in ((prompts, texts), (ids, texts), (ids[1], texts[1:]), (prompts[:1], texts[:1])):
        choices = api.complete(prompt=given, max_tokens=5, temperature=0).json["choices"]
        assert [(c["index"], c["text"]) for c in choices] == list(enumerate(expected))


def test_log_probs_are_hugging_faces(api: Api, tokenizer: Any, log_probs: Any, greedy: Any) -> None:
    """As lm-evaluation-harness asks for them: prompt and one token, each with the likeliest in its place."""
    ids = tokenizer.encode(PROMPT)
    body = dict(prompt=[ids], max_tokens=1, temperature=0, seed=1234, logprobs=1, echo=True)
    (choice,) = api.complete(**body).json["choices"]
    found = choice["logprobs"]
    every = [*ids, *greedy(ids, 1)]
    expected = log_probs(every)
    assert choice["text"] == tokenizer.decode(every)
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    chosen = [float(expected[k - 1, every[k]]) for k in range(1, len(every))]
    assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=CLOSE)
    likeliest = [float(expected[k - 1].max()) for k in range(1, len(every))]
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(likeliest, abs=CLOSE)
    assert found["text_offset"] == [len(tokenizer.decode(every[:k])) for k in range(len(every))]


def test_max_tokens_0_gives_the_prompt_alone(api: Api, tokenizer: Any, log_probs: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    answer = api.complete(prompt=PROMPT, max_tokens=0, logprobs=0, echo=True).json
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    expected = log_probs(ids)
    chosen = [float(expected[k - 1, ids[k]]) for k in range(1, len(ids))]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(chosen, abs=CLOSE)
    assert api.complete(prompt=PROMPT, max_tokens=0).json["choices"][0]["text"] == ""
    events = api.complete(prompt=PROMPT, max_tokens=0, echo=True, stream=True).events
    assert [e["choices"][0]["text"] for e in events] == [PROMPT]


def test_prompt_logprobs_have_alternatives(api: Api, tokenizer: Any, log_probs: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    (choice,) = api.complete(prompt=PROMPT, max_tokens=1, temperature=0, prompt_logprobs=3).json["choices"]
    entries = choice["prompt_logprobs"]
    assert len(entries) == len(ids) and entries[0] is None
    for k, entry in enumerate(entries[1:], 1):
        values, places = log_probs(ids[:k])[-1].topk(3)
        expected = dict(zip(map(str, places.tolist()), values.tolist(), strict=True))
        expected[str(ids[k])] = float(log_probs(ids[:k])[-1, ids[k]])
        assert {i: e["logprob"] for i, e in entry.items()} == pytest.approx(expected, abs=CLOSE)
        assert entry[str(int(places[0]))]["rank"] == 1


def test_choices_of_one_prompt(api: Api) -> None:
    sampled = api.complete(prompt=[PROMPT, "The children"], n=3, max_tokens=8, seed=3).json
    assert [c["index"] for c in sampled["choices"]] == list(range(6))
    assert len({c["text"] for c in sampled["choices"][:3]}) > 1
    greedy = api.complete(prompt=PROMPT, n=3, max_tokens=8, temperature=0).json
    assert len({c["text"] for c in greedy["choices"]}) == 1 and len(greedy["choices"]) == 3
    assert greedy["usage"]["completion_tokens"] == 24
    assert sampled["usage"]["completion_tokens"] == 48


def test_best_of_gives_the_likeliest(api: Api) -> None:
    fields = dict(prompt=PROMPT, max_tokens=8, seed=3, logprobs=0, temperature=1)
    every = api.complete(**fields, n=5).json["choices"]
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 8 for c in every}
    best = api.complete(**fields, n=2, best_of=5).json["choices"]
    assert [c["text"] for c in best] == sorted(means, key=means.__getitem__, reverse=True)[:2]


@pytest.mark.parametrize("fields", [{}, {"n": 2, "seed": 5}, {"prompt": [PROMPT, "The"], "echo": True}])
def test_stream_is_the_whole_in_pieces(api: Api, fields: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "seed": 1, "logprobs": 2, **fields}
    whole = api.complete(**body).json
    events = api.complete(**body, stream=True, stream_options={"include_usage": True}).events
    *pieces, usage = events
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(piece["usage"] is None and len(piece["choices"]) == 1 for piece in pieces)
    assert {piece["id"] for piece in events} == {events[0]["id"]}
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(p["text"] for p in own) == choice["text"]
        assert [p["finish_reason"] for p in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for p in own for value in p["logprobs"][name]]
            if name == "token_logprobs":
                assert joined[1:] == pytest.approx(choice["logprobs"][name][1:], abs=CLOSE)
            elif name != "top_logprobs":
                assert joined == choice["logprobs"][name], name


def test_stop_and_its_text(api: Api) -> None:
    body = dict(prompt=PROMPT, max_tokens=40, temperature=0)
    text = api.complete(**body).json["choices"][0]["text"]
    word = text[20:24]
    before = text[: text.index(word)]
    for given, expected in (({"stop": word}, before), ({"stop": [word, "qq"]}, before)):
        (choice,) = api.complete(**body, **given).json["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    (choice,) = api.complete(**body, stop=word, include_stop_str_in_output=True).json["choices"]
    assert choice["text"] == before + word


def test_stop_token_ids_and_ignore_eos(api: Api, tokenizer: Any, greedy: Any) -> None:
    ids = greedy(tokenizer.encode(PROMPT), 10)
    body = dict(prompt=PROMPT, max_tokens=10, temperature=0)
    answer = api.complete(**body, stop_token_ids=[ids[6]]).json
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == ids.index(ids[6]) + 1
    eos = tokenizer.eos_token_id
    biased = dict(body, logit_bias={str(eos): 100})
    assert api.complete(**biased).json["usage"]["completion_tokens"] == 1
    assert api.complete(**biased, ignore_eos=True).json["usage"]["completion_tokens"] == 10
    assert api.complete(**biased, min_tokens=4).json["usage"]["completion_tokens"] == 5


def test_logit_bias_bans_and_forces(api: Api, tokenizer: Any, greedy: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    first = greedy(ids, 1)[0]
    body = dict(prompt=PROMPT, max_tokens=1, temperature=0)
    assert api.complete(**body, logit_bias={first: -100}).json["choices"][0]["text"] != tokenizer.decode([first])
    assert api.complete(**body, logit_bias={"77": 100}).json["choices"][0]["text"] == tokenizer.decode([77])


def test_penalties_and_min_p(api: Api, tokenizer: Any, log_probs: Any) -> None:
    """Greedy choice with penalties over the output only, computed here step by step."""
    ids, found = tokenizer.encode(PROMPT), []
    for _ in range(16):
        scores = log_probs([*ids, *found])[-1].clone()
        for token_id in set(found):
            scores[token_id] -= 0.9 + 0.6 * found.count(token_id)
        found.append(int(scores.argmax()))
    body = dict(prompt=PROMPT, max_tokens=16)
    answer = api.complete(**body, temperature=0, presence_penalty=0.9, frequency_penalty=0.6).json
    assert answer["choices"][0]["text"] == tokenizer.decode(found)
    texts = {api.complete(**body, min_p=1.0).json["choices"][0]["text"] for _ in range(2)}
    assert texts == {api.complete(**body, temperature=0).json["choices"][0]["text"]}


def test_truncation_and_special_tokens(api: Api, tokenizer: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    body = dict(max_tokens=6, temperature=0)
    answer = api.complete(prompt=PROMPT, truncate_prompt_tokens=3, **body).json
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["choices"][0]["text"] == api.complete(prompt=ids[-3:], **body).json["choices"][0]["text"]
    answer = api.complete(prompt="The end.<|endoftext|>", echo=True, max_tokens=0).json
    assert answer["choices"][0]["text"] == "The end."
    answer = api.complete(prompt="The end.<|endoftext|>", echo=True, max_tokens=0, skip_special_tokens=False).json
    assert answer["choices"][0]["text"] == "The end.<|endoftext|>"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "The end.<|endoftext|>Once upon a time"},
        {"prompt": PROMPT, "stop": ["and a brother zzzz", "was"]},
        {"prompt": "caf\u00e9 \u20ac", "skip_special_tokens": False},
    ],
)
def test_offsets_are_those_of_the_text(api: Api, tokenizer: Any, fields: dict[str, Any]) -> None:
    """Whole and in pieces; a text that is held back for a stop word, or a special token, shifts none."""
    body = {"max_tokens": 12, "temperature": 0, "echo": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    body |= fields
    (choice,) = api.complete(**body).json["choices"]
    ids = [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
    skips = body.get("skip_special_tokens", True)
    texts = [tokenizer.decode(ids[:count], skip_special_tokens=skips) for count in range(len(ids))]
    assert choice["logprobs"]["text_offset"] == [len(text.rstrip("\ufffd")) for text in texts]
    pieces = [event["choices"][0]["logprobs"] for event in api.complete(**body, stream=True).events]
    assert [offset for piece in pieces for offset in piece["text_offset"]] == choice["logprobs"]["text_offset"]


def test_parts_of_characters_have_names_in_bytes(api: Api, tokenizer: Any) -> None:
    """Two tokens of one text must not collide; -inf must not reach JSON."""
    text = "é€"
    answer = api.complete(prompt=text, max_tokens=0, echo=True, logprobs=5).json
    names = answer["choices"][0]["logprobs"]["tokens"]
    raw = b"".join(
        bytes(int(h, 16) for h in name[8:].split("\\x")) if name.startswith("bytes:") else name.encode()
        for name in names
    )
    assert raw.decode() == text and any(name.startswith("bytes:\\x") for name in names)
    ids = tokenizer.encode(text)
    as_ids = api.complete(prompt=text, max_tokens=0, echo=True, logprobs=1, return_tokens_as_token_ids=True).json
    assert as_ids["choices"][0]["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({}, "prompt", "must be a string"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [5, "a"]}, "prompt", "item (1)"),
        ({"prompt": ["a", "b", 5]}, "prompt", "item (2)"),
        ({"prompt": [[5], [5, True]]}, "prompt", "item (1)"),
        ({"prompt": [True]}, "prompt", "item (0)"),
        ({"prompt": ["a", ""]}, "prompt", "prompt[1] is empty"),
        ({"prompt": [4096]}, "prompt", "4096"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "-1"),
        ({"prompt": "a", "max_tokens": 600}, None, "512"),
        ({"prompt": "a", "temperature": -1}, "temperature", "-1"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "a", "top_p": 2}, "top_p", "2"),
        ({"prompt": "a", "n": 0}, "n", "between 1 and 64"),
        ({"prompt": "a", "n": 65, "temperature": 0}, "n", "64"),
        ({"prompt": ["a"] * 17, "n": 64}, "n", "1024"),
        ({"prompt": "a", "best_of": 65}, "best_of", "64"),
        ({"prompt": "a", "max_tokens": 5, "min_tokens": 6}, "min_tokens", "at most max_tokens"),
        ({"prompt": "a", "stop_token_ids": [1] * 257}, "stop_token_ids", "256"),
        ({"prompt": "a", "stop_token_ids": [5, 4096]}, "stop_token_ids", "has 4096; it must be between 0 and 4095"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", "has -1; it must be between 0 and 4095"),
        ({"prompt": "a", "stop_token_ids": ["5"]}, "stop_token_ids", "an integer"),
        ({"prompt": [[1] * 400], "echo": True, "logprobs": 60, "n": 64}, "logprobs", "262144"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"prompt": "a", "seed": 2**64}, "seed", "out of range"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"prompt": "a", "logit_bias": {"4096": 1}}, "logit_bias", "4096"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "100"),
        ({"prompt": "a", "stop": [1]}, "stop", "string"),
        ({"prompt": "a", "stop": ["a"] * 300}, "stop", "stop has 300 words"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"prompt": "a", "stream": 1}, "stream", "true or false"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "logprobs": 100}, "logprobs", "64"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "0"),
    ],
)
def test_wrong_fields_are_named(api: Api, fields: dict[str, Any], param: str | None, part: str) -> None:
    status, found, message = api.complete(**fields).error
    assert status == 400 and part in message, message
    assert param is None or found == param, (found, message)
