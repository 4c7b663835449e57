"""Guesses a sequence's next tokens by prompt lookup: texts repeat themselves. Numbers only: no torch.

The guess: what followed the last occurrence of the sequence's last tokens follows again. No second model is needed
(Saxena, Prompt Lookup Decoding, 2023; vLLM calls it ngram).
"""

from __future__ import annotations

_SIZES = (4, 3, 2)  # tokens of an n-gram; the longest match is the best guess
_MOST_INDEXED = 4096  # tokens that one call indexes, in some 5 ms: a long prompt must not hold up the engine
_WEIGHT = 0.25  # of the latest guess in the record
_LEAST_RECORD = 0.5


class NgramDrafter:
    """Drafts for one sequence, from an index of its n-grams: O(1) per token.

    It keeps a record of its guesses. A guess that no step computes counts, too: its first token is compared with the
    token that comes. So a text that does not repeat itself gets few drafts, and one that begins to gets them soon.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self._token_ids = prompt_ids[:]
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram → the position after its last occurrence
        self._num_indexed = 0  # the index has the n-grams within so many tokens
        self._guess: list[int] = []
        self._record = _LEAST_RECORD  # moving average over guesses; 1: all were right

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that it knows."""
        return len(self._token_ids)

    def extend(self, token_ids: list[int]) -> None:
        """Take the sequence's next tokens, known and final."""
        for token_id, guess in zip(token_ids, self._guess, strict=False):
            is_right = token_id == guess
            self._record += _WEIGHT * (is_right - self._record)
            if not is_right:
                break
        self._guess = []
        self._token_ids += token_ids

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where too few of the latest guesses were right.

        There are no more of them than tokens agree before: a long match is seldom a coincidence.
        """
        self._index()
        tokens, start = self._token_ids, self._match()
        if start is None or most < 1:
            return []
        length = 0
        while length < min(most, start) and tokens[start - 1 - length] == tokens[-1 - length]:
            length += 1
        guess = tokens[start : start + length]
        while len(guess) < length:  # the match reaches the text's end: it repeats itself at this distance
            guess.append(guess[start - len(tokens)])
        self._guess = guess
        return guess if self._record >= _LEAST_RECORD else []

    def _index(self) -> None:
        """Index the n-grams that a token follows."""
        tokens, ends = self._token_ids, self._ends
        last = min(len(tokens) - 1, self._num_indexed + _MOST_INDEXED)
        for end in range(self._num_indexed + 1, last + 1):
            for size in _SIZES:
                if size <= end:
                    ends[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, last)

    def _match(self) -> int | None:
        """The position after the last earlier occurrence of the last tokens."""
        for size in _SIZES:
            end = self._ends.get(tuple(self._token_ids[-size:]))
            if end is not None:
                return end
        return None
