"""Stop words and bad words, matched over the bytes of tokens: any tokens may spell a word.

Stateless towards requests; words and tokens are bytes here. No tokenizer, no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate, chain

_MANY = 40_000  # hits of a word from which asking every token is quicker than visiting every hit


class Vocabulary:
    """The bytes of every token, and indexes that find tokens by their bytes. Indexes are built at first use.

    token_bytes: the bytes that each id adds to a text, b"" for ids that add none.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = token_bytes
        self._words = lru_cache(maxsize=64)(partial(Words, self))

    def words(self, stop: Sequence[bytes], bad: Sequence[bytes]) -> Words | None:
        """The matcher of these words, or None without words. The latest matchers are cached. No word may be empty."""
        return self._words(tuple(stop), tuple(bad)) if stop or bad else None

    def containing(self, word: bytes) -> list[int]:
        """Ids whose bytes contain `word`, sorted."""
        joined, ends = self._joined
        found: list[int] = []
        at = joined.find(word)
        for _ in range(_MANY):
            if at < 0:
                return found
            token_id = bisect_right(ends, at)
            if at + len(word) <= ends[token_id]:
                found.append(token_id)
                at = joined.find(word, ends[token_id])
            else:  # the hit crosses into the next token
                at = joined.find(word, at + 1)
        return [token_id for token_id, text in enumerate(self.token_bytes) if word in text]

    def starting(self, prefix: bytes) -> list[int]:
        """Ids whose bytes start with `prefix`, unordered."""
        keys, ids = self._sorted
        first = bisect_left(keys, prefix)
        beyond = prefix.rstrip(b"\xff")  # the least bytes greater than all that start with the prefix
        last = bisect_left(keys, beyond[:-1] + bytes([beyond[-1] + 1])) if beyond else len(keys)
        return ids[first:last]

    @cached_property
    def _joined(self) -> tuple[bytes, list[int]]:
        return b"".join(self.token_bytes), list(accumulate(map(len, self.token_bytes)))

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        ids = sorted(range(len(self.token_bytes)), key=self.token_bytes.__getitem__)
        return [self.token_bytes[token_id] for token_id in ids], ids


class Words:
    """Stop and bad words. Requests share it, so its lists are read-only.

    Its calls read the last tokens only, as far as the longest word reaches.
    always_banned: sorted ids whose bytes contain a whole bad word.
    """

    def __init__(self, vocabulary: Vocabulary, stop: tuple[bytes, ...], bad: tuple[bytes, ...]) -> None:
        assert all(stop) and all(bad), (stop, bad)
        self.has_stop, self.has_bad = bool(stop), bool(bad)
        self.always_banned = sorted({token_id for word in bad for token_id in vocabulary.containing(word)})
        self._bytes = vocabulary.token_bytes
        self._stop = stop
        self._stop_reach = max(map(len, stop), default=1) - 1  # bytes before the new ones that a word may use
        beginnings = sorted({word[:k] for word in bad for k in range(1, len(word))}, key=len, reverse=True)
        self._beginnings = tuple(beginnings)  # longest first
        self._reach = max(map(len, beginnings), default=0)
        self._completing: dict[bytes, list[int]] = {}  # filled as beginnings turn up: most never do
        self._bad, self._vocabulary = bad, vocabulary

    def banned(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> list[int]:
        """Ids not in `always_banned` that would complete a bad word after this text, sorted."""
        if not self._beginnings:
            return []
        tail = self._tail(self._reach, chain(reversed(output_ids), reversed(prompt_ids)))
        if not tail.endswith(self._beginnings):
            return []
        longest = next(text for text in self._beginnings if tail.endswith(text))
        if longest not in self._completing:
            self._completing[longest] = self._completing_after(longest)
        return self._completing[longest]

    def stops(self, output_ids: Sequence[int]) -> bool:
        """Whether the generated text contains a stop word that ends inside the last token's bytes."""
        if not self._stop or not output_ids:
            return False
        new = len(self._bytes[output_ids[-1]])
        if not new:
            return False
        tail = self._tail(new + self._stop_reach, reversed(output_ids))
        old = len(tail) - new
        return any(tail.find(word, max(0, old - len(word) + 1)) >= 0 for word in self._stop)

    def _completing_after(self, text: bytes) -> list[int]:
        """What `banned` answers where `text` is the longest beginning at the end: others there are ends of it."""
        rests = {word[k:] for word in self._bad for k in range(1, len(word)) if text.endswith(word[:k])}
        found = {token_id for rest in rests for token_id in self._vocabulary.starting(rest)}
        return sorted(found.difference(self.always_banned))

    def _tail(self, length: int, newest_first: Iterable[int]) -> bytes:
        """The last bytes of the tokens: `length` or a few more, fewer where the tokens have not so many."""
        parts = []
        for token_id in newest_first:
            part = self._bytes[token_id]
            parts.append(part)
            length -= len(part)
            if length <= 0:
                break
        parts.reverse()
        return b"".join(parts)
