"""Triton's input tensors → `GenerationRequest`s, and the tensors' names for errors about a parameter.

Arrays are [rows, values], one row per prompt. Rows and words are counted first; nothing is tokenized here.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine.request import SamplingParams
from serving.request import Chat, GenerationRequest
from serving.tokenization import MAX_END_IDS, check_num_words, decoded

# tensor -> (dtype, field of SamplingParams): one value per prompt
_SAMPLING = {
    "request_output_len": (np.uint32, "max_new_tokens"),
    "beam_width": (np.uint32, "beam_width"),
    "len_penalty": (np.float32, "len_penalty"),
    "beam_search_diversity_rate": (np.float32, "beam_search_diversity_rate"),
    "early_stopping": (bytes, "early_stopping"),
    "n": (np.uint32, "n"),
    "runtime_top_k": (np.uint32, "top_k"),
    "runtime_top_p": (np.float32, "top_p"),
    "temperature": (np.float32, "temperature"),
    "random_seed": (np.uint64, "random_seed"),
    "top_p_decay": (np.float32, "top_p_decay"),
    "top_p_min": (np.float32, "top_p_min"),
    "top_p_reset_ids": (np.uint32, "top_p_reset_id"),
    "repetition_penalty": (np.float32, "repetition_penalty"),
    "presence_penalty": (np.float32, "presence_penalty"),
    "frequency_penalty": (np.float32, "frequency_penalty"),
    "min_length": (np.uint32, "min_length"),
    "num_log_probs": (np.uint32, "num_log_probs"),
    "is_return_prompt_log_probs": (np.bool_, "prompt_log_probs"),
    "is_return_next_token_logits": (np.bool_, "next_token_logits"),
}
_OTHERS = {
    "prompts": bytes,
    "messages": bytes,
    "input_lengths": np.uint32,
    "start_id": np.uint32,
    "ignore_eos": np.bool_,
    "include_stop_words_in_output": np.bool_,
    "exclude_input_in_output": np.bool_,
    "skip_special_tokens": np.bool_,
    "is_return_log_probs": np.bool_,
    "request_id": bytes,
    "stop": np.bool_,
    "deadline_s": np.float32,
}
# Any number of values per prompt. Rows with fewer end_ids than others repeat one.
_LISTS = {"input_ids": np.int32, "end_id": np.uint32, "stop_words": bytes, "bad_words": bytes}

# name -> (dtype, shape without the batch's dimension)
INPUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{name: (dtype, (1,)) for name, (dtype, _) in _SAMPLING.items()},
    **{name: (dtype, (1,)) for name, dtype in _OTHERS.items()},
    **{name: (dtype, (-1,)) for name, dtype in _LISTS.items()},
}

# field of the engine, or of GenerationRequest -> its tensor, where they differ
NAMES = {field: name for name, (_, field) in _SAMPLING.items() if field != name} | {
    "prompt": "prompts",
    "prompt_ids": "input_ids",
    "end_ids": "end_id",
    "with_log_probs": "is_return_log_probs",
}


def stop_ids(arrays: dict[str, np.ndarray]) -> list[str] | None:
    """The ids of the requests that this one stops, one per row; None where it stops none.

    Raises ValueError where a row stops none, or has no id.
    """
    if "stop" not in arrays or not arrays["stop"].any():
        return None
    if not arrays["stop"].all() or "request_id" not in arrays:
        raise ValueError("stop is set; every row of such a request must have it, and a request_id")
    return [_text(arrays["request_id"][row].reshape(-1)[0], "request_id") for row in range(len(arrays["stop"]))]


class Rows:
    """One GenerationRequest per row, each parsed when it is read.

    Raises ValueError, in one sentence, for the first thing that is wrong: here what counting shows.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._num_rows = _num_rows(arrays)
        # The empty words that make rows equally long do not count.
        check_num_words(sum(np.count_nonzero(arrays[name]) for name in ("stop_words", "bad_words") if name in arrays))

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[GenerationRequest]:
        for row in range(self._num_rows):
            yield _parse_row(_Values(self._arrays, row), row)


def check_key(parameters: Mapping[str, Any] | None, api_key: str) -> None:
    """Raise ValueError where there is a key, and the request's parameters do not have it."""
    given = str((parameters or {}).get("api_key", ""))
    if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
        raise ValueError("stop is set; this server takes it only with the right api_key among the request's parameters")


def _parse_row(values: _Values, row: int) -> GenerationRequest:
    given: dict[str, Any] = {}
    for name, (dtype, field) in _SAMPLING.items():
        value = values.text(name) if dtype is bytes else values.one(name, None)
        if value is not None:
            given[field] = value
    return GenerationRequest(
        _prompt(values, row),
        SamplingParams(**given),
        start_id=values.one("start_id", None),
        end_ids=_end_ids(values, row),
        ignore_eos=values.one("ignore_eos", False),
        stop_words=values.words("stop_words", row),
        bad_words=values.words("bad_words", row),
        with_prompt=not values.one("exclude_input_in_output", values.has("messages")),
        keep_stop_word=values.one("include_stop_words_in_output", False),
        skip_special_tokens=values.one("skip_special_tokens", True),
        with_log_probs=values.one("is_return_log_probs", False),
        request_id=values.text("request_id"),
        deadline_s=values.one("deadline_s", None),
    )


def _end_ids(values: _Values, row: int) -> tuple[int, ...] | None:
    if not values.has("end_id"):
        return None
    given = values.many("end_id")
    if not 1 <= len(given) <= MAX_END_IDS:
        raise ValueError(f"end_id[{row}] has {len(given)} tokens; it must have between 1 and {MAX_END_IDS}")
    return tuple(dict.fromkeys(given.tolist()))


def _prompt(values: _Values, row: int) -> Any:
    """Text as bytes or str, a chat, or an array of token ids, not copied: its length is checked first."""
    if (messages := values.text("messages", row)) is not None:
        return Chat(messages)
    if not values.has("input_ids"):
        return values.many("prompts")[0]
    input_ids = values.many("input_ids")
    length = values.one("input_lengths", len(input_ids))
    if length > len(input_ids):
        raise ValueError(f"input_lengths[{row}] is {length}; input_ids has {len(input_ids)} tokens")
    return input_ids[:length]


class _Values:
    """One row of the arrays."""

    def __init__(self, arrays: dict[str, np.ndarray], row: int) -> None:
        self._arrays = arrays
        self._row = row

    def has(self, name: str) -> bool:
        return name in self._arrays

    def one(self, name: str, default: Any) -> Any:
        return self.many(name)[0].item() if self.has(name) else default

    def many(self, name: str) -> np.ndarray:
        return self._arrays[name][self._row].reshape(-1)

    def text(self, name: str, row: int | None = None) -> str | None:
        return _text(self.many(name)[0], name, row) if self.has(name) else None

    def words(self, name: str, row: int) -> list[str]:
        """Words of a row, without the empty ones that make rows equally long."""
        given = self.many(name) if self.has(name) else ()
        return [_text(word, name, row) for word in given if len(word)]


def _text(value: bytes | str, name: str, row: int | None = None) -> str:
    return value if isinstance(value, str) else decoded(bytes(value), name, row)


def _num_rows(arrays: dict[str, np.ndarray]) -> int:
    given = [name for name in ("prompts", "input_ids", "messages") if name in arrays]
    if not given:
        raise ValueError("prompts is missing; it is required (or input_ids or messages in its place)")
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} are both given; one of the two must be")
    if "request_output_len" not in arrays:
        raise ValueError("request_output_len is missing; it is required")
    rows = len(arrays[given[0]])
    for name, array in arrays.items():
        if name in _LISTS:
            if len(array) != rows:
                raise ValueError(f"{name} has {len(array)} rows; it must have one for each of the {rows} prompts")
        elif array.size != rows:
            raise ValueError(f"{name} has {array.size} values; it must have one for each of the {rows} prompts")
    return rows
