"""Guesses a sequence's next tokens by prompt lookup: texts repeat themselves. Numbers only: no torch.

The guess: what followed the last occurrence of the sequence's last tokens follows again. No second model is needed
(Saxena, Prompt Lookup Decoding, 2023; vLLM calls it ngram).
"""

from __future__ import annotations

_MOST_COMPARED = 4  # tokens: of two matches, the longer one is the better guess, up to so many
_MOST_TRIED = 32  # matches
_MOST_INDEXED = 4096  # tokens that one call indexes, in some 2 ms: a long prompt must not hold up the engine
_WEIGHT = 0.25  # of the latest guess in the record
_LEAST_RECORD = 0.5


class NgramDrafter:
    """Drafts for one sequence, from an index of its pairs of tokens: O(1) per token.

    It keeps a record of its guesses. A guess that no step computes counts, too: its first token is compared with the
    token that comes. So a text that does not repeat itself gets few drafts, and one that begins to gets them soon.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self._token_ids = prompt_ids[:]
        self._ends: dict[tuple[int, int], int] = {}  # pair → the position after its last occurrence
        self._earlier = [0, 0]  # by such a position: the one of the pair's occurrence before it, 0 for none
        self._guess: list[int] = []
        self._record = _LEAST_RECORD  # moving average over guesses; 1: all were right

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that it knows."""
        return len(self._token_ids)

    def extend(self, token_ids: list[int]) -> None:
        """Take the sequence's next tokens, known and final."""
        if self._guess:
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
        tokens = self._token_ids
        self._index()
        start = self._ends.get((tokens[-2], tokens[-1])) if len(tokens) > 1 else None
        if start is None or most < 1:
            return []
        start = self._longest(start)
        length = 0
        while length < min(most, start) and tokens[start - 1 - length] == tokens[-1 - length]:
            length += 1
        guess = tokens[start : start + length]
        while len(guess) < length:  # the match reaches the text's end: it repeats itself at this distance
            guess.append(guess[start - len(tokens)])
        self._guess = guess
        return guess if self._record >= _LEAST_RECORD else []

    def _index(self) -> None:
        """Index the pairs that a token follows."""
        tokens, ends, earlier = self._token_ids, self._ends, self._earlier
        for end in range(len(earlier), min(len(tokens), len(earlier) + _MOST_INDEXED)):
            pair = tokens[end - 2], tokens[end - 1]
            earlier.append(ends.get(pair, 0))
            ends[pair] = end

    def _longest(self, end: int) -> int:
        """Of the matches that end at `end` or earlier, the longest; of equally long ones the latest."""
        tokens, earlier = self._token_ids, self._earlier
        best, best_length = end, 0
        for _ in range(_MOST_TRIED):
            length = 2
            while length < min(_MOST_COMPARED, end) and tokens[end - 1 - length] == tokens[-1 - length]:
                length += 1
            if length > best_length:
                best, best_length = end, length
            end = earlier[end]
            if not end or best_length == _MOST_COMPARED:
                break
        return best
