"""Log-probabilities as OpenAI's clients read them, and the names of tokens in them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.request import Output
from serving.generation import Generation

_LEAST = -9999.0  # JSON has no -inf
_Pairs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text. log_prob: None for the first one of a prompt. alternatives: likeliest first."""

    token_id: int
    log_prob: float | None
    alternatives: _Pairs = ()


def prompt_tokens(generation: Generation) -> list[ScoredToken]:
    """The prompt's tokens, with log-probabilities where they were asked for."""
    ids, log_probs = generation.prompt_ids, generation.prompt_log_probs
    alternatives: Sequence[_Pairs] = generation.prompt_alternatives or [()] * len(log_probs)
    following = zip(ids[1:], log_probs, alternatives, strict=False)
    return [ScoredToken(ids[0], None), *(ScoredToken(*values) for values in following)]


def output_tokens(output: Output, part: slice) -> list[ScoredToken]:
    """Some of an output's tokens."""
    ids = output.token_ids[part]
    alternatives = output.alternatives[part] or [()] * len(ids)
    return [ScoredToken(*values) for values in zip(ids, output.log_probs[part], alternatives, strict=True)]


class TokenLabels:
    """Names of tokens: their text, or "bytes:\\xe2\\x80" where they are a part of a character.

    token_bytes: of every id; as_ids: names are "token_id:123".
    """

    def __init__(self, token_bytes: Sequence[bytes], as_ids: bool = False) -> None:
        self._token_bytes = token_bytes
        self._as_ids = as_ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text."""
        return self._token_bytes[token_id]

    def label(self, token_id: int) -> str:
        """The token's name."""
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self._token_bytes[token_id]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return _spelled(raw)

    def distinct(self, token_ids: Iterable[int]) -> dict[int, str]:
        """Names of the tokens at one position. Where two have the same text, the later one is spelled in bytes."""
        labels: dict[int, str] = {}
        used: set[str] = set()
        for token_id in token_ids:
            if token_id in labels:
                continue
            candidates = (self.label(token_id), _spelled(self._token_bytes[token_id]), f"token_id:{token_id}")
            labels[token_id] = next(name for name in candidates if name not in used)
            used.add(labels[token_id])
        return labels


class TextOffsets:
    """Characters of a text before each of its tokens. skipped: tokens that are not in the text."""

    def __init__(self, skipped: frozenset[int] = frozenset()) -> None:
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def before(self, token_id: int, raw: bytes) -> int:
        """The characters before the text's next token, which has these bytes."""
        offset = self._num_characters
        if token_id not in self._skipped:
            self._num_characters += len(self._decoder.decode(raw))
        return offset


def completion_log_probs(
    tokens: Sequence[ScoredToken], labels: TokenLabels, num_alternatives: int, offsets: TextOffsets
) -> dict[str, Any]:
    """The `logprobs` of a text completion: four lists, one entry per token.

    top_logprobs has num_alternatives tokens, and the chosen one where it is none of them.
    """
    names, tops, places = [], [], []
    for token in tokens:
        pairs = dict(token.alternatives[:num_alternatives])
        if token.log_prob is not None:
            pairs.setdefault(token.token_id, token.log_prob)
        # The chosen token comes first, so that its text is its name.
        own = labels.distinct([token.token_id, *pairs])
        names.append(own[token.token_id])
        tops.append({own[i]: finite(value) for i, value in pairs.items()} if token.log_prob is not None else None)
        places.append(offsets.before(token.token_id, labels.bytes_of(token.token_id)))
    values = [None if token.log_prob is None else finite(token.log_prob) for token in tokens]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": places}


def chat_log_probs(tokens: Sequence[ScoredToken], labels: TokenLabels, num_alternatives: int) -> dict[str, Any]:
    """The `logprobs` of a chat completion: one entry per token, with the likeliest tokens in its place."""
    return {
        "content": [
            {
                **_entry(token.token_id, token.log_prob or 0.0, labels),
                "top_logprobs": [_entry(*pair, labels) for pair in token.alternatives[:num_alternatives]],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def prompt_log_probs(generation: Generation, labels: TokenLabels, num_alternatives: int) -> list[dict | None]:
    """vLLM's `prompt_logprobs`: per prompt token, token id → its log-probability, rank (where known) and text."""
    entries: list[dict | None] = []
    for token in prompt_tokens(generation):
        if token.log_prob is None:
            entries.append(None)
            continue
        pairs = dict(token.alternatives[:num_alternatives])
        ranks = {token_id: rank for rank, token_id in enumerate(pairs, 1)}
        pairs.setdefault(token.token_id, token.log_prob)
        entries.append(
            {
                str(i): {"logprob": finite(value), "rank": ranks.get(i), "decoded_token": labels.label(i)}
                for i, value in pairs.items()
            }
        )
    return entries


def finite(log_prob: float) -> float:
    """The log-probability, within what JSON can hold: neither -inf nor NaN."""
    return log_prob if log_prob > _LEAST else _LEAST


def _entry(token_id: int, log_prob: float, labels: TokenLabels) -> dict[str, Any]:
    return {
        "token": labels.label(token_id),
        "logprob": finite(log_prob),
        "bytes": list(labels.bytes_of(token_id)),
    }


def _spelled(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
