"""Random requests with every mix of parameters, and runs of them through an engine, alone or in a crowd."""

from __future__ import annotations

import random
from typing import Any

from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.words import Vocabulary

VOCAB_SIZE = 303
END_ID = 302


def vocabulary(vocab_size: int = VOCAB_SIZE) -> Vocabulary:
    """Tokens of one to three letters of a small alphabet, so that words turn up and cross tokens; ids 300 on: none."""
    rng = random.Random(0)
    token_bytes = ["".join(rng.choices("abcd", k=rng.randint(1, 3))).encode() for _ in range(300)]
    return Vocabulary(token_bytes + [b""] * (vocab_size - 300))


def random_items(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests as JSON can hold them: prompt_ids, sampling, end_id, stop, bad."""
    rng = random.Random(seed)
    return [_random_item(rng) for _ in range(count)]


def looping_items(count: int) -> list[dict[str, Any]]:
    """Random requests; most of them are made to choose among a few tokens, so that they repeat themselves."""
    items = random_items(count, seed=5)
    for index, item in enumerate(items):
        item["sampling"]["max_new_tokens"] += 24
        if index % 4:
            item["sampling"]["logit_bias"] = [[7 * index % 300, 60.0], [11 * index % 300, 60.0], [index, 61.0]]
    return items


def telling_items(count: int, output_len: int, vocab_size: int = VOCAB_SIZE) -> list[dict[str, Any]]:
    """Greedy requests of `output_len` tokens with short prompts; most are to be told more than their tokens."""
    rng = random.Random(9)
    wishes = [{}, {"num_log_probs": 3}, {"prompt_log_probs": True}, {"next_token_logits": True, "num_log_probs": 1}]
    return [
        {
            "prompt_ids": [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))],
            "sampling": {"max_new_tokens": output_len, **wishes[index % 4]},
            "end_id": None,
        }
        for index in range(count)
    ]


def _random_item(rng: random.Random) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_new_tokens": rng.randint(1, 24)}
    kind = rng.choices(["greedy", "sampled", "samples", "beams"], [3, 4, 1, 2])[0]
    if kind in ("sampled", "samples"):
        sampling |= {"random_seed": rng.randrange(2**64), "temperature": rng.uniform(0.5, 1.5)}
        sampling |= rng.choice([{"top_k": rng.randint(2, 300)}, {"top_p": rng.random()}, {"top_k": 50, "top_p": 0.8}])
        if rng.random() < 0.3:
            sampling |= {"top_p_decay": 0.9, "top_p_min": 0.1, "top_p_reset_id": rng.randrange(300)}
    if kind == "samples":
        sampling |= {"n": rng.randint(2, 4), "top_k": 100}
    if kind == "beams":
        sampling |= {"beam_width": rng.randint(2, 6), "len_penalty": rng.choice([None, 0.0, 2.0, -0.5])}
        sampling |= {"early_stopping": rng.choice(["false", "true", "never"])}
        sampling |= {"beam_search_diversity_rate": rng.choice([0.0, 0.0, -0.5])}
    sampling |= rng.choice([{}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.7, "temperature": 0.8}])
    if rng.random() < 0.2:
        sampling["frequency_penalty"] = 0.4
    if rng.random() < 0.2:
        sampling["min_length"] = rng.randint(0, 10)
    if rng.random() < 0.2:
        sampling["num_log_probs"] = rng.randint(1, 5)
    if rng.random() < 0.1:
        sampling["prompt_log_probs"] = True
    if rng.random() < 0.1:
        sampling["next_token_logits"] = True
    return {
        "prompt_ids": [rng.randrange(VOCAB_SIZE - 1) for _ in range(rng.randint(1, 50))],
        "sampling": sampling,
        "end_id": rng.choice([END_ID, rng.randrange(VOCAB_SIZE), None]),
        "stop": _random_words(rng, 2, 6) if rng.random() < 0.2 else [],
        "bad": _random_words(rng, 2, 4) if rng.random() < 0.2 else [],
    }


def _random_words(rng: random.Random, shortest: int, longest: int) -> list[str]:
    return ["".join(rng.choices("abcd", k=rng.randint(shortest, longest))) for _ in range(rng.randint(1, 3))]


def make_request(item: dict[str, Any], words: Vocabulary) -> Request:
    """A Request of an item; absent parts are neutral."""
    end_id = item.get("end_id", END_ID)
    return Request(
        item["prompt_ids"],
        SamplingParams(**item["sampling"]),
        () if end_id is None else (end_id,),
        words=words.words(*([word.encode() for word in item.get(kind, [])] for kind in ("stop", "bad"))),
    )


def run_alone(engine: Engine, requests: list[Request]) -> None:
    """One after the other."""
    for request in requests:
        engine.submit(request)
        while engine.step():
            pass


def run_crowd(engine: Engine, requests: list[Request], seed: int = 0) -> None:
    """Submitted at random times, a few at once, while others run; the engine is not stopped."""
    rng = random.Random(seed)
    todo = list(requests)
    while todo or not all(request.is_finished for request in requests):
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            if todo:
                engine.submit(todo.pop(0))
        for _ in range(rng.randint(1, 4)):
            engine.step()


def results(request: Request) -> dict[str, Any]:
    """What a finished request has got, as JSON can hold it."""
    return {
        "outputs": [
            {
                "token_ids": output.token_ids,
                "log_probs": output.log_probs,
                "alternatives": [[list(pair) for pair in token] for token in output.alternatives],
                "finish_reason": output.finish_reason,
            }
            for output in request.outputs
        ],
        "prompt_log_probs": request.prompt_log_probs,
        "prompt_alternatives": [[list(pair) for pair in token] for token in request.prompt_alternatives],
        "next_token_logits": [] if request.next_token_logits is None else list(map(float, request.next_token_logits)),
    }
