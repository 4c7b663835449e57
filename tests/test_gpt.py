"""The callables, without Triton or a model: arrays in, arrays out, one sentence for what is wrong."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytriton.proxy.types import Request as TritonRequest

from engine.request import CANCELLED, SHUTDOWN, EngineBusy, Output, ParameterError, Request
from gpt import OUTPUTS, GPTModel
from serving.generation import Generator
from serving.triton import inputs
from serving.triton.errors import BadRequest, InternalError, ServerBusy
from tests.support.counting_engine import END, LETTERS, CountingEngine, letter_encoder


def model(engine: Any = None) -> GPTModel:
    return GPTModel(Generator(engine or CountingEngine(), letter_encoder()))


def infer(arrays: dict[str, Any], engine: Any = None) -> dict[str, np.ndarray]:
    return asyncio.run(model(engine).infer([arrays]))[0]


def stream(arrays: dict[str, Any], engine: Any = None) -> list[dict[str, np.ndarray]]:
    async def collect() -> list[dict[str, np.ndarray]]:
        return [answer async for (answer,) in model(engine).stream([arrays])]

    return asyncio.run(collect())


def column(values: list[Any], dtype: Any) -> np.ndarray:
    return np.array(values, dtype=dtype)[:, None]


def good(**more: Any) -> dict[str, np.ndarray]:
    return {"prompts": column([b"ab", b"bcde"], object), "request_output_len": column([4, 6], np.uint32), **more}


def one(prompt: bytes = b"ab", output_len: int = 4, **more: Any) -> dict[str, np.ndarray]:
    """A request of the streaming model."""
    return {"prompts": np.array([prompt], object), "request_output_len": np.array([output_len], np.uint32), **more}


def test_rows_keep_their_own_length_and_shapes_are_tritons() -> None:
    answer = infer(good())
    assert answer["sentences"].tolist() == [[[b"ababcd"]], [[b"bcdea"]]]  # end_id is no text …
    assert answer["sequence_length"].tolist() == [[6], [6]]  # … but a token
    assert answer["output_ids"].tolist() == [[[0, 1, 0, 1, 2, 3]], [[1, 2, 3, 4, 0, END]]]
    assert answer["finish_reason"].tolist() == [[[b"length"]], [[b"end_id"]]]
    assert answer["cum_log_probs"].tolist() == [[-2.0], [-1.0]]
    assert set(answer) == {"sentences", "sequence_length", "output_ids", "finish_reason", "cum_log_probs"}
    assert (answer["output_ids"].dtype, answer["sequence_length"].dtype) == (np.int32, np.int64)


def test_short_rows_are_padded_with_end_id() -> None:
    answer = infer(good(request_output_len=column([1, 2], np.uint32)))
    assert answer["output_ids"].tolist() == [[[0, 1, 0, END, END, END]], [[1, 2, 3, 4, 0, END]]]


def test_rows_of_other_widths_are_padded() -> None:
    answer = infer(
        good(
            n=column([1, 3], np.uint32),
            runtime_top_k=column([0, 3], np.uint32),
            is_return_log_probs=column([False, True], bool),
            num_log_probs=column([2, 0], np.uint32),
        )
    )
    assert answer["sentences"].tolist() == [[[b"ababcd"], [b""], [b""]], [[b"bcdea"]] * 3]
    assert answer["sequence_length"].tolist() == [[6, 0, 0], [6, 6, 6]]
    assert answer["finish_reason"].tolist() == [[[b"length"], [b""], [b""]], [[b"end_id"]] * 3]
    assert answer["output_log_probs"].tolist() == [[[0, 0]] * 3, [[-0.5, -0.5]] * 3]
    assert answer["top_token_ids"].shape == (2, 1, 4, 2)
    assert answer["top_token_ids"][0].tolist() == [[[0, 8], [1, 8], [2, 8], [3, 8]]]
    assert answer["top_log_probs"][0, 0, 0].tolist() == [-0.5, -2.0]


@pytest.mark.parametrize("kind", ["infer", "stream", "stop"])
def test_every_string_ends_in_a_dimension_of_1(kind: str) -> None:
    """FasterTransformer's example client prints each output after this squeeze of the strings, with any beam_width."""
    if kind == "infer":
        answer, shape = infer(good(beam_width=column([2, 2], np.uint32))), (2, 2)
    elif kind == "stream":
        (answer,), shape = stream(one(beam_width=np.array([2], np.uint32))), (2,)
    else:
        gpt = model()
        gpt.generator.stop = lambda request_ids: None
        stop = {"stop": column([True, True], bool), "request_id": column([b"x", b"y"], object)}
        (answer,), shape = asyncio.run(gpt.infer([stop])), (2, 1)
    strings = {name: np.squeeze(array, axis=-1) for name, array in answer.items() if array.dtype == object}
    assert {name: array.shape for name, array in strings.items()} == {"sentences": shape, "finish_reason": shape}
    ranks = {tensor.name: len(tensor.shape) for tensor in OUTPUTS if tensor.dtype == bytes}
    assert ranks == {"sentences": 2, "finish_reason": 2}


def test_parameters_reach_their_own_request() -> None:
    engine = CountingEngine()
    infer(
        good(
            runtime_top_k=column([0, 3], np.uint32),
            runtime_top_p=column([0.5, 0], np.float32),
            temperature=column([2, 0.25], np.float32),
            random_seed=column([1, 2**64 - 1], np.uint64),
            end_id=column([3, 4], np.uint32),
            ignore_eos=column([False, True], bool),
        ),
        engine,
    )
    chosen = [(r.sampling.top_k, r.sampling.top_p, r.sampling.temperature, r.sampling.random_seed) for r in engine.seen]
    assert chosen == [(0, 0.5, 2.0, 1), (3, 0.0, 0.25, 2**64 - 1)]
    assert [r.end_ids for r in engine.seen] == [(3,), ()]


def test_each_row_ends_at_any_of_its_end_ids() -> None:
    """Rows are equally long, so the second one repeats its only token."""
    engine = CountingEngine()
    lengths = column([1, 2], np.uint32)
    answer = infer(good(end_id=np.array([[3, 1], [4, 4]], np.uint32), request_output_len=lengths), engine)
    assert [r.end_ids for r in engine.seen] == [(3, 1), (4,)]
    assert answer["output_ids"][0].tolist() == [[0, 1, 0, 3, 3, 3]]  # padded with the first of them
    engine = CountingEngine()
    stream(one(end_id=np.array([7, 2, 7], np.uint32)), engine)
    assert [r.end_ids for r in engine.seen] == [(7, 2)]


@pytest.mark.parametrize(("count", "shown"), [(0, "0"), (257, "257")])
def test_the_number_of_end_ids_is_limited(count: int, shown: str) -> None:
    with pytest.raises(BadRequest) as caught:
        infer(good(end_id=np.ones((2, count), np.uint32)))
    assert str(caught.value) == f"end_id[0] has {shown} tokens; it must have between 1 and 256"


def test_input_ids_take_the_place_of_prompts() -> None:
    ids = np.array([[0, 1, 5], [1, 2, 3]], np.int32)
    arrays = {"input_ids": ids, "request_output_len": column([2, 2], np.uint32)}
    assert infer(arrays)["sentences"].tolist() == [[[b"abfab"]], [[b"bcda"]]]
    arrays["input_lengths"] = column([2, 3], np.uint32)
    assert infer(arrays)["sentences"].tolist() == [[[b"abab"]], [[b"bcda"]]]


def test_start_id_stands_in_for_an_empty_prompt() -> None:
    arrays = {"prompts": column([b""], object), "request_output_len": column([2], np.uint32)}
    assert infer({**arrays, "start_id": column([4], np.uint32)})["sentences"].tolist() == [[[b"eab"]]]


def test_stop_words_end_the_text_and_are_cut_from_it() -> None:
    stop_words = np.array([[b"bc", b""], [b"", b""]], object)
    answer = infer(good(stop_words=stop_words))
    assert answer["sentences"].tolist() == [[[b"aba"]], [[b"bcdea"]]]
    assert answer["finish_reason"].tolist() == [[[b"stop"]], [[b"end_id"]]]
    assert answer["output_ids"][0].tolist() == [[0, 1, 0, 1, 2, END]]  # the tokens stay
    keep = column([True, False], bool)
    answer = infer(good(stop_words=stop_words, include_stop_words_in_output=keep))
    assert answer["sentences"][0].tolist() == [[b"ababc"]]


def test_exclude_input_leaves_the_generated_text() -> None:
    answer = infer(good(exclude_input_in_output=column([True, False], bool)))
    assert answer["sentences"].tolist() == [[[b"abcd"]], [[b"bcdea"]]]
    assert answer["sequence_length"].tolist() == [[6], [6]]


@pytest.mark.parametrize("options", [{}, {"stop_words": np.array([b"de"], object)}, {"ignore_eos": np.array([True])}])
@pytest.mark.parametrize("prompt", [b"ab", b"ba"])
def test_pieces_joined_are_the_whole_text(prompt: bytes, options: dict[str, np.ndarray]) -> None:
    whole = infer({name: array[None] for name, array in one(prompt, 7, **options).items()})
    answers = stream(one(prompt, 7, **options), CountingEngine(delay_s=0.005))
    assert len(answers) > 1
    assert b"".join(answer["sentences"][0, 0] for answer in answers) == whole["sentences"][0, 0, 0]
    ids = [token_id for answer in answers for token_id in answer["output_ids"][0].tolist()]
    assert [LETTERS.index(letter) for letter in prompt.decode()] + ids == whole["output_ids"][0, 0].tolist()
    for name in ("sequence_length", "finish_reason", "cum_log_probs"):
        assert answers[-1][name].tolist() == whole[name][0].tolist()
        assert not any(name in answer for answer in answers[:-1])


def test_samples_and_beams_stream_as_one_answer() -> None:
    (answer,) = stream(one(beam_width=np.array([2], np.uint32)))
    assert answer["sentences"].tolist() == [[b"ababcd"], [b"ababcd"]]
    assert answer["output_ids"].shape == (2, 6)


def test_where_there_is_a_key_a_stop_needs_it() -> None:
    stop = {"stop": column([True], bool), "request_id": column([b"x"], object)}

    def ask(parameters: dict[str, Any] | None, kind: str) -> str:
        gpt = GPTModel(Generator(CountingEngine(), letter_encoder()), api_key="secret")
        data = stop if kind == "infer" else {name: array[0] for name, array in stop.items()}

        async def go() -> None:
            request = TritonRequest(data, parameters)
            answers = await gpt.infer([request]) if kind == "infer" else [a async for a in gpt.stream([request])]
            raise AssertionError(answers)

        with pytest.raises(BadRequest) as error:
            asyncio.run(go())
        return str(error.value)

    for kind in ("infer", "stream"):
        for wrong in (None, {}, {"api_key": ""}, {"api_key": "Secret"}, {"api_key": 5}, {"api_key": "é"}):
            assert "this server takes it only with the right api_key" in ask(wrong, kind)
        assert ask({"api_key": "secret"}, kind) == "request_id 'x' is not running"


def test_a_stop_with_the_id_ends_the_request_with_what_it_has() -> None:
    engine = CountingEngine(delay_s=0.01)
    gpt = model(engine)

    async def go() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        arrays = {name: array[None] for name, array in one(b"ab", 200).items()}
        running = asyncio.create_task(gpt.infer([{**arrays, "request_id": column([b"x"], object)}]))
        await asyncio.sleep(0.1)
        with pytest.raises(BadRequest, match="^request_id 'x' is running already; it must be unique$"):
            await gpt.infer([{**arrays, "request_id": column([b"x"], object)}])
        stop = {"stop": column([True], bool), "request_id": column([b"x"], object)}
        (stopped,) = await gpt.infer([stop])
        (answer,) = await running
        with pytest.raises(BadRequest, match="^request_id 'x' is not running$"):
            await gpt.infer([stop])
        return stopped, answer

    stopped, answer = asyncio.run(go())
    assert stopped["finish_reason"].tolist() == [[[CANCELLED.encode()]]]
    assert answer["finish_reason"].tolist() == [[[CANCELLED.encode()]]]
    assert answer["sentences"][0, 0, 0].startswith(b"abab")


def test_the_deadline_ends_a_request_with_what_it_has() -> None:
    arrays = one(b"ab", 200, deadline_s=np.array([0.1], np.float32))
    answers = stream(arrays, CountingEngine(delay_s=0.01))
    assert answers[-1]["finish_reason"].tolist() == [[b"cancelled"]]
    assert 1 < len(answers) < 30


@pytest.mark.parametrize("kind", ["infer", "stream"])
def test_a_client_that_goes_away_cancels_its_request(kind: str) -> None:
    engine = CountingEngine(delay_s=0.01)

    async def go() -> None:
        if kind == "infer":
            task = asyncio.create_task(model(engine).infer([good()]))
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            answers = model(engine).stream([one(b"ab", 200)])
            await anext(answers)
            await answers.aclose()

    asyncio.run(go())
    assert engine.cancelled == engine.seen


def test_nothing_runs_where_one_row_is_wrong() -> None:
    engine = CountingEngine()
    with pytest.raises(BadRequest, match=r"^request_output_len is 0; it must be at least 1$"):
        infer(good(request_output_len=column([4, 0], np.uint32)), engine)
    assert not engine.seen


def test_words_are_counted_before_a_row_is_parsed() -> None:
    """Empty ones are no words: they make rows equally long."""
    rows = 1024
    arrays = {"prompts": column([b"ab"] * rows, object), "request_output_len": column([4] * rows, np.uint32)}
    sparse = np.full((rows, 256), b"", dtype=object)
    sparse[:, :16] = b"ab"
    assert len(inputs.Rows({**arrays, "stop_words": sparse})) == rows
    for word in (b"ab", b"\xff"):
        dense = np.full((rows, 256), word, dtype=object)
        seconds = []
        for _ in range(3):  # a busy machine's caches make one of them slow
            started = time.process_time()
            with pytest.raises(ParameterError) as error:
                inputs.Rows({**arrays, "stop_words": sparse, "bad_words": dense})
            seconds.append(time.process_time() - started)
            assert str(error.value) == "stop_words and bad_words are 278528 words in all; at most 16384 are taken"
        assert min(seconds) < 0.05


def test_what_pytriton_would_send_of_an_error_is_the_sentence() -> None:
    """PyTriton formats exceptions with traceback.format_exception and sends the text to the client."""
    for kind in (BadRequest, ServerBusy, InternalError):
        try:
            raise kind("the sentence")
        except kind as error:
            text = "".join(traceback.format_exception(None, error, error.__traceback__))
        assert text == f"{kind.__name__}: the sentence\n"


class FailingEngine(CountingEngine):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def submit(self, *requests: Request) -> None:
        raise self.error


@pytest.mark.parametrize("ask", [lambda engine: infer(good(), engine), lambda engine: stream(one(), engine)])
def test_a_defect_is_one_sentence_too(caplog: pytest.LogCaptureFixture, ask: Callable[[Any], Any]) -> None:
    with pytest.raises(InternalError, match="^internal error: 'slot'$"):
        ask(FailingEngine(KeyError("slot")))
    assert "Traceback" in caplog.text  # the log has it all


@pytest.mark.parametrize("ask", [lambda engine: infer(good(), engine), lambda engine: stream(one(), engine)])
def test_a_full_queue_is_busy_and_not_the_users_fault(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(ServerBusy, match="^3 requests wait$"):
        ask(FailingEngine(EngineBusy("3 requests wait")))


def test_a_request_that_the_shutdown_ended_may_be_sent_again() -> None:
    class Ending(CountingEngine):
        def submit(self, *requests: Request) -> None:
            for request in requests:
                request.end(SHUTDOWN)

    with pytest.raises(ServerBusy, match="^the server stopped before the request was finished$"):
        infer(good(), Ending())


def test_an_answer_of_which_one_sample_is_cut_short_by_the_shutdown_is_none() -> None:
    class Ending(CountingEngine):
        def submit(self, *requests: Request) -> None:
            for request in requests:
                request.outputs[0].finish_reason = "end_id"
                request.end(SHUTDOWN)

    with pytest.raises(ServerBusy, match="^the server stopped"):
        infer(good(n=column([2, 2], np.uint32), runtime_top_k=column([3, 3], np.uint32)), Ending())


def test_what_the_engine_refused_is_not_cancelled() -> None:
    """The engine had never heard of such a request, and ended the whole job over the word to cancel it."""
    engine = FailingEngine(ValueError("too long"))
    gpt = model(engine)
    for _ in range(2):  # nor is its id taken
        with pytest.raises(BadRequest, match="^too long$"):
            asyncio.run(gpt.infer([good(request_id=column([b"a", b"b"], object))]))
    assert not engine.cancelled


def test_sums_that_are_not_known_are_left_out() -> None:
    """As NaN they would make the answer's JSON unreadable."""

    class Unknowing(CountingEngine):
        def _append(self, request: Request, output: Output) -> None:
            output.cum_log_prob = float("nan")  # and so it stays, whatever is added
            super()._append(request, output)

    assert "cum_log_probs" not in infer(good(), Unknowing())
    assert "cum_log_probs" not in stream(one(), Unknowing())[-1]
