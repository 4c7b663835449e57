"""The OpenAI API in this process on the demo model: a real engine, a real port, a plain HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from convert import convert
from engine.engine import Engine
from serving.chat import ChatTemplate
from serving.generation import Generator
from serving.openai.frontend import OpenAIFlags, OpenAIFrontend
from serving.openai.model import ServedModel
from serving.tokenization import RequestEncoder
from tests.support.counting_engine import CountingEngine, letter_encoder
from tests.support.engines import make_engine
from tests.support.launch import free_ports
from tests.support.ranks import ROOT

STORIES = ROOT / "models/stories"


@dataclass(frozen=True)
class Answer:
    """What came back: the status, the headers (names in lower case) and the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str | None, str]:
        """(status, param, message) of an error in OpenAI's form."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return self.status, error["param"], error["message"]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The objects of a stream, whose end must be marked."""
        assert self.headers["content-type"].startswith("text/event-stream"), self.body
        *events, end, rest = self.body.decode().split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass(frozen=True)
class Api:
    """A client of the API on a port of this machine."""

    port: int
    key: str = ""
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own."""
        with contextlib.closing(self.connect()) as connection:
            if self.key:
                headers.setdefault("Authorization", f"Bearer {self.key}")
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, **fields: Any) -> Answer:
        return self.ask("POST", path, json.dumps(fields).encode(), Content_Type="application/json")

    def complete(self, **fields: Any) -> Answer:
        return self.post("/v1/completions", **fields)

    def chat(self, **fields: Any) -> Answer:
        return self.post("/v1/chat/completions", **fields)


@contextlib.contextmanager
def openai_api(
    folder: Path,
    *,
    source: Path = STORIES,
    flags: dict[str, Any] | None = None,
    refused: list[Exception] | None = None,
    **limits: Any,
) -> Iterator[Api]:
    """The API of a model while inside, by default the demo's; folder: for its weights. limits: fields of EngineConfig.

    refused: gets the error of each request that does not run.
    """
    engine = make_engine(convert(source, folder, 1, "fp32"), **limits)
    tokenizer = AutoTokenizer.from_pretrained(source)
    (port,) = free_ports(1)
    settings = OpenAIFlags(openai_port=port, **flags or {})
    template = ChatTemplate(tokenizer, settings.read_chat_template())
    limit = engine.scheduler.max_seq_len
    encoder = RequestEncoder(tokenizer, (tokenizer.eos_token_id,), len(tokenizer), limit, chat_template=template)
    model = ServedModel("stories", "models/stories", encoder)
    generator = Generator(engine, encoder, None if refused is None else _Refused(refused))
    frontend = OpenAIFrontend(settings, "127.0.0.1", generator, model, lambda accept: (b"", "text/plain"))
    thread = threading.Thread(target=_run, args=(engine,))
    thread.start()
    frontend.start()
    try:
        yield Api(port, settings.key)
    finally:
        engine.stop(0.0)
        thread.join()
        frontend.stop()


@dataclass(frozen=True)
class _Refused:
    """A RequestObserver that keeps the errors."""

    errors: list[Exception]

    def ended(self, run: Any) -> None:
        pass

    def refused(self, front_end: str, log_id: str, error: Exception) -> None:
        self.errors.append(error)


def _run(engine: Engine) -> None:
    try:
        engine.run()
    except BaseException:
        engine.stop(0.0)  # else tests would wait for their answers
        engine.scheduler.abort_all()
        raise


@contextlib.contextmanager
def letters(engine: Any = None, **flags: Any) -> Iterator[Api]:
    """The API over an engine without a model, so that its time and its errors are the test's."""
    (port,) = free_ports(1)
    settings = OpenAIFlags(openai_port=port, **flags)
    generator = Generator(engine or CountingEngine(0.001), letter_encoder())
    model = ServedModel("letters", "org/letters", generator.encoder)
    frontend = OpenAIFrontend(settings, "127.0.0.1", generator, model, lambda accept: (b"x 1\n", "text/plain"))
    frontend.start()
    try:
        yield Api(port, settings.key)
    finally:
        frontend.stop()
