"""Triton's input tensors → `GenerationRequest`: one prompt with its options, checked and tokenized.

It knows the tokenizer and the tensors' names; it never sees Triton, the engine's loop or the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.request import Request, SamplingParams
from engine.words import Vocabulary
from serving.text import token_bytes

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
    "input_lengths": np.uint32,
    "start_id": np.uint32,
    "end_id": np.uint32,
    "ignore_eos": np.bool_,
    "include_stop_words_in_output": np.bool_,
    "exclude_input_in_output": np.bool_,
    "skip_special_tokens": np.bool_,
    "is_return_log_probs": np.bool_,
    "request_id": bytes,
    "stop": np.bool_,
    "deadline_s": np.float32,
}
_LISTS = {"input_ids": np.int32, "stop_words": bytes, "bad_words": bytes}  # any number of values per prompt

# name -> (dtype, shape without the batch's dimension)
INPUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{name: (dtype, (1,)) for name, (dtype, _) in _SAMPLING.items()},
    **{name: (dtype, (1,)) for name, dtype in _OTHERS.items()},
    **{name: (dtype, (-1,)) for name, dtype in _LISTS.items()},
}

_MAX_WORDS = 256  # stop or bad words of a prompt
_MAX_WORD_BYTES = 256
_MAX_WORDS_BYTES = 4096  # of all stop or bad words of a prompt together
# What one Triton request may make the server keep in memory: a token's alternatives, logits.
_MAX_ALTERNATIVES = 1 << 18
_MAX_LOGITS = 1 << 24
_MIN_BYTES_PER_TOKEN = 64  # that a text may have: tokenizers drop some, of white space for instance


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt: what the engine gets, and how the answer is to look."""

    request: Request
    stop_words: list[str]
    keep_stop_word: bool
    with_prompt: bool
    skip_special_tokens: bool
    with_log_probs: bool
    request_id: str | None
    deadline_s: float | None


class Parser:
    """Makes Asks of arrays.

    tokenizer: of transformers; end_id: the token that ends a text by default; vocab_size: of the model;
    max_seq_len: tokens of the longest sequence served.
    """

    def __init__(self, tokenizer: Any, end_id: int, vocab_size: int, max_seq_len: int) -> None:
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        spellings = token_bytes(tokenizer, vocab_size)
        self.max_prompt_bytes = max_seq_len * max(_MIN_BYTES_PER_TOKEN, *map(len, spellings))
        self.vocabulary = Vocabulary(spellings)
        self.vocabulary.words([b"a"], [b"ab"])  # makes its indexes, which take a large vocabulary 0.2 s

    def stop_ids(self, arrays: dict[str, np.ndarray]) -> list[str] | None:
        """The ids of the requests that this one says to stop, one per row; None where it says no such thing."""
        if "stop" not in arrays or not arrays["stop"].any():
            return None
        if not arrays["stop"].all() or "request_id" not in arrays:
            raise ValueError("stop is set; every row of such a request must have it, and a request_id")
        return [_text(arrays["request_id"][row].reshape(-1)[0], "request_id") for row in range(len(arrays["stop"]))]

    def parse(self, arrays: dict[str, np.ndarray]) -> list[GenerationRequest]:
        """One GenerationRequest per row. Raises ValueError, in one sentence, for the first thing that is wrong."""
        num_rows = _num_rows(arrays)
        asks = [self._parse_row(_Values(arrays, row), row) for row in range(num_rows)]
        samplings = [ask.request.sampling for ask in asks]
        alternatives = sum(s.num_log_probs * s.max_new_tokens * s.width for s in samplings)
        if alternatives > _MAX_ALTERNATIVES:
            raise ValueError(
                f"num_log_probs asks for {alternatives} alternatives in one request; "
                f"at most {_MAX_ALTERNATIVES} are kept"
            )
        logits = sum(s.next_token_logits for s in samplings) * self.vocab_size
        if logits > _MAX_LOGITS:
            raise ValueError(
                f"is_return_next_token_logits asks for {logits} logits in one request; at most {_MAX_LOGITS} are kept"
            )
        return asks

    def _parse_row(self, values: _Values, row: int) -> GenerationRequest:
        sampling = self._sampling(values)
        prompt_ids = self._prompt_ids(values, row)
        end_id = self._token_id("end_id", values.one("end_id", self.end_id))
        stop_words, bad_words = values.words("stop_words", row), values.words("bad_words", row)
        words = self._words(stop_words, bad_words)
        if words is not None and not self._leaves_tokens(words.always_banned, end_id if sampling.min_length else None):
            raise ValueError("bad_words leaves no token of the vocabulary to choose from")
        deadline_s = values.one("deadline_s", None)
        if deadline_s is not None and not deadline_s > 0:
            raise ValueError(f"deadline_s is {deadline_s:g}; it must be above 0")
        request = Request(
            prompt_ids,
            sampling,
            None if values.one("ignore_eos", False) else end_id,
            words=words,
            bad_word_ids=self._bad_word_ids(bad_words),
        )
        return GenerationRequest(
            request,
            stop_words,
            keep_stop_word=values.one("include_stop_words_in_output", False),
            with_prompt=not values.one("exclude_input_in_output", False),
            skip_special_tokens=values.one("skip_special_tokens", True),
            with_log_probs=values.one("is_return_log_probs", False),
            request_id=values.text("request_id"),
            deadline_s=deadline_s,
        )

    def _sampling(self, values: _Values) -> SamplingParams:
        given = {}
        for name, (dtype, parameter) in _SAMPLING.items():
            value = values.text(name) if dtype is bytes else values.one(name, None)
            if value is not None:
                given[parameter] = value
        for name in ("runtime_top_k", "num_log_probs"):
            value = values.one(name, 0)
            if value > self.vocab_size:
                raise ValueError(f"{name} is {value}; the vocabulary has {self.vocab_size} tokens")
        if "top_p_reset_id" in given:
            self._token_id("top_p_reset_ids", given["top_p_reset_id"])
        return SamplingParams(**{"max_new_tokens": 0, **given})

    def _prompt_ids(self, values: _Values, row: int) -> list[int]:
        prompt_ids = self._given_ids(values, row) if values.has("input_ids") else self._tokenize(values, row)
        if not prompt_ids and values.has("start_id"):
            prompt_ids = [self._token_id("start_id", values.one("start_id", 0))]
        name = "input_ids" if values.has("input_ids") else "prompts"
        if not prompt_ids:
            raise ValueError(f"{name}[{row}] is empty; it must have at least one token")
        for token_id in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= token_id < self.vocab_size:  # one that was added to the tokenizer and not to the model, say
                raise ValueError(f"{name}[{row}] has token {token_id}; the vocabulary has {self.vocab_size} tokens")
        return prompt_ids

    def _given_ids(self, values: _Values, row: int) -> list[int]:
        input_ids = values.many("input_ids")
        length = values.one("input_lengths", len(input_ids))
        if length > len(input_ids):
            raise ValueError(f"input_lengths[{row}] is {length}; input_ids has {len(input_ids)} tokens")
        if length > self.max_seq_len:
            raise ValueError(
                f"input_ids[{row}] has {length} tokens; the longest sequence served is {self.max_seq_len} tokens"
            )
        return input_ids[:length].tolist()

    def _tokenize(self, values: _Values, row: int) -> list[int]:
        prompt = values.many("prompts")[0]
        if len(prompt) > self.max_prompt_bytes:  # to tokenize it would take long, and could not end well
            raise ValueError(
                f"prompts[{row}] has {len(prompt)} bytes; at most {self.max_prompt_bytes} are taken "
                f"for the {self.max_seq_len} tokens of the longest sequence served"
            )
        text = _text(prompt, f"prompts[{row}]")
        return self.tokenizer.encode(text) if text else []

    def _token_id(self, name: str, token_id: int) -> int:
        if token_id >= self.vocab_size:
            raise ValueError(f"{name} is {token_id}; the vocabulary has {self.vocab_size} tokens")
        return token_id

    def _words(self, stop_words: Sequence[str], bad_words: Sequence[str]) -> Any:
        if not stop_words and not bad_words:
            return None
        return self.vocabulary.words([word.encode() for word in stop_words], [word.encode() for word in bad_words])

    def _leaves_tokens(self, banned_ids: Sequence[int], also_banned: int | None) -> bool:
        is_one_more = also_banned is not None and also_banned not in banned_ids
        return len(banned_ids) + is_one_more < self.vocab_size

    def _bad_word_ids(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Each word's tokens at the beginning of a text and after a space, which most tokenizers write differently."""
        spellings = [
            self.tokenizer.encode(text, add_special_tokens=False) for word in bad_words for text in (word, f" {word}")
        ]
        return [ids for index, ids in enumerate(spellings) if ids and ids not in spellings[:index]]


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

    def text(self, name: str) -> str | None:
        return _text(self.many(name)[0], name) if self.has(name) else None

    def words(self, name: str, row: int) -> list[str]:
        """Words of a row, without the empty ones that make rows equally long."""
        given = [_text(word, f"{name}[{row}]") for word in self.many(name)] if self.has(name) else []
        words = [word for word in given if word]
        if len(words) > _MAX_WORDS:
            raise ValueError(f"{name}[{row}] has {len(words)} words; at most {_MAX_WORDS} are allowed")
        total = sum(len(word.encode()) for word in words)
        if total > _MAX_WORDS_BYTES:
            raise ValueError(f"{name}[{row}] has words of {total} bytes; at most {_MAX_WORDS_BYTES} are allowed")
        for word in words:
            if len(word.encode()) > _MAX_WORD_BYTES:
                raise ValueError(
                    f"{name}[{row}] has a word of {len(word.encode())} bytes; at most {_MAX_WORD_BYTES} are allowed"
                )
        return words


def _text(value: bytes | str, name: str) -> str:
    try:
        return value if isinstance(value, str) else bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from None


def _num_rows(arrays: dict[str, np.ndarray]) -> int:
    given = [name for name in ("prompts", "input_ids") if name in arrays]
    if not given:
        raise ValueError("prompts is missing; it is required (or input_ids in its place)")
    if len(given) == 2:
        raise ValueError("prompts and input_ids are both given; one of the two must be")
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
