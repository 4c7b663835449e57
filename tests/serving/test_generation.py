"""The generation layer alone: updates of samples and beams, several prompts at once, cancelling, coalesced wake-ups."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from engine.request import (
    CANCELLED,
    END_ID,
    LENGTH,
    SHUTDOWN,
    STOP,
    EngineBusy,
    ParameterError,
    Request,
    SamplingParams,
)
from serving.generation import Generator, LoopNotifier, Update
from serving.request import GenerationRequest
from tests.support.counting_engine import CountingEngine, letter_encoder


def ask(prompt: Any = "ab", output_len: int = 4, *, sampling: dict[str, Any] | None = None, **options: Any) -> Any:
    return GenerationRequest(prompt, SamplingParams(output_len, **sampling or {}), **options)


def updates(*requests: GenerationRequest, engine: Any = None, prompts: Any = None) -> list[Update]:
    async def collect() -> list[Update]:
        async with Generator(engine or CountingEngine(0.002), letter_encoder()).run(prompts or requests) as run:
            return [update async for update in run.updates()]

    return asyncio.run(collect())


def of(found: list[Update], prompt: str, index: int) -> list[Update]:
    """The updates of one output."""
    return [u for u in found if u.generation.request.prompt == prompt and u.index == index]


def tokens(found: list[Update]) -> list[int]:
    return [token_id for update in found for token_id in update.output.token_ids[update.new]]


def test_samples_of_several_prompts_come_piece_by_piece() -> None:
    sampling = {"n": 2, "top_k": 3}
    found = updates(ask("ab", 5, sampling=sampling), ask("bc", 5), ask("a", 3, with_prompt=True))
    for index in range(2):
        pieces = of(found, "ab", index)
        assert ("".join(u.text for u in pieces), tokens(pieces)) == ("abcde", [0, 1, 2, 3, 4])
        assert [u.finish_reason for u in pieces] == [None] * (len(pieces) - 1) + [LENGTH]
        assert len(pieces) > 1
        assert [value for u in pieces for value in u.output.log_probs[u.new]] == [-0.5] * 5
    pieces = of(found, "bc", 0)
    assert ("".join(u.text for u in pieces), tokens(pieces), pieces[-1].finish_reason) == ("a", [0, 9], END_ID)
    assert "".join(u.text for u in of(found, "a", 0)) == "aabc"
    assert of(found, "bc", 1) == []


def test_beams_come_whole_at_their_end() -> None:
    found = updates(ask("ab", 5, sampling={"beam_width": 3}))
    assert [(u.index, u.text, u.new, u.finish_reason) for u in found] == [
        (index, "abcde", slice(0, 5), LENGTH) for index in range(3)
    ]


def test_tokens_without_final_text_come_with_the_next_piece() -> None:
    """A text that may begin a stop word is held back, and with this tokenizer the text of the last token."""

    class Manual(CountingEngine):
        def submit(self, *requests: Request) -> None:
            self.seen += requests

        def give(self, *token_ids: int) -> None:
            for token_id in token_ids:
                self.seen[0].outputs[0].append(token_id, 0.0)
                self.seen[0].on_update(self.seen[0])

    async def go() -> None:
        engine = Manual()
        async with Generator(engine, letter_encoder()).run([ask("ab", 9, stop_words=["bcx"])]) as run:
            pieces = run.updates()
            engine.give(0, 1)
            first = await anext(pieces)
            assert (first.text, first.new) == ("a", slice(0, 2))
            second = asyncio.ensure_future(anext(pieces))
            engine.give(2, 3)
            await asyncio.sleep(0.02)
            assert not second.done()
            engine.give(4)
            assert ((await second).text, (await second).new) == ("bcd", slice(2, 5))

    asyncio.run(go())
    stopped = updates(ask("ab", 5, stop_words=["bc"]))
    assert "".join(u.text for u in stopped) == "a"
    assert (tokens(stopped), stopped[-1].finish_reason) == ([0, 1, 2], STOP)


def test_tokens_that_come_meanwhile_come_in_one_update() -> None:
    async def go() -> list[slice]:
        async with Generator(CountingEngine(), letter_encoder()).run([ask("ab", 200)]) as run:
            found = []
            async for update in run.updates():
                found.append(update.new)
                await asyncio.sleep(0.2)
            return found

    parts = asyncio.run(go())
    assert len(parts) < 10
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 200


def test_waiting_gives_whole_texts() -> None:
    async def go() -> list[list[str]]:
        requests = [
            ask("ab"),
            ask("bcd", sampling={"n": 2, "top_k": 2}, with_prompt=True),
            ask([1, 2], ignore_eos=True),
        ]
        async with Generator(CountingEngine(), letter_encoder()).run(requests) as run:
            await run.wait()
            return [generation.texts() for generation in run.generations]

    assert asyncio.run(go()) == [["abcd"], ["bcda", "bcda"], ["ajcd"]]


def test_without_room_nothing_is_parsed() -> None:
    class Full(CountingEngine):
        def check_room(self, num_requests: int) -> None:
            raise EngineBusy(f"no room for {num_requests}")

    class Unread(list):
        def __iter__(self) -> Any:
            raise AssertionError("a prompt is read")

    with pytest.raises(EngineBusy, match="^no room for 2$"):
        updates(engine=Full(), prompts=Unread([ask(), ask()]))


@pytest.mark.parametrize("how", ["break", "error", "cancel"])
def test_leaving_cancels_what_runs(how: str) -> None:
    engine = CountingEngine(0.01)

    async def go() -> None:
        async with Generator(engine, letter_encoder()).run([ask("ab", 1), ask("ab", 200)]) as run:
            async for update in run.updates():
                if update.generation is run.generations[0]:
                    continue
                if how == "error":
                    raise KeyError("of the front end")
                if how == "cancel":
                    asyncio.current_task().cancel()
                else:
                    break

    raised = {"error": KeyError, "cancel": asyncio.CancelledError}.get(how)
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        asyncio.run(go())
    assert engine.cancelled == engine.seen[1:]  # the other one had ended


def test_a_finished_run_cancels_nothing() -> None:
    engine = CountingEngine()
    updates(ask("ab"), ask("bc"), engine=engine)
    assert engine.cancelled == []


def test_ids_are_known_while_their_requests_run() -> None:
    engine = CountingEngine(0.01)
    generator = Generator(engine, letter_encoder())

    async def go() -> list[str | None]:
        async with generator.run([ask("ab", 250, request_id="x"), ask("ab", 250, request_id="y")]) as run:
            with pytest.raises(ParameterError, match="^request_id 'z' is not running$"):
                generator.stop(["x", "z"])  # all or none
            with pytest.raises(ParameterError, match="^request_id 'y' is running already; it must be unique$"):
                async with generator.run([ask("ab", request_id="y")]):
                    pass
            generator.stop(["x", "y"])
            await run.wait()
            reasons = [generation.outputs[0].finish_reason for generation in run.generations]
        with pytest.raises(ParameterError, match="^request_id 'x' is not running$"):
            generator.stop(["x"])
        return reasons

    assert asyncio.run(go()) == [CANCELLED, CANCELLED]
    assert len(engine.seen) == 2


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    found = updates(ask("ab", 250, deadline_s=0.1), ask("bcd", 3), engine=CountingEngine(0.01))
    assert of(found, "ab", 0)[-1].finish_reason == CANCELLED
    assert 1 <= len(tokens(of(found, "ab", 0))) < 100
    assert of(found, "bcd", 0)[-1].finish_reason == END_ID


def test_a_shutdown_is_an_exception() -> None:
    class Ending(CountingEngine):
        def _append(self, request: Request, output: Any) -> None:
            super()._append(request, output)
            if len(output.token_ids) == 3:
                request.end(SHUTDOWN)

    with pytest.raises(EngineBusy, match="^the server stopped before the request was finished$"):
        updates(ask("ab", 250), engine=Ending(0.002))


def test_an_engine_without_log_probs_refuses_them() -> None:
    engine = CountingEngine()
    engine.has_token_log_probs = False
    with pytest.raises(ParameterError) as error:
        updates(ask("ab", with_log_probs=True), engine=engine)
    assert str(error.value) == "with_log_probs is set; the FasterTransformer engine has cum_log_probs only"
    assert not engine.seen


def test_wake_ups_are_coalesced() -> None:
    async def go() -> tuple[int, list[bool]]:
        loop = asyncio.get_running_loop()
        calls = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: calls.append(args) or original(*args)
        notifier = LoopNotifier(loop)
        events = [asyncio.Event() for _ in range(50)]
        thread = threading.Thread(target=lambda: [notifier.notify(event) for event in events])
        thread.start()
        thread.join()  # the loop does not look meanwhile
        num_calls = len(calls)
        await asyncio.wait_for(events[-1].wait(), 5)
        notifier.notify(events[0])
        assert len(calls) == num_calls + 1  # and it is scheduled again afterwards
        return num_calls, [event.is_set() for event in events]

    assert asyncio.run(go()) == (1, [True] * 50)


def test_a_closed_loop_is_left_alone() -> None:
    loop = asyncio.new_event_loop()
    notifier = LoopNotifier(loop)
    loop.close()
    notifier.notify(asyncio.Event())
