"""cli/transport.py: tries, timeouts, errors and streams, against a stand-in for the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import numpy as np
import pytest

from cli import transport
from client import parse_flags
from tests.support.launch import wait_for
from tests.support.standin_server import StandinServer, standin


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandinServer]:
    monkeypatch.setattr(transport, "_FIRST_PAUSE_S", 0.02)
    with standin() as it:
        yield it


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("trouble", ["busy", "reset"])
def test_busy_and_broken_connections_are_tried_again(
    server: StandinServer, kind: str, stream: list[str], trouble: str
) -> None:
    code, out, _ = server.ask("--prompts", f"{trouble} 3", "--output-len", "1", *stream, kind=kind)
    assert (code, out.splitlines()[1]) == (0, f"{trouble} 3 w0")
    assert server.model.tries == {f"{trouble} 3": 4}
    first, second, third = np.diff(server.model.times)
    assert 0.01 <= first and 0.02 <= second and 0.04 <= third  # half of the pause, or more, is by chance


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_refusals_and_defects_are_not(server: StandinServer, kind: str, stream: list[str]) -> None:
    code, out, err = server.ask("--prompts", "bad", "good", "broken", "--output-len", "1", *stream, kind=kind)
    assert (code, out.splitlines()[1]) == (1, "good w0")
    assert err.splitlines() == [
        "client.py: prompt 1: prompts[0] is bad",
        "client.py: prompt 3: internal error: it broke",
    ]
    assert server.model.tries == {"bad": 1, "good": 1, "broken": 1}


def test_retries_end(server: StandinServer) -> None:
    expected = (1, "", "client.py: the queue is full\n")
    assert server.ask("--prompts", "busy 9", "--retries", "2") == expected
    assert server.model.tries == {"busy 9": 3}


def test_a_stranger_behind_the_url_is_named(server: StandinServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_json(*args: object) -> dict:
        return json.loads("<html>")

    monkeypatch.setattr(transport, "_arrays", no_json)
    code, _, err = server.ask("--prompts", "a", "--stream")
    sentence = "the answer cannot be read (JSONDecodeError: Expecting value: line 1 column 1 (char 0))"
    assert (code, err) == (1, f"client.py: {sentence}\n")


def test_a_server_that_went_away_is_not_waited_for_with_every_prompt(server: StandinServer) -> None:
    prompts = ["reset 8", "reset 9", "reset 1", "reset 10"]
    code, _, err = server.ask("--prompts", *prompts, "--retries", "2", "--concurrency", "1")
    assert (code, len(err.splitlines())) == (1, 4)
    assert f"the connection to {server.url()} broke (ServerDisconnectedError" in err
    assert server.model.tries == {"reset 8": 3, "reset 9": 1, "reset 1": 1, "reset 10": 1}


def test_each_try_has_a_request_id_of_its_own(server: StandinServer) -> None:
    assert server.ask("--prompts", *"abcde")[0] == 0
    assert len({inputs["request_id"].item() for inputs in server.model.asked}) == 5


def test_a_timeout_cancels_the_request(server: StandinServer) -> None:
    server.model.token_s = 0.1
    for stream in ([], ["--stream"]):
        code, _, err = server.ask("--prompts", "a", "--output-len", "1000", "--inference-timeout-s", "0.35", *stream)
        assert (code, err) == (1, "client.py: no answer within 0.35 s\n")
    wait_for(lambda: not server.model.running)
    assert len(server.model.stopped) == 2
    assert server.model.keys == []


def test_stops_carry_the_key_and_other_requests_do_not(server: StandinServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.model.token_s = 0.1
    command = ["--prompts", "a", "--output-len", "1000", "--inference-timeout-s", "0.35"]
    assert server.ask(*command, "--api-key", "of the flag")[0] == 1
    monkeypatch.setenv("SERVER_API_KEY", "of the environment\n")
    assert server.ask(*command)[0] == 1
    wait_for(lambda: not server.model.running)
    assert server.model.keys == ["of the flag", "of the environment"]


def test_a_model_that_comes_late_is_waited_for() -> None:
    flags = parse_flags(["--prompts", "a"])

    class Late:
        calls = 0
        broken = (OSError,)
        url = "x"

        @property
        def client(self) -> Late:
            return self

        async def is_model_ready(self, model: str) -> bool:
            self.calls += 1
            if self.calls == 1:
                raise ConnectionRefusedError
            return self.calls == 3

    late = Late()
    assert asyncio.run(transport.Transport(late, flags).is_ready()) and late.calls == 3


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_wrong_model_name_is_told_where_the_server_is_ready(
    server: StandinServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(transport, "_LOADING_S", 0.3)
    flags = ["--prompts", "a", "--model-name", "wrong", "--init-timeout-s", "1.5"]
    code, _, stderr = server.ask(*flags, kind=kind)
    assert code == 3 and stderr.count("is ready, but has no model wrong so far") == 1
    assert "no model wrong at" in stderr
    closed = server.ask(*flags, "--url", server.url(kind).rpartition(":")[0] + ":9", "--init-timeout-s", "0.8")
    assert closed[0] == 3 and "is ready" not in closed[2]


@pytest.mark.parametrize("pieces", [[], [{"sentences": np.array([[b"half"]])}]])
def test_a_stream_that_ends_before_its_last_piece_is_a_broken_one(pieces: list[dict[str, np.ndarray]]) -> None:
    class Cut:
        broken = (OSError,)
        url = "http://x"

        async def stream(self, model: str, inputs: object, on_response: transport.OnResponse) -> None:
            for piece in pieces:
                on_response(piece)

    cut = transport.Transport(Cut(), parse_flags(["--prompts", "a", "--stream", "--retries", "0"]))
    with pytest.raises(transport.Gone, match="the connection to http://x broke"):
        asyncio.run(cut.send({}, lambda response: None))


@pytest.mark.parametrize(
    "text",
    [
        "Error occurred during inference request. Message: [request id: 0] BadRequest: the sentence",
        "Message: BadRequest: the sentence",
        "[request id: <id_unknown>] ServerBusy: the sentence",
        "the sentence",
    ],
)
def test_the_servers_own_sentence_is_shown(text: str) -> None:
    assert transport._sentence(text) == "the sentence"


def test_alternatives_of_an_event_get_their_shape_back() -> None:
    response = {"model_name": "x", "sentences": ["a", "b"], "output_ids": [1, 2], "top_token_ids": list(range(6))}
    arrays = transport._arrays(response, num_alternatives=3)
    assert arrays["output_ids"].tolist() == [[1], [2]]
    assert arrays["top_token_ids"].tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert transport._arrays({"sentences": "a", "output_ids": 7}, 1)["output_ids"].tolist() == [[7]]
