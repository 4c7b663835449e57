"""The log of requests: a line for each at its end, refused ones with a reason, no prompt and no output unless asked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from engine.request import CANCELLED, EngineBusy, EngineStopping, Request, SamplingParams, Times
from serving.flags import LogFlags
from serving.generation import Generator
from serving.metrics import REFUSALS, ServerMetrics
from serving.request import Chat, GenerationRequest
from serving.request_log import RequestLog
from tests.support.counting_engine import CountingEngine, letter_encoder


class TimedEngine(CountingEngine):
    """Requests wait for a quarter of a second, and get their first token a quarter later."""

    def submit(self, *requests: Request) -> None:
        for index, request in enumerate(requests):
            request.times = Times(scheduled=self.now + 0.25 + index, first_token=self.now + 0.5 + index)
        super().submit(*requests)

    now = 0.0


class Refusing(CountingEngine):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def submit(self, *requests: Request) -> None:
        raise self.error


class Setup:
    """A generator with its log and metrics."""

    def __init__(self, engine: CountingEngine, caplog: pytest.LogCaptureFixture, log_prompts: bool = False) -> None:
        caplog.set_level("INFO", "requests")
        self.caplog = caplog
        self.metrics = ServerMetrics("m", 300)
        log = RequestLog(LogFlags(log_prompts=log_prompts), self.metrics)
        self.generator = Generator(engine, letter_encoder(), log)

    def run(self, *requests: GenerationRequest, leave: bool = False, **options: str) -> str:
        """Run to the end, or leave at once; returns the run's log_id."""

        async def go() -> str:
            async with self.generator.run(requests, **options) as run:
                if not leave:
                    await run.wait()
                return run.log_id

        return asyncio.run(go())

    @property
    def line(self) -> tuple[str, dict[str, Any]]:
        (record,) = self.caplog.records
        return record.getMessage(), record.fields

    def refusals(self) -> dict[str, int]:
        text = self.metrics.exposition("")[0].decode()
        found = re.findall(r'refused_requests_total{front_end="openai".*reason="(\w+)"} (\d+)', text)
        return {reason: int(count) for reason, count in found}


def ask(prompt: Any, output_len: int = 4, *, sampling: dict[str, Any] | None = None, **options: Any) -> Any:
    return GenerationRequest(prompt, SamplingParams(output_len, **sampling or {}), **options)


def test_a_line_has_the_sums_over_all_prompts(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    engine = TimedEngine()
    engine.now = 1000.0
    setup = Setup(engine, caplog)
    setup.run(ask("abc"), ask("bcdef", 9, sampling={"n": 2, "top_k": 2}), front_end="openai", log_id="mine")
    message, fields = setup.line
    assert message == "request"
    assert fields == {
        "id": "mine",
        "front_end": "openai",
        "prompts": 2,
        "prompt_tokens": 3 + 5,
        "output_tokens": 4 + 2 * 2,  # a prompt that begins with b ends with its second token
        "queue_s": 0.25,
        "first_token_s": 0.5,
        "total_s": 0.0,
        "finish_reasons": ["length", "end_id"],
    }


def test_a_client_that_leaves_is_logged_as_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(CountingEngine(0.01), caplog)
    setup.run(ask("ab", 200), leave=True)
    _, fields = setup.line
    assert (fields["finish_reasons"], fields["queue_s"], fields["first_token_s"]) == ([CANCELLED], None, None)
    assert 0 <= fields["total_s"] < 5


@pytest.mark.parametrize(
    ("request_ids", "log_id", "expected"),
    [([None], "client's", "client's"), ([None, "x"], "", "x"), (["x"], "y", "y"), ([None], "", "[0-9a-f]{32}")],
)
def test_the_id_is_the_clients_or_a_new_one(
    request_ids: list[str | None], log_id: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    setup = Setup(CountingEngine(), caplog)
    found = setup.run(*(ask("ab", request_id=request_id) for request_id in request_ids), log_id=log_id)
    assert re.fullmatch(expected, found)
    assert setup.line[1]["id"] == found
    assert setup.line[1]["front_end"] == "triton"


@pytest.mark.parametrize(
    ("make", "request_", "reason", "sentence"),
    [
        (CountingEngine, ask([77]), "invalid", "prompt_ids[0] has token 77; the vocabulary has 10 tokens"),
        (lambda: Refusing(EngineBusy("8 wait")), ask("ab"), "busy", "8 wait"),
        (lambda: Refusing(EngineStopping("the server\nstops")), ask("ab"), "stopping", "the server stops"),
        (lambda: Refusing(RuntimeError("broke at prompt ab")), ask("ab"), "error", "RuntimeError"),
    ],
    ids=REFUSALS,
)
def test_a_refused_request_has_a_line_and_is_counted(
    make: Callable[[], CountingEngine],
    request_: GenerationRequest,
    reason: str,
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup = Setup(make(), caplog)
    with pytest.raises(Exception):  # noqa: B017
        setup.run(request_, front_end="openai", log_id="mine")
    expected = {"id": "mine", "front_end": "openai", "reason": reason, "error": sentence}
    assert setup.line == ("refused", expected)
    assert setup.refusals() == dict.fromkeys(REFUSALS, 0) | {reason: 1}


def test_prompts_and_outputs_are_logged_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    requests = [ask("cdefgh", 6), ask(b"cdefg", 6), ask([2, 3, 4], 6)]
    setup = Setup(CountingEngine(), caplog)
    setup.run(*requests)
    assert "cdef" not in str(setup.line) and "abcdef" not in str(setup.line)
    caplog.clear()
    setup = Setup(CountingEngine(), caplog, log_prompts=True)
    setup.run(*requests)
    fields = setup.line[1]
    assert fields["prompt_texts"] == ["cdefgh", "cdefg", [2, 3, 4]]
    assert fields["output_texts"] == [["abcdef"]] * 3


def test_a_chat_is_logged_as_its_messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = '[{"role": "user", "content": "cdefgh"}]'
    setup = Setup(CountingEngine(), caplog, log_prompts=True)
    template = setup.generator.encoder.chat_template
    monkeypatch.setattr(template, "render", lambda messages, **options: messages[0]["content"])
    setup.run(ask(Chat(chat), 6))
    fields = setup.line[1]
    assert (fields["prompt_texts"], fields["output_texts"]) == ([chat], [["abcdef"]])


def test_a_long_id_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(CountingEngine(), caplog)
    setup.run(ask("ab"), log_id="x" * 1000)
    assert setup.line[1]["id"] == "x" * 128


class HttpError(Exception):
    """A front end's own error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("status", "reason"), [(400, "invalid"), (413, "invalid"), (429, "busy"), (503, "stopping"), (500, "error")]
)
def test_what_is_refused_before_it_runs_is_reported(status: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(CountingEngine(), caplog)
    with pytest.raises(HttpError), setup.generator.reporting("openai", "mine"):
        raise HttpError(status)
    assert setup.line[1]["reason"] == reason
    assert setup.refusals() == dict.fromkeys(REFUSALS, 0) | {reason: 1}


def test_a_client_that_went_away_is_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(CountingEngine(), caplog)
    with pytest.raises(ConnectionError), setup.generator.reporting("openai", "mine"):
        raise ConnectionResetError
    assert not caplog.records
