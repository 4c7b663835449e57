"""The callables behind Triton's models: arrays → requests, the engine's answers → arrays, whole or as they come.

It knows the engine's `submit` and `cancel`; it never sees a rank or a tensor of the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from pytriton.model_config import Tensor

from engine.request import CANCELLED, SHUTDOWN, EngineBusy, Output, Request
from helpers import one_line
from serving.text import TextStream, whole_text
from serving.triton import inputs
from serving.triton.inputs import GenerationRequest, Parser

_LOG = logging.getLogger("gpt")
# A stream's pause after each piece, per other stream: PyTriton and Triton take about this long for one of all
# their messages, and where they are the limit, pieces of several tokens are quicker than a queue of single ones.
_PAUSE_S = 0.0005

INPUTS = [Tensor(name=name, dtype=dtype, shape=shape, optional=True) for name, (dtype, shape) in inputs.INPUTS.items()]
OUTPUTS = [
    Tensor(name="sentences", dtype=bytes, shape=(-1, 1)),
    Tensor(name="sequence_length", dtype=np.int64, shape=(-1,)),
    Tensor(name="cum_log_probs", dtype=np.float32, shape=(-1,)),
    Tensor(name="finish_reason", dtype=bytes, shape=(-1,)),
    Tensor(name="output_ids", dtype=np.int32, shape=(-1, -1)),
    # where asked for:
    Tensor(name="output_log_probs", dtype=np.float32, shape=(-1, -1)),
    Tensor(name="top_token_ids", dtype=np.int32, shape=(-1, -1, -1)),
    Tensor(name="top_log_probs", dtype=np.float32, shape=(-1, -1, -1)),
    Tensor(name="prompt_log_probs", dtype=np.float32, shape=(-1,)),
    Tensor(name="next_token_logits", dtype=np.float32, shape=(-1,)),
]


class BadRequest(ValueError):
    """An error that reaches the client as its one sentence.

    PyTriton sends an exception's class and traceback to the client; a class that names itself a builtin, with
    no traceback to show, leaves the sentence.
    """

    __module__ = "builtins"

    @property
    def __traceback__(self) -> None:  # type: ignore[override]
        return None

    @__traceback__.setter
    def __traceback__(self, traceback: Any) -> None:
        pass

    def with_traceback(self, traceback: Any) -> BadRequest:
        return self


class ServerBusy(BadRequest):
    """The request is good, and may be sent again later (HTTP 503)."""

    __module__ = "builtins"


class InternalError(BadRequest):
    """A defect of the server: logged in full there, named in one sentence here."""

    __module__ = "builtins"


class Engine(Protocol):
    """What the callables need of engine.engine.Engine."""

    has_token_log_probs: bool

    def submit(self, *requests: Request) -> None: ...
    def cancel(self, request: Request) -> None: ...


class GPTModel:
    """Answers PyTriton's requests through an engine: `infer` for the whole text, `stream` for its pieces."""

    def __init__(self, engine: Engine, parser: Parser) -> None:
        self.engine = engine
        self.parser = parser
        self._by_id: dict[str, Request] = {}  # those that run and have a request_id
        self._lock = threading.Lock()  # each of Triton's models has a loop in a thread of its own
        self._bells: dict[asyncio.AbstractEventLoop, LoopNotifier] = {}
        self._num_streams = 0

    async def infer(self, requests: list[Any]) -> list[dict[str, np.ndarray]]:
        """PyTriton's callable: one dict of batched arrays in, one out, for each Triton request.

        Raises BadRequest, in one sentence, for the first thing that is wrong; nothing runs then.
        """
        with _one_sentence():
            return list(await asyncio.gather(*(self._answer(dict(request)) for request in requests)))

    async def stream(self, requests: list[Any]) -> AsyncIterator[list[dict[str, np.ndarray]]]:
        """PyTriton's callable of the decoupled model: one prompt in, without a batch's dimension, many answers out.

        Each has a piece of the text and its token ids; the last one has everything else. Several samples or beams
        come in one answer. Raises as `infer` does.
        """
        with _one_sentence():
            (request,) = requests
            arrays = {name: np.asarray(array)[None] for name, array in dict(request).items()}
            if (stop_ids := self.parser.stop_ids(arrays)) is not None:
                yield [_unbatched(self._stop(stop_ids))]
                return
            (ask,) = await self._parse(arrays)
            self._num_streams += 1
            try:
                async for answer in self._pieces(ask):
                    yield [answer]
            finally:
                self._num_streams -= 1

    async def _answer(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if (stop_ids := self.parser.stop_ids(arrays)) is not None:
            return self._stop(stop_ids)
        asks = await self._parse(arrays)
        with self._running(asks, only_ends=True) as news:
            for ask, changed in zip(asks, news, strict=True):
                while not ask.request.is_finished:
                    await changed.wait()
                _check_not_shut_down(ask.request)
        return self._arrays(asks, [self._texts(ask) for ask in asks])

    async def _pieces(self, ask: GenerationRequest) -> AsyncIterator[dict[str, np.ndarray]]:
        request = ask.request
        text = TextStream(self.parser.tokenizer, request.prompt_ids, **_text_options(ask))
        num_seen = num_sent = 0
        with self._running([ask], only_ends=request.sampling.width > 1) as (changed,):
            while not request.is_finished:
                await changed.wait()
                changed.clear()
                if request.is_finished or request.sampling.width > 1:
                    continue
                output_ids = request.output_ids[num_seen:]
                num_seen += len(output_ids)
                if piece := text.push(_without_end(output_ids, request.end_id)):
                    new, num_sent = slice(num_sent, num_seen), num_seen
                    yield {"sentences": _bytes([[piece]]), **_token_arrays(ask, request.outputs, new)}
                    await asyncio.sleep(_PAUSE_S * (self._num_streams - 1))
            _check_not_shut_down(request)
        if request.sampling.width > 1:
            yield _unbatched(self._arrays([ask], [self._texts(ask)]))
            return
        piece = text.push(_without_end(request.output_ids[num_seen:], request.end_id)) + text.finish()
        last = _unbatched(self._arrays([ask], [[piece]]))
        yield last | _token_arrays(ask, request.outputs, slice(num_sent, None))

    async def _parse(self, arrays: dict[str, np.ndarray]) -> list[GenerationRequest]:
        asks = await asyncio.to_thread(self.parser.parse, arrays)  # a long text must not keep other requests waiting
        if any(ask.with_log_probs for ask in asks) and not self.engine.has_token_log_probs:
            raise ValueError("is_return_log_probs is set; the FasterTransformer engine has cum_log_probs only")
        return asks

    @contextlib.contextmanager
    def _running(self, asks: Sequence[GenerationRequest], only_ends: bool) -> Iterator[list[asyncio.Event]]:
        """Run requests; inside, an event per request tells of news (or only of its end). Leaving ends what runs."""
        loop = asyncio.get_running_loop()
        with self._lock:
            bell = self._bells.setdefault(loop, LoopNotifier(loop))
        news = [asyncio.Event() for _ in asks]
        for ask, changed in zip(asks, news, strict=True):
            ask.request.on_update = _Listener(bell, changed, only_ends)
        self._submit(asks)
        timers = [loop.call_later(ask.deadline_s, self.engine.cancel, ask.request) for ask in asks if ask.deadline_s]
        try:
            yield news
        finally:
            for timer in timers:
                timer.cancel()
            with self._lock:
                for ask in asks:
                    self._by_id.pop(ask.request_id, None)
            for ask in asks:
                if not ask.request.is_finished:  # the client went away
                    self.engine.cancel(ask.request)

    def _submit(self, asks: Sequence[GenerationRequest]) -> None:
        """Submit requests and know those by their ids that have one: a stop finds them only where the engine does."""
        ids = [ask.request_id for ask in asks if ask.request_id]
        with self._lock:
            for index, request_id in enumerate(ids):
                if request_id in self._by_id or request_id in ids[:index]:
                    raise ValueError(f"request_id {request_id!r} is running already; it must be unique")
            self.engine.submit(*(ask.request for ask in asks))
            self._by_id |= {ask.request_id: ask.request for ask in asks if ask.request_id}

    def _stop(self, request_ids: list[str]) -> dict[str, np.ndarray]:
        with self._lock:
            for request_id in request_ids:
                if request_id not in self._by_id:
                    raise ValueError(f"request_id {request_id!r} is not running")
            for request_id in request_ids:
                self.engine.cancel(self._by_id[request_id])
        rows = len(request_ids)
        return {
            "sentences": _bytes([[[""]]] * rows),
            "sequence_length": np.zeros((rows, 1), dtype=np.int64),
            "finish_reason": _bytes([[CANCELLED]] * rows),
        }

    def _arrays(self, asks: Sequence[GenerationRequest], texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """[rows, beams or samples, …] arrays; texts: one for each output.

        Rows with fewer beams, tokens or alternatives than others are padded: with empty text, end_id, 0.
        """
        width = max(len(ask.request.outputs) for ask in asks)
        sentences, reasons, lengths, sums = [], [], [], []
        for ask, own_texts in zip(asks, texts, strict=True):
            outputs, missing = ask.request.outputs, width - len(ask.request.outputs)
            sentences.append([[text] for text in own_texts] + [[""]] * missing)
            reasons.append([output.finish_reason for output in outputs] + [""] * missing)
            prompt_len = len(ask.request.prompt_ids)
            lengths.append([prompt_len + len(output.token_ids) for output in outputs] + [0] * missing)
            sums.append([output.cum_log_prob for output in outputs] + [0.0] * missing)
        end_ids = [self.parser.end_id if ask.request.end_id is None else ask.request.end_id for ask in asks]
        ids = [[ask.request.prompt_ids + output.token_ids for output in ask.request.outputs] for ask in asks]
        arrays = {
            "sentences": _bytes(sentences),
            "sequence_length": np.array(lengths, dtype=np.int64),
            "finish_reason": _bytes(reasons),
            "output_ids": _padded(ids, np.int32, end_ids),
        }
        if not np.isnan(sums).any():  # FasterTransformer's op knows the sums of whole texts only, and JSON has no NaN
            arrays["cum_log_probs"] = np.array(sums, dtype=np.float32)
        extras = [_token_arrays(ask, ask.request.outputs, slice(None)) for ask in asks]
        for name in ("output_log_probs", "top_token_ids", "top_log_probs"):
            if any(name in extra for extra in extras):
                dtype = np.int32 if name == "top_token_ids" else np.float32
                arrays[name] = _padded([extra[name].tolist() if name in extra else [] for extra in extras], dtype)
        if any(ask.request.sampling.prompt_log_probs for ask in asks):
            rows = [[0.0, *r.prompt_log_probs] if r.sampling.prompt_log_probs else [] for r in _requests(asks)]
            arrays["prompt_log_probs"] = _padded(rows, np.float32)
        if any(ask.request.sampling.next_token_logits for ask in asks):
            none = np.zeros(self.parser.vocab_size)
            rows = [none if r.next_token_logits is None else r.next_token_logits for r in _requests(asks)]
            arrays["next_token_logits"] = np.array(rows, dtype=np.float32)
        return arrays

    def _texts(self, ask: GenerationRequest) -> list[str]:
        """The whole text of each output."""
        request, options = ask.request, _text_options(ask)
        return [
            whole_text(
                self.parser.tokenizer, request.prompt_ids, _without_end(output.token_ids, request.end_id), **options
            )
            for output in request.outputs
        ]


class LoopNotifier:
    """Wakes an event loop once for all the news that come before it looks: waking costs more than the news."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed: deque[asyncio.Event] = deque()
        self._is_ringing = False

    def ring(self, event: asyncio.Event) -> None:
        """Set an event of the loop; called from the engine's thread."""
        self._changed.append(event)
        if not self._is_ringing:
            self._is_ringing = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_ringing = False  # before looking: what comes from now on rings again
        while self._changed:
            self._changed.popleft().set()


class _Listener:
    """A request's on_update."""

    def __init__(self, bell: LoopNotifier, event: asyncio.Event, only_ends: bool) -> None:
        self._bell = bell
        self._event = event
        self._only_ends = only_ends

    def __call__(self, request: Request) -> None:
        if request.is_finished or not self._only_ends:
            self._bell.ring(self._event)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Let every error leave as one sentence."""
    try:
        yield
    except BadRequest:
        raise
    except EngineBusy as error:
        raise ServerBusy(one_line(error)) from None
    except ValueError as error:
        raise BadRequest(one_line(error)) from None
    except Exception as error:
        _LOG.exception("a request failed")
        raise InternalError(f"internal error: {one_line(error)}") from None


def _check_not_shut_down(request: Request) -> None:
    if any(output.finish_reason == SHUTDOWN for output in request.outputs):
        raise EngineBusy("the server stopped before the request was finished")


def _text_options(ask: GenerationRequest) -> dict[str, Any]:
    return {
        "with_prompt": ask.with_prompt,
        "skip_special_tokens": ask.skip_special_tokens,
        "stop_words": ask.stop_words,
        "keep_stop_word": ask.keep_stop_word,
    }


def _without_end(output_ids: list[int], end_id: int | None) -> list[int]:
    """The end token that ended a sequence is no text."""
    return output_ids[:-1] if output_ids and output_ids[-1] == end_id else output_ids


def _token_arrays(ask: GenerationRequest, outputs: Sequence[Output], part: slice) -> dict[str, np.ndarray]:
    """What there is per generated token, of a part of them: [beams or samples, tokens, …]."""
    request = ask.request
    arrays = {"output_ids": _padded([o.token_ids[part] for o in outputs], np.int32, request.end_id or 0)}
    if ask.with_log_probs:
        arrays["output_log_probs"] = _padded([o.log_probs[part] for o in outputs], np.float32)
    if request.sampling.num_log_probs:
        pairs = [o.alternatives[part] for o in outputs]
        for name, place, dtype in (("top_token_ids", 0, np.int32), ("top_log_probs", 1, np.float32)):
            arrays[name] = _padded([[[pair[place] for pair in token] for token in row] for row in pairs], dtype)
    return arrays


def _padded(rows: Sequence[Any], dtype: Any, fill: Any = 0) -> np.ndarray:
    """An array of nested lists that are not equally long; `fill` may be one value per row."""
    shape = _shape(rows)
    array = np.zeros(shape, dtype=dtype)
    array += np.asarray(fill, dtype=dtype).reshape(-1, *[1] * (len(shape) - 1))
    for row, values in enumerate(rows):
        if len(shape) == 1:
            array[row] = values
        elif len(shape) == 2:
            array[row, : len(values)] = values
        else:
            own_fill = fill[row] if isinstance(fill, list) else fill
            own = _padded(values, dtype, own_fill) if len(values) else np.zeros((0,) * (len(shape) - 1), dtype)
            array[(row, *map(slice, own.shape))] = own
    return array


def _shape(rows: Any) -> tuple[int, ...]:
    if not isinstance(rows, (list, tuple)):
        return ()
    inner = [_shape(row) for row in rows]
    depth = max(map(len, inner), default=0)
    full = [shape + (0,) * (depth - len(shape)) for shape in inner]
    return (len(rows), *map(max, zip(*full, strict=True)))


def _bytes(texts: list[Any]) -> np.ndarray:
    """Nested lists of str as an object array of bytes, as PyTriton wants strings."""
    return np.vectorize(str.encode, otypes=[object])(np.array(texts, dtype=object))


def _unbatched(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in arrays.items()}


def _requests(asks: Sequence[GenerationRequest]) -> list[Request]:
    return [ask.request for ask in asks]
