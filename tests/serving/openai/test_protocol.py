"""The API's HTTP: models, keys, TLS, ids, limits, disconnects, a full queue, the end."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.request import Request
from serving.generation import Generator
from serving.openai.frontend import OpenAIFlags, OpenAIFrontend
from serving.openai.model import ServedModel
from tests.support.counting_engine import CountingEngine, letter_encoder
from tests.support.launch import free_ports, wait_for
from tests.support.openai_api import Api, letters

LONG = {"prompt": "a", "max_tokens": 290, "temperature": 0}


def test_models_health_version_metrics_page() -> None:
    with letters() as api:
        (card,) = api.get("/v1/models").json["data"]
        assert (card["id"], card["root"], card["max_model_len"]) == ("letters", "org/letters", 300)
        assert api.get("/v1/models/letters").json == card
        assert api.get("/v1/models/org/letters").json == card
        assert api.get("/v1/models/other").error[0] == 404
        assert api.complete(model="other", prompt="a").error[:2] == (404, "model")
        assert api.complete(model="org/letters", prompt="ab").status == 200
        assert api.get("/health").status == 200
        assert set(api.get("/version").json) == {"version"}
        assert api.get("/metrics").body == b"x 1\n"
        page = api.get("/")
        assert page.status == 200 and page.headers["content-type"].startswith("text/html")
        assert b"http://" not in page.body and b"https://" not in page.body  # nothing from outside


def test_paths_methods_and_bodies() -> None:
    with letters() as api:
        assert api.get("/v2/x").error[0] == 404
        answer = api.get("/v1/completions")
        assert answer.error[0] == 405 and "POST" in answer.headers["allow"]
        for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"[" * 100_000):
            assert api.ask("POST", "/v1/completions", body).error[0] == 400, body[:20]


def test_bodies_that_cannot_be_read() -> None:
    with letters() as api:
        assert api.ask("POST", "/v1/completions", b"plain", Content_Encoding="gzip").error[0] == 400
        assert "digits" in api.ask("POST", "/v1/completions", b'{"seed": ' + b"1" * 4000 + b"}").error[2]
        many = b"{" + b",".join(b'"f%d": 1' % number for number in range(2000)) + b"}"
        assert "2000 fields" in api.ask("POST", "/v1/completions", many).error[2]
        assert api.ask("POST", "/v1/completions", b"{}", Expect="nothing").status in (400, 417)
        assert api.complete(prompt="ab").status == 200


def test_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_API_KEY", "sésame")
    with letters() as api:
        assert api.key == "sésame"
        nobody, wrong = replace(api, key=""), replace(api, key="sesame")
        for other in (nobody, wrong):
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                assert other.post(path, prompt="a").error[0] == 401
            for path in ("/v1/models", "/v1/models/letters", "/tokenizer_info", "/nothing"):
                assert other.get(path).error[0] == 401
            for path in ("/", "/health", "/version", "/metrics"):
                assert other.get(path).status == 200
        for header in ("Bearer \xff", "Basic a", "Bearer", "bearer  "):
            assert nobody.ask("POST", "/v1/completions", b"{}", Authorization=header).error[0] == 401
        header = "Bearer sésame".encode().decode("latin-1")  # as curl sends it
        answer = nobody.ask("POST", "/v1/completions", b'{"prompt": "ab"}', Authorization=header)
        assert answer.status == 200


@pytest.mark.parametrize(("flag", "variable"), [(" ", None), ("", "\n"), (" ", "right")])
def test_a_blank_key_does_not_open_the_port(monkeypatch: pytest.MonkeyPatch, flag: str, variable: str | None) -> None:
    monkeypatch.setenv("SERVER_API_KEY", variable or "")
    with pytest.raises(ValueError, match="api_key is blank"):
        OpenAIFlags(api_key=flag)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template is '.*t.jinja'; it must be UTF-8"):
        OpenAIFlags(chat_template=str(template)).read_chat_template()


def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    with letters(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as api:
        secure = replace(api, tls=ssl.create_default_context(cafile=str(certificate)))
        assert secure.complete(prompt="ab", max_tokens=3).json["choices"][0]["text"] == "abc"
        with pytest.raises((ConnectionError, OSError)):
            api.complete(prompt="ab")
    for flags, part in (
        ({"ssl_certfile": str(key)}, "cannot be used"),
        ({"ssl_certfile": str(tmp_path / "none")}, "must be a file"),
        ({"ssl_keyfile": str(key)}, "ssl_certfile must be set"),
    ):
        with pytest.raises(ValueError, match=part):
            OpenAIFlags(**flags)


def test_request_ids_in_and_out() -> None:
    with letters() as api:
        body = json.dumps({"prompt": "ab", "max_tokens": 2}).encode()
        answer = api.ask("POST", "/v1/completions", body, X_Request_Id="me-7")
        assert answer.headers["x-request-id"] == "me-7" and answer.json["id"] == "cmpl-me-7"
        own = {
            api.ask("POST", "/v1/completions", body, X_Request_Id=bad).headers["x-request-id"]
            for bad in ("", "a b", "x" * 129)
        }
        assert len(own) == 3 and all(len(name) == 32 for name in own)
        assert api.get("/nothing", X_Request_Id="e1").headers["x-request-id"] == "e1"


def test_long_bodies_are_refused_as_they_come() -> None:
    with letters(max_request_bytes=1000) as api:
        assert api.complete(prompt="a" * 2000).error[0] == 413
        with socket.create_connection(("127.0.0.1", api.port), timeout=20) as client:  # an endless chunked body
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            deadline = time.monotonic() + 20
            with pytest.raises(ConnectionError):
                while time.monotonic() < deadline:
                    client.sendall(b"400\r\n" + b"a" * 0x400 + b"\r\n")
        assert api.complete(prompt="ab").status == 200


def test_items_are_counted_before_they_are_parsed() -> None:
    with letters() as api:
        body = b'{"prompt": [' + b"1," * 8_000_000 + b"1]}"
        started = time.monotonic()
        assert "items" in api.ask("POST", "/v1/completions", body).error[2]
        assert time.monotonic() - started < 2


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with letters() as api, caplog.at_level(logging.INFO, "serving"):
        for _ in range(3):
            assert api.complete(prompt="ab", never_heard_of_this="x").status == 200
    assert sum("never_heard_of_this" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_cancelled(stream: bool) -> None:
    engine = CountingEngine(0.05)
    with letters(engine) as api:
        connection = api.connect()
        connection.request("POST", "/v1/completions", json.dumps({**LONG, "stream": stream}))
        wait_for(lambda: engine.seen and engine.seen[0].output_ids)
        connection.close()
        started = time.monotonic()
        wait_for(lambda: engine.cancelled)
        assert time.monotonic() - started < 1
        assert engine.cancelled == engine.seen


def test_busy_is_429_and_stopping_503(api: Api) -> None:
    from engine.request import EngineBusy, EngineStopping

    class Refusing(CountingEngine):
        error: Exception = EngineBusy("5 requests wait already")

        def submit(self, *requests: Request) -> None:
            raise self.error

    engine = Refusing()
    with letters(engine) as other:
        answer = other.complete(prompt="ab")
        assert answer.error[0] == 429 and answer.headers["retry-after"] == "1"
        engine.error = EngineStopping("the server is stopping")
        answer = other.complete(prompt="ab", stream=True)
        assert answer.error[0] == 503 and answer.headers["retry-after"] == "1"
        engine.error = RuntimeError("a defect")
        assert other.complete(prompt="ab").error[0] == 500


def test_drain_refuses_and_finishes() -> None:
    """/health goes off and new requests are refused; a stream that runs gets all its tokens."""
    (port,) = free_ports(1)
    generator = Generator(CountingEngine(0.01), letter_encoder())
    model = ServedModel("letters", "letters", generator.encoder)
    flags = OpenAIFlags(openai_port=port)
    frontend = OpenAIFrontend(flags, "127.0.0.1", generator, model, lambda accept: (b"", "text/plain"))
    frontend.start()
    api = Api(port)
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(api.complete(**{**LONG, "stream": True, "max_tokens": 100}))
    )
    thread.start()
    wait_for(lambda: generator.engine.seen)  # type: ignore[attr-defined]
    frontend.refuse()
    assert api.get("/health").error[0] == 503
    assert api.complete(prompt="ab").error[0] == 503
    frontend.stop()
    thread.join()
    text = "".join(event["choices"][0]["text"] for event in answers[0].events)
    assert len(text) == 100
    with pytest.raises(ConnectionError):
        api.get("/health")


def test_an_error_in_a_stream_is_an_event() -> None:
    from engine.request import SHUTDOWN

    class Ending(CountingEngine):
        def _work(self, requests: tuple[Request, ...]) -> None:
            (request,) = requests
            for _ in range(3):
                self._append(request, request.outputs[0])
                request.on_update(request)
                time.sleep(0.05)
            request.end(SHUTDOWN)

    with letters(Ending()) as api:
        *pieces, last = api.complete(**LONG, stream=True).events
        assert pieces and "stopped" in last["error"]["message"]
