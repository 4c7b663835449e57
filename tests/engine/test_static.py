"""The scheduler of static batches alone, with made-up results: who shares a batch, what is cut, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.request import CANCELLED, END_ID, LENGTH, SHUTDOWN, STOP, Output, Request, SamplingParams
from engine.static import Batch, StaticScheduler

END = 9


class StopAt:
    """Words that stop at two tokens in a row."""

    always_banned: list[int] = []
    has_bad, has_stop = False, True

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = list(token_ids)

    def banned(self, prompt_ids: list[int], output_ids: list[int]) -> list[int]:
        return []

    def stops(self, output_ids: list[int]) -> bool:
        return output_ids[-2:] == self.token_ids


def request(
    prompt_len: int = 3, output_len: int = 4, *, bad: list[list[int]] | None = None, **sampling: Any
) -> Request:
    return Request([1] * prompt_len, SamplingParams(output_len, **sampling), (END,), bad_word_ids=bad or [])


def scheduler(*requests: Request, max_batch_size: int = 8) -> StaticScheduler:
    static = StaticScheduler(max_batch_size, max_seq_len=100, end_id=END)
    for one in requests:
        static.check(one)
        static.add(one)
    return static


def result(batch: Batch, *sequences: list[int]) -> list[list[Output]]:
    """What the op gives for these sequences, row by row and beam by beam; ones where they are too few."""
    texts = iter([*sequences, *[[]] * 100])
    return [
        [Output((next(texts) + [1] * batch.num_steps)[: batch.num_steps], cum_log_prob=-0.5) for _ in range(beams)]
        for beams in [batch.beam_width] * len(batch.rows)
    ]


def batches(static: StaticScheduler, requests: list[Request]) -> list[list[int]]:
    """Run to the end: which requests, by number, ran together."""
    seen = []
    while static.has_work:
        batch = static.schedule()
        assert static.schedule() is None  # one batch at a time
        seen.append([i for i, one in enumerate(requests) if one in static._running])
        static.commit(result(batch))
    assert all(one.is_finished for one in requests)
    return seen


def test_a_batch_never_outgrows_the_positions_and_nobody_loses_the_place_in_line() -> None:
    sizes = [(60, 30), (10, 50), (5, 5), (40, 40), (1, 1)]  # (prompt, output)
    requests = [request(prompt, output) for prompt, output in sizes]
    assert batches(scheduler(*requests, max_batch_size=3), requests) == [[0, 2, 3], [1, 4]]
    assert [len(one.output_ids) for one in requests] == [output for _, output in sizes]


def test_one_that_does_not_fit_is_overtaken_only_until_it_is_first() -> None:
    static = scheduler(request(), request(beam_width=2))
    beams = list(static.waiting)[1]
    static.commit(result(static.schedule()))
    for _ in range(5):
        static.add(request())
    batch = static.schedule()
    assert (batch.beam_width, static._running, len(static.waiting)) == (2, [beams], 5)


def test_samples_and_beams_count_as_sequences() -> None:
    requests = [request(n=3, top_k=5), request(), request(n=5, top_k=5), request(n=4, top_k=5)]
    assert batches(scheduler(*requests), requests) == [[0, 1, 3], [2]]
    requests = [request(beam_width=4), request(beam_width=3), request(beam_width=4), request(beam_width=4)]
    assert batches(scheduler(*requests), requests) == [[0, 2], [1], [3]]


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (dict(temperature=0.5, top_k=3), dict(min_length=2, top_p=0.5, random_seed=8), True),
        (dict(output_len=4), dict(output_len=9), True),
        (dict(repetition_penalty=1.5), dict(), True),
        (dict(repetition_penalty=1.5), dict(repetition_penalty=1.2), True),
        (dict(repetition_penalty=1.5), dict(presence_penalty=0.5), False),
        (dict(bad=[[3]]), dict(prompt_len=5), True),
        (dict(bad=[[3, 4]]), dict(bad=[[5, 6, 7]]), True),
        (dict(bad=[[3, 4]]), dict(prompt_len=5, bad=[[3, 4]]), False),
        (dict(beam_width=2), dict(), False),
        (dict(beam_width=2), dict(beam_width=3), False),
        (dict(beam_width=2), dict(beam_width=2, prompt_len=5), True),
        (dict(beam_width=2, temperature=0), dict(beam_width=2, temperature=1.0, random_seed=3), True),
        (dict(beam_width=2), dict(beam_width=2, output_len=5), False),
        (dict(beam_width=2), dict(beam_width=2, temperature=0.5), False),
        (dict(beam_width=2), dict(beam_width=2, repetition_penalty=1.5), False),
        (dict(beam_width=2), dict(beam_width=2, presence_penalty=1.5), False),
        (dict(beam_width=2), dict(beam_width=2, min_length=1), False),
        (dict(beam_width=2), dict(beam_width=2, len_penalty=1.0), False),
        (dict(beam_width=2, len_penalty=1.0), dict(beam_width=2, len_penalty=1.0), True),
        (dict(beam_width=2, len_penalty=1.0), dict(beam_width=2, len_penalty=1.0, prompt_len=5), False),
        (dict(beam_width=2), dict(beam_width=2, beam_search_diversity_rate=0.5), False),
        (dict(beam_width=2), dict(beam_width=2, bad=[[3]]), False),
    ],
)
def test_who_may_share_a_batch(one: dict[str, Any], other: dict[str, Any], together: bool) -> None:
    for pair in ((one, other), (other, one)):
        requests = [request(**options) for options in pair]
        assert batches(scheduler(*requests), requests) == ([[0, 1]] if together else [[0], [1]])


def test_penalties_that_exclude_each_other_leave_the_others_a_place() -> None:
    options: list[dict[str, Any]] = [{}, {"presence_penalty": 1.0}, {"repetition_penalty": 2.0}, {}]
    requests = [request(**one) for one in options]
    assert batches(scheduler(*requests), requests) == [[0, 1, 3], [2]]


def test_samples_are_rows_with_seeds_of_their_own() -> None:
    one, three = request(random_seed=7, top_k=2), request(random_seed=2**64 - 2, top_k=2, n=3, bad=[[5]])
    static = scheduler(one, three)
    batch = static.schedule()
    assert [row.sampling.random_seed for row in batch.rows] == [7, 2**64 - 2, 2**64 - 1, 0]
    assert [row.bad_word_ids for row in batch.rows] == [[], [[5]], [[5]], [[5]]]
    static.commit(result(batch, [2, 3, END, END], [4, 4, 4, 4], [5, END, END, END], [6, 6, 6, END]))
    assert one.output_ids == [2, 3, END]
    assert [output.token_ids for output in three.outputs] == [[4, 4, 4, 4], [5, END], [6, 6, 6, END]]
    assert [output.finish_reason for output in three.outputs] == [LENGTH, END_ID, END_ID]
    assert [output.cum_log_prob for output in [*one.outputs, *three.outputs]] == [-0.5] * 4
    assert three.outputs[0].log_probs == three.outputs[0].alternatives == []


def test_each_text_ends_where_its_request_says() -> None:
    """The op's log-probability covers what the host cuts off: better none than one that is too low."""
    short, long, stopped = request(output_len=2), request(output_len=5), request(output_len=5)
    stopped.words = StopAt(3, 4)
    static = scheduler(short, long, stopped)
    static.commit(result(static.schedule(), [2, 2, 2, 2, 2], [3, 4, 5, 6, 7], [2, 3, 4, 5, 6]))
    assert [one.output_ids for one in (short, long, stopped)] == [[2, 2], [3, 4, 5, 6, 7], [2, 3, 4]]
    assert [one.finish_reason for one in (short, long, stopped)] == [LENGTH, LENGTH, STOP]
    assert [math.isnan(one.outputs[0].cum_log_prob) for one in (short, long, stopped)] == [True, False, True]


def test_each_beam_is_cut_by_itself() -> None:
    beams, others = request(output_len=5, beam_width=3), request(output_len=5, beam_width=3)
    beams.words = StopAt(3, 4)
    static = scheduler(beams, others)
    static.commit(result(static.schedule(), [2, 3, 4, 5, 6], [2, END, END, END, END], [2, 2, 2, 2, 2], [7]))
    assert [output.token_ids for output in beams.outputs] == [[2, 3, 4], [2, END], [2, 2, 2, 2, 2]]
    assert [output.finish_reason for output in beams.outputs] == [STOP, END_ID, LENGTH]
    assert [output.token_ids for output in others.outputs] == [[7, 1, 1, 1, 1]] + [[1] * 5] * 2


def test_cancel() -> None:
    updates: list[str | None] = []
    first, second, waiting = request(n=2, top_k=3), request(), request(beam_width=2)
    first.on_update = lambda r: updates.append(r.finish_reason)
    static = scheduler(first, second, waiting)
    batch = static.schedule()
    static.cancel(first, CANCELLED)
    static.cancel(waiting, CANCELLED)
    assert (updates, first.is_finished, waiting.finish_reason) == ([CANCELLED], True, CANCELLED)
    assert not static.waiting and static.has_work  # the batch is still on its way
    static.commit(result(batch, [2], [3], [4]))
    assert (first.output_ids, second.output_ids, updates) == ([], [4, 1, 1, 1], [CANCELLED])
    static.cancel(second, CANCELLED)
    assert second.finish_reason == LENGTH and not static.has_work


def test_abort_all() -> None:
    requests = [request(), request(beam_width=2)]
    static = scheduler(*requests)
    batch = static.schedule()
    static.abort_all()
    assert [one.finish_reason for one in requests] == [SHUTDOWN] * 2
    static.commit(result(batch))
    assert requests[0].output_ids == [] and not static.has_work


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(frequency_penalty=0.5), "frequency_penalty is 0.5; with the FasterTransformer engine it must be 0"),
        (dict(min_p=0.1), "min_p is 0.1; with the FasterTransformer engine it must be 0"),
        (dict(logit_bias=((3, 1.0),)), "logit_bias is given; the FasterTransformer engine does not have it"),
        (
            dict(openai_penalties=True, presence_penalty=0.5),
            "presence_penalty is 0.5 and counts the output only; with the FasterTransformer engine it must be 0 then",
        ),
        (dict(top_p_decay=0.9), "top_p_decay is 0.9; with the FasterTransformer engine it must be 1"),
        (dict(early_stopping="true"), "early_stopping is true; with the FasterTransformer engine it must be false"),
        (dict(num_log_probs=2), "num_log_probs is 2; with the FasterTransformer engine it must be 0"),
        (
            dict(prompt_log_probs=True),
            "prompt_log_probs is true; with the FasterTransformer engine it must be false",
        ),
        (
            dict(next_token_logits=True),
            "next_token_logits is true; with the FasterTransformer engine it must be false",
        ),
        (dict(top_k=1025), "top_k is 1025; with the FasterTransformer engine it must be at most 1024"),
        (dict(n=9, top_k=2), "n is 9; at most 8 sequences run at once"),
        (dict(beam_width=9), "beam_width is 9; at most 8 sequences run at once"),
        (
            dict(bad=[[5], [3, 0]]),
            "bad_words has a word whose last token is 0, the one that FasterTransformer never bans",
        ),
        (
            dict(output_len=98),
            "max_new_tokens is 98; with the prompt's 3 tokens that is 101, "
            "and the longest sequence served is 100 tokens",
        ),
    ],
)
def test_what_the_op_cannot_do_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        scheduler(request(**options))
    assert str(error.value) == sentence


def test_another_end_is_refused() -> None:
    one = request()
    one.end_ids = ()
    with pytest.raises(ValueError, match="^ignore_eos is true; with the FasterTransformer engine it must be false$"):
        scheduler(one)
    one.end_ids = (4,)
    with pytest.raises(ValueError, match="^end_id is 4; with the FasterTransformer engine it must be the model's, 9$"):
        scheduler(one)


def test_penalties_have_a_longest_sequence() -> None:
    """FasterTransformer keeps 8 bytes per token in a block's 48 KiB of shared memory; its kernel fails beyond."""
    static = StaticScheduler(8, 10_000, END)
    requests = [request(6140, 4, repetition_penalty=1.1), request(6140, 5)]
    for one in requests:
        static.check(one)
        static.add(one)
    assert len(static.schedule().rows) == 1
    with pytest.raises(
        ValueError, match="the longest sequence to which FasterTransformer applies a presence_penalty is 6"
    ):
        static.check(request(6140, 5, presence_penalty=1.0))


def test_what_does_not_tell_is_let_pass() -> None:
    scheduler(
        request(top_k=2000, temperature=0),
        request(openai_penalties=True),
        request(bad=[[0, 5]]),
        request(top_p_min=0.5, top_p_reset_id=3),
    )
