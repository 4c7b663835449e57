"""Stop and bad words over token bytes, against `word in text`."""

from __future__ import annotations

import random

import pytest

from engine.words import Vocabulary

HELLO = [b"he", b"llo", b"hel", b"lo", b"l", b"o", b" hello", b"", b"hello"]


def completes(word: bytes, text: bytes, new: bytes) -> bool:
    """Whether the word ends inside `new` somewhere in text + new."""
    return any((text + new[:n]).endswith(word) for n in range(1, len(new) + 1))


def joined(token_bytes: list[bytes], token_ids: list[int]) -> bytes:
    return b"".join(token_bytes[i] for i in token_ids)


def test_a_bad_word_is_banned_whatever_spells_it() -> None:
    words = Vocabulary(HELLO).words([], [b"hello"])
    assert (words.has_bad, words.has_stop, words.always_banned) == (True, False, [6, 8])
    assert words.banned([], []) == []
    assert words.banned([], [0]) == [1]  # he|llo
    assert words.banned([2], []) == [3]  # the prompt is text: hel|lo
    assert words.banned([0], [4, 7]) == [3]  # he|l|""|lo
    assert words.banned([], [0, 4, 4]) == [5]  # he|l|l|o
    assert words.banned([], [0, 5]) == []


def test_a_stop_word_may_begin_and_end_inside_tokens() -> None:
    words = Vocabulary(HELLO).words([b"ell", b"oh"], [])
    assert (words.has_bad, words.has_stop, words.always_banned) == (False, True, [])
    assert not words.stops([])
    assert words.stops([0, 1])
    assert words.stops([8])
    assert not words.stops([8, 4])  # it ended before the last token
    assert not words.stops([8, 7])  # … and a token without bytes ends nothing
    assert words.stops([5, 7, 0])


def test_no_words() -> None:
    vocabulary = Vocabulary(HELLO)
    assert vocabulary.words([], []) is None
    for stop, bad in [([b""], []), ([], [b"a", b""])]:
        with pytest.raises(AssertionError):
            vocabulary.words(stop, bad)


def test_the_highest_byte_has_no_successor() -> None:
    words = Vocabulary([b"\xff", b"a", b"\xff\xff", b"\xff\xffb", b"\xfe"]).words([], [b"a\xff"])
    assert words.banned([], [1]) == [0, 2, 3]


@pytest.mark.parametrize("many", [0, 3, 40_000])
def test_against_brute_force(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of finding the tokens that contain a word, in vocabularies of few letters, where words overlap."""
    monkeypatch.setattr("engine.words._MANY", many)
    rng = random.Random(many)

    def some_bytes(least: int, most: int) -> bytes:
        return bytes(rng.choice(b"ab\xff") for _ in range(rng.randint(least, most)))

    for _ in range(400):
        token_bytes = [some_bytes(0, 4) for _ in range(rng.randint(1, 40))]
        vocabulary = Vocabulary(token_bytes)
        stop = [some_bytes(1, 7) for _ in range(rng.randint(0, 3))]
        bad = [some_bytes(1, 7) for _ in range(rng.randint(not stop, 3))]
        words = vocabulary.words(stop, bad)
        always = [i for i, text in enumerate(token_bytes) if any(word in text for word in bad)]
        assert words.always_banned == always
        for _ in range(10):
            prompt_ids = rng.choices(range(len(token_bytes)), k=rng.randint(0, 4))
            output_ids = rng.choices(range(len(token_bytes)), k=rng.randint(0, 6))
            text = joined(token_bytes, prompt_ids + output_ids)
            banned = {i for i, new in enumerate(token_bytes) if any(completes(word, text, new) for word in bad)}
            assert words.banned(prompt_ids, output_ids) == sorted(banned - set(always))
            before, new = joined(token_bytes, output_ids[:-1]), joined(token_bytes, output_ids[-1:])
            assert words.stops(output_ids) == any(completes(word, before, new) for word in stop)
