"""Prompt lookup: the drafts of a text, and when there are none."""

from __future__ import annotations

import random

import pytest

from engine.ngram import NgramDrafter


def drafts(token_ids: list[int], most: int = 8) -> list[int]:
    """Of a sequence whose tokens come one by one, after a prompt of one token."""
    drafter = NgramDrafter(token_ids[:1])
    for token_id in token_ids[1:]:
        drafter.extend([token_id])
    return drafter.draft(most)


def naive(token_ids: list[int], most: int) -> list[int]:
    """The longest n-gram first, the latest occurrence; as many tokens as agree before."""
    count = len(token_ids)
    for size in (4, 3, 2):
        for end in range(count - 1, size - 1, -1):
            if size <= count and token_ids[end - size : end] == token_ids[-size:]:
                length = next((n for n in range(most) if n >= end or token_ids[end - 1 - n] != token_ids[-1 - n]), most)
                guess: list[int] = []
                for place in range(length):
                    guess.append([*token_ids, *guess][end + place])
                return guess
    return []


def test_what_followed_the_last_occurrence_follows_again() -> None:
    assert drafts([1, 2, 3, 4, 5, 6, 2, 3]) == [4, 5]
    assert drafts([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3]) == [7, 8]  # the latest
    assert drafts([1, 2, 3, 4, 9, 5, 3, 4, 8, 2, 3, 4]) == [9, 5, 3]  # a longer match before a later one
    assert drafts([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5], most=3) == [6, 7, 8]


def test_a_text_that_repeats_itself_goes_on_repeating_itself() -> None:
    assert drafts([7, 7, 7, 7, 7, 7, 7, 7], most=5) == [7] * 5
    assert drafts([1, 2, 3] * 5, most=8) == [1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("token_ids", [[1], [1, 2], [1, 1], [1, 2, 3, 4], [1, 2, 1, 3, 1]])
def test_no_draft_without_a_match_of_two_tokens(token_ids: list[int]) -> None:
    assert drafts(token_ids) == []


def test_drafts_are_those_of_a_search_through_the_whole_text() -> None:
    rng = random.Random(0)
    num_found = 0
    for _ in range(300):
        text = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
        most = rng.randint(0, 6)
        drafter = NgramDrafter(text)  # no guess before, so no record
        assert drafter.draft(most) == naive(text, most), (text, most)
        num_found += bool(naive(text, most))
    assert num_found > 150


def test_tokens_may_come_several_at_once() -> None:
    text = [5, 6, 7, 8, 9, 5, 6, 7]
    drafter = NgramDrafter(text[:2])
    drafter.extend(text[2:])
    assert (drafter.num_tokens, drafter.draft(8)) == (8, [8, 9, 5])


def test_wrong_guesses_end_the_drafts_and_right_ones_bring_them_back() -> None:
    """Guesses are compared with the tokens that come, even if they were not good enough for drafts."""
    drafter = NgramDrafter([1, 2, 100])
    num_drafts = 0
    for new_id in range(101, 121):  # 1, 2 are followed by something else each time
        for token_id in (1, 2, new_id):
            num_drafts += bool(drafter.draft(8))
            drafter.extend([token_id])
    assert num_drafts == 1
    found = []
    for token_id in [30, 31, 32, 33, 34, 35, 36, 37] * 2:
        found.append(len(drafter.draft(8)))
        drafter.extend([token_id])
    # Two tokens for a match, three right guesses for the record; then as many drafts as tokens agree.
    assert found == [0] * 8 + [0, 0, 0, 0, 0, 5, 6, 7]


def test_a_long_prompt_is_indexed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ngram._MOST_INDEXED", 4)
    drafter = NgramDrafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7, 8])
    assert [drafter.draft(3) for _ in range(3)] == [[], [9, 10], [9, 10]]
