"""The OpenAI API's endpoints as an aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from serving.generation import Generator
from serving.openai import chat, completions, parameters, tokens
from serving.openai.chat import ChatShape
from serving.openai.completions import CompletionShape
from serving.openai.errors import OpenAIError, defects, refusals
from serving.openai.fields import Fields
from serving.openai.model import ServedModel
from serving.openai.parameters import Ask
from serving.openai.replies import Reply, Shape, dumped

_BODY_TIMEOUT_S = 60.0  # to receive a request's body
_WRITE_TIMEOUT_S = 60.0  # for a client that does not read its answer
_LARGE_BODY = 1 << 16  # bytes; such a body is parsed in a thread
_MIN_MAX_ITEMS = 1 << 17  # of a body; a few prompts of token ids have more where the model's sequences are longer
# A stream's pause after each piece, per other stream: some times what a piece costs, so that many streams get pieces of
# several tokens, and leave the interpreter to the engine.
_PAUSE_S = 0.0002
_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")  # a client's; others get one of their own
_VERSION = "1.0"  # of this API, not of the model
_ID_HEADER = "X-Request-Id"
_OPEN_PATHS = ("/", "/health", "/version", "/metrics")  # they take no key, as in vLLM
_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (  # the page holds its own script and style, and talks to this server alone
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Exposition = Callable[[str], tuple[bytes, str]]  # Accept header → body and content type
_current: ContextVar[tuple[web.BaseRequest, str] | None] = ContextVar("current", default=None)  # request, its id


@dataclass(frozen=True)
class _Kind:
    """An endpoint that generates. names: the engine's field → the API's."""

    parse: Callable[[Fields, ServedModel], Ask]
    shape: Callable[[Ask], Shape]
    names: Mapping[str, str]


_COMPLETIONS = _Kind(completions.parse, CompletionShape, parameters.NAMES)
_CHAT = _Kind(chat.parse, ChatShape, chat.NAMES)


class Endpoints:
    """The handlers. One object serves one model.

    is_ready: tells whether new requests are taken. exposition: makes the metrics' text.
    api_key: that clients must send; "": none. max_request_bytes: of a body; longer ones get 413.
    """

    def __init__(
        self,
        generator: Generator,
        model: ServedModel,
        is_ready: Callable[[], bool],
        exposition: _Exposition,
        *,
        api_key: str = "",
        max_request_bytes: int = 1 << 24,
    ) -> None:
        self._generator = generator
        self._model = model
        self._is_ready = is_ready
        self._exposition = exposition
        self._api_key = api_key.encode()
        self._max_request_bytes = max_request_bytes
        self._max_items = max(_MIN_MAX_ITEMS, 4 * model.encoder.max_seq_len)
        self._num_streams = 0

    def application(self) -> web.Application:
        """The application with its routes."""
        app = web.Application(client_max_size=self._max_request_bytes, middlewares=[self._outermost])
        app.on_response_prepare.append(_send_request_id)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/health", self._health),
                web.get("/version", self._show_version),
                web.get("/metrics", self._metrics),
                web.get("/tokenizer_info", self._tokenizer_info),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._one_model),
                web.post("/v1/completions", partial(self._generate, _COMPLETIONS)),
                web.post("/v1/chat/completions", partial(self._generate, _CHAT)),
                web.post("/tokenize", partial(self._use_tokenizer, tokens.tokenize)),
                web.post("/detokenize", partial(self._use_tokenizer, tokens.detokenize)),
            ]
        )
        return app

    @web.middleware
    async def _outermost(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Give the request its id, check the key, and turn every error into OpenAI's form."""
        given = request.headers.get(_ID_HEADER, "")
        _current.set((request, given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex))
        try:
            with defects():
                return await self._checked(request, handler)
        except OpenAIError as error:
            return _json(error.body, error.status, error.headers)
        except ConnectionError:  # the client went away: nobody reads this answer
            return web.Response(status=499)

    async def _checked(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            if request.path not in _OPEN_PATHS:
                with self._generator.reporting("openai", _id_of(request)):
                    self._check_key(request)
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            raise OpenAIError(
                413, f"the body has more than {self._max_request_bytes} bytes (--max-request-bytes)"
            ) from None
        except web.RequestPayloadError as error:
            raise OpenAIError(400, f"the body cannot be read ({error})") from None
        except web.HTTPException as answer:  # no such path, a wrong method
            message = f"{request.method} {request.path[:200]}: {answer.reason}"
            allow = {"Allow": answer.headers["Allow"]} if "Allow" in answer.headers else {}
            return _json(OpenAIError(answer.status, message).body, answer.status, allow)

    def _check_key(self, request: web.Request) -> None:
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode(errors="surrogateescape")  # bytes that are not UTF-8 as they came
        if self._api_key and (kind.lower() != "bearer" or not hmac.compare_digest(given, self._api_key)):
            raise OpenAIError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _generate(self, kind: _Kind, request: web.Request) -> web.StreamResponse:
        """Answer a completion of text or chat. Leaving, as when the client goes away, cancels it."""
        request_id = _id_of(request)
        async with contextlib.AsyncExitStack() as stack:
            with self._generator.reporting("openai", request_id):
                fields = await self._fields(request)
                with refusals(kind.names):
                    ask = await asyncio.to_thread(kind.parse, fields, self._model)
                fields.log_ignored(request.path)
            with refusals({**kind.names, "max_new_tokens": ask.max_tokens_name}):
                running = self._generator.run(ask.requests, front_end="openai", log_id=request_id)
                run = await stack.enter_async_context(running)
            reply = Reply(run, ask, kind.shape(ask), self._model, request_id)
            if ask.stream:
                return await self._stream(request, reply.pieces())
            await run.wait()
            return await _whole(request, await asyncio.to_thread(reply.body))

    async def _stream(self, request: web.Request, pieces: AsyncGenerator[dict[str, Any], None]) -> web.StreamResponse:
        """Send pieces as server-sent events. An error before the first one is an answer, a later one an event."""
        self._num_streams += 1
        try:
            async with contextlib.aclosing(pieces):
                piece = await anext(pieces)
                headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
                response = web.StreamResponse(headers=headers)
                await response.prepare(request)
                try:
                    with defects():
                        await _send(request, response, piece)
                        async for piece in pieces:
                            await _send(request, response, piece)
                            await asyncio.sleep(_PAUSE_S * (self._num_streams - 1))
                except OpenAIError as error:
                    await _send(request, response, error.body)
                await _write(request, response, b"data: [DONE]\n\n")
                return response
        finally:
            self._num_streams -= 1

    async def _fields(self, request: web.Request) -> Fields:
        """The body's fields. Raises OpenAIError for one that is no JSON object, or names another model."""
        if not self._is_ready():
            raise OpenAIError(503, "the server is stopping and takes no new requests", code="server_stopping")
        try:
            body = await asyncio.wait_for(request.read(), _BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise OpenAIError(408, f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} s") from None
        if len(body) < _LARGE_BODY:
            fields = Fields.parse(body, self._max_items)
        else:
            fields = await asyncio.to_thread(Fields.parse, body, self._max_items)
        self._model.check_name(fields.get("model", str))
        parameters.skip_unused(fields)
        return fields

    async def _use_tokenizer(
        self, work: Callable[[Fields, ServedModel], dict[str, Any]], request: web.Request
    ) -> web.StreamResponse:
        fields = await self._fields(request)
        with refusals(chat.NAMES if fields.any("messages") is not None else {}):
            return _json(await asyncio.to_thread(work, fields, self._model))

    async def _tokenizer_info(self, request: web.Request) -> web.StreamResponse:
        return _json(tokens.describe(self._model))

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return _json({"object": "list", "data": [self._model.card]})

    async def _one_model(self, request: web.Request) -> web.StreamResponse:
        self._model.check_name(request.match_info["name"])
        return _json(self._model.card)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if not self._is_ready():
            raise OpenAIError(503, "the server is stopping", code="server_stopping")
        return web.Response()

    async def _show_version(self, request: web.Request) -> web.StreamResponse:
        return _json({"version": _VERSION})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        body, content_type = await asyncio.to_thread(self._exposition, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _page(self, request: web.Request) -> web.StreamResponse:
        headers = {"Cache-Control": "no-cache", "Content-Security-Policy": _PAGE_POLICY}
        return web.Response(text=_PAGE.read_text(), content_type="text/html", headers=headers)


def _id_of(request: web.BaseRequest) -> str:
    """The request's id; "" before the middleware has given it one."""
    current = _current.get()
    return current[1] if current is not None and current[0] is request else ""


async def _send_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if request_id := _id_of(request):
        response.headers[_ID_HEADER] = request_id


async def _whole(request: web.Request, body: bytes) -> web.StreamResponse:
    """Send an answer that may be large."""
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(body))})
    await response.prepare(request)
    await _write(request, response, body)
    return response


async def _send(request: web.Request, response: web.StreamResponse, event: dict[str, Any]) -> None:
    await _write(request, response, b"data: " + dumped(event) + b"\n\n")


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """A client that does not read for long loses its connection: it would hold its memory for ever."""
    assert request.transport is not None
    timer = asyncio.get_running_loop().call_later(_WRITE_TIMEOUT_S, request.transport.abort)
    try:
        await response.write(data)
    finally:
        timer.cancel()


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=dumped(value), status=status, headers=headers, content_type="application/json")
