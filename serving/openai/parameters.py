"""Fields of a completion, of text or chat → `SamplingParams` and options, with OpenAI's names and defaults."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.request import MAX_N, SEED_LIMIT, SamplingParams
from serving.openai.errors import bad_field
from serving.openai.fields import Fields
from serving.openai.model import ServedModel
from serving.request import GenerationRequest
from serving.tokenization import MAX_END_IDS

_LEAST_TEMPERATURE = 1e-3  # below it, choice is greedy: clients write 1e-4 and mean 0
_MIN_SEED = -(2**63)

# field of the API -> (type, field of SamplingParams): those that have the same meaning
_SAMPLING: dict[str, tuple[type, str]] = {
    "presence_penalty": (float, "presence_penalty"),
    "frequency_penalty": (float, "frequency_penalty"),
    "repetition_penalty": (float, "repetition_penalty"),
    "min_p": (float, "min_p"),
    "min_tokens": (int, "min_length"),
}

# field of the engine, or of GenerationRequest -> the API's, where they differ
NAMES = {field: name for name, (_, field) in _SAMPLING.items() if field != name} | {
    "max_new_tokens": "max_tokens",
    "random_seed": "seed",
    "num_log_probs": "logprobs",
    "num_prompt_log_probs": "prompt_logprobs",
    "prompt_ids": "prompt",
    "stop_words": "stop",
    "end_ids": "stop_token_ids",
}


@dataclass(frozen=True)
class Ask:
    """A parsed completion: the prompts to run, and how to answer.

    requests: one per prompt. num_choices: of each prompt; more than the samples that the engine runs where the choice
    is greedy: then all are equal. Fewer where best_of is given: then the best are returned.
    num_log_probs: alternatives of each token in the answer; None: no log-probabilities.
    drops_output: max_tokens is 0; the engine makes one token, and the answer has none.
    max_tokens_name: the field that set the most new tokens.
    """

    requests: list[GenerationRequest]
    num_choices: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    num_log_probs: int | None = None
    num_prompt_log_probs: int | None = None
    tokens_as_ids: bool = False
    skips_special_tokens: bool = True
    drops_output: bool = False
    max_tokens_name: str = "max_tokens"


def sampling_params(
    fields: Fields,
    model: ServedModel,
    max_new_tokens: int,
    num_choices: int,
    num_log_probs: int,
    num_prompt_log_probs: int | None = None,
) -> SamplingParams:
    """The engine's parameters. num_prompt_log_probs: alternatives at the prompt's positions; None: none are asked for.

    The seed is 0 where none is given; see `with_seeds`.
    """
    values = {field: fields.get(name, kind) for name, (kind, field) in _SAMPLING.items()}
    given: dict[str, Any] = {field: value for field, value in values.items() if value is not None}
    temperature = _or(fields.get("temperature", float), 1.0)
    top_k = _or(fields.get("top_k", int), 0)
    if not 0 < top_k < model.encoder.vocab_size:  # as in vLLM, -1, 0 and large numbers are all tokens
        top_k = 0
    num_samples = _best_of(fields, num_choices)
    params = SamplingParams(
        max_new_tokens,
        temperature=0.0 if 0 < temperature < _LEAST_TEMPERATURE else temperature,
        top_k=top_k,
        top_p=_or(fields.get("top_p", float), 1.0),
        logit_bias=_logit_bias(fields),
        openai_penalties=True,
        num_log_probs=num_log_probs,
        prompt_log_probs=num_prompt_log_probs is not None,
        num_prompt_log_probs=num_prompt_log_probs or 0,
        random_seed=_seed(fields) or 0,
        **given,
    )
    if params.min_length > max_new_tokens:
        raise bad_field(
            "min_tokens", f"is {params.min_length}; it must be at most max_tokens, which is {max_new_tokens}"
        )
    return params if params.is_greedy else replace(params, n=num_samples)


def with_seeds(fields: Fields, params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters of each of `count` prompts. Without a seed each draws its own, as OpenAI's clients expect."""
    if fields.get("seed", int) is not None or params.is_greedy:
        return [params] * count
    return [replace(params, random_seed=secrets.randbits(64)) for _ in range(count)]


def text_options(fields: Fields, model: ServedModel, max_new_tokens: int) -> dict[str, Any]:
    """Keyword arguments of GenerationRequest that do not depend on the prompt."""
    vocab_size = model.encoder.vocab_size
    end_ids = [] if fields.flag("ignore_eos") else list(model.encoder.end_ids)
    stop_ids = fields.items("stop_token_ids", int)
    if len(stop_ids) > MAX_END_IDS:
        raise bad_field("stop_token_ids", f"has {len(stop_ids)} tokens; at most {MAX_END_IDS} are taken")
    for token_id in stop_ids:
        if not 0 <= token_id < vocab_size:
            raise bad_field("stop_token_ids", f"has {token_id}; it must be between 0 and {vocab_size - 1}")
        end_ids.append(token_id)
    truncation = fields.get("truncate_prompt_tokens", int)
    if truncation == -1:  # as many as there is room for
        truncation = max(1, model.encoder.max_seq_len - max_new_tokens)
    return {
        "end_ids": tuple(dict.fromkeys(end_ids)),
        "stop_words": _stop(fields),
        "keep_stop_word": fields.flag("include_stop_str_in_output"),
        "skip_special_tokens": fields.flag("skip_special_tokens", True),
        "truncate_prompt_tokens": truncation,
    }


def num_choices(fields: Fields) -> int:
    """n, between 1 and MAX_N: as many samples as the engine takes, or copies of the greedy one."""
    return _num_samples("n", _or(fields.get("n", int), 1))


def stream_options(fields: Fields) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    return stream, options.flag("include_usage")


def check_format(fields: Fields) -> None:
    """Refuse a response_format other than text: the answer would not have it."""
    if (fields.object("response_format").get("type", str) or "text") != "text":
        raise bad_field("response_format", "is not supported, other than of type text")


def count(fields: Fields, name: str) -> int | None:
    """An integer of 0 or more; None where it is absent."""
    value = fields.get(name, int)
    if value is not None and value < 0:
        raise bad_field(name, f"is {value}; it must be 0 or more")
    return value


def skip_unused(fields: Fields) -> None:
    """Take fields that are known and change nothing here."""
    for name in ("user", "metadata", "store", "service_tier", "model"):
        fields.any(name)


def _best_of(fields: Fields, n: int) -> int:
    best_of = fields.get("best_of", int)
    if best_of is None:
        return n
    if best_of < n:
        raise bad_field("best_of", f"is {best_of}; it must be at least n, which is {n}")
    if best_of > n and fields.flag("stream"):
        raise bad_field("best_of", f"is {best_of}; in a stream it must be n, which is {n}")
    return _num_samples("best_of", best_of)


def _num_samples(name: str, number: int) -> int:
    if not 1 <= number <= MAX_N:
        raise bad_field(name, f"is {number}; it must be between 1 and {MAX_N}")
    return number


def _seed(fields: Fields) -> int | None:
    seed = fields.get("seed", int)
    if seed is None:
        return None
    if not _MIN_SEED <= seed < SEED_LIMIT:
        raise bad_field("seed", "is out of range; it must be between -2^63 and 2^64 - 1")
    return seed % SEED_LIMIT


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    pairs: list[tuple[int, float]] = []
    for key, bias in (fields.get("logit_bias", dict) or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise bad_field("logit_bias", f"has the key {key[:20]!r}; keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise bad_field("logit_bias", f"has a bias for token {key} that is not a number between -100 and 100")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _stop(fields: Fields) -> Sequence[str]:
    if isinstance(fields.any("stop"), str):
        words = [fields.get("stop", str) or ""]
    else:
        words = fields.items("stop", str)
    return [word for word in words if word]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
