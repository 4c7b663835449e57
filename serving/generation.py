"""Runs requests of any front end through the engine: submit, stream or wait, cancel.

`Generator.run` is the whole interface: inside it the requests run, and leaving it cancels those that have not ended.
It knows neither arrays nor HTTP. The engine's thread only calls a request's on_update; all else happens on the front
end's event loop, or in a thread of its pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.request import SHUTDOWN, EngineStopping, Output, ParameterError, Request
from serving.request import GenerationRequest, Prompts
from serving.text import TextStream, whole_text
from serving.tokenization import RequestEncoder


class Engine(Protocol):
    """The part of engine.engine.Engine that generation uses."""

    @property
    def has_token_log_probs(self) -> bool:
        """Whether outputs have a log-probability per token."""
        ...

    def check_room(self, num_requests: int) -> None: ...
    def submit(self, *requests: Request) -> None: ...
    def cancel(self, request: Request) -> None: ...


class RequestObserver(Protocol):
    """Is told of the front ends' requests, on their event loops: it must be quick and must not raise."""

    def ended(self, run: Run) -> None:
        """The front end left a run. Outputs without a finish_reason are about to be cancelled."""
        ...

    def refused(self, front_end: str, log_id: str, error: Exception) -> None:
        """A request did not run. log_id: as the front end gave it, perhaps empty."""
        ...


@dataclass(frozen=True, eq=False)
class Generation:
    """One prompt that runs, or has run. Its outputs grow while it does."""

    request: GenerationRequest
    engine_request: Request
    tokenizer: Any

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""
        return self.engine_request.prompt_ids

    @property
    def outputs(self) -> list[Output]:
        """n samples, or beams, best first, once they have ended."""
        return self.engine_request.outputs

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the text."""
        return self.engine_request.end_ids

    @property
    def prompt_log_probs(self) -> list[float]:
        """Log-probabilities of prompt_ids[1:], where asked for."""
        return self.engine_request.prompt_log_probs

    @property
    def prompt_alternatives(self) -> list[tuple[tuple[int, float], ...]]:
        """(token id, log-probability) pairs in place of each of prompt_ids[1:], likeliest first, where asked for."""
        return self.engine_request.prompt_alternatives

    @property
    def next_token_logits(self) -> Sequence[float] | None:
        """[vocab_size], of the first new token, where asked for and computed by now."""
        return self.engine_request.next_token_logits

    @property
    def is_finished(self) -> bool:
        """Whether all outputs have ended."""
        return self.engine_request.is_finished

    def texts(self) -> list[str]:
        """The whole text of each output; call it once they have ended."""
        return [
            whole_text(self.tokenizer, self.prompt_ids, self.without_end(output.token_ids), **self.request.text_options)
            for output in self.outputs
        ]

    def without_end(self, token_ids: list[int]) -> list[int]:
        """Tokens of an output without the end token that ended it, which is no text."""
        return token_ids[:-1] if token_ids and token_ids[-1] in self.end_ids else token_ids

    def check_not_shut_down(self) -> None:
        """Raise EngineStopping for an output that ended because the server stopped."""
        if any(output.finish_reason == SHUTDOWN for output in self.outputs):
            raise EngineStopping("the server stopped before the request was finished")


@dataclass(frozen=True, eq=False)
class Update:
    """New tokens of one output, with the text that is final since the last update.

    index: the sample's or beam's place in the generation's outputs; new: the part of its tokens, log_probs and
    alternatives that is new; finish_reason: None where more updates of this output follow.
    """

    generation: Generation
    index: int
    output: Output
    text: str
    new: slice
    finish_reason: str | None


class Run:
    """The prompts of one front-end request while they run. Take `updates` or `wait`.

    log_id: the log knows it by this id; arrived: when it came, in seconds of time.monotonic().
    """

    def __init__(
        self, generations: list[Generation], listener: _Listener, front_end: str, log_id: str, arrived: float
    ) -> None:
        self.generations = generations
        self.front_end = front_end
        self.log_id = log_id
        self.arrived = arrived
        self._listener = listener

    async def wait(self) -> None:
        """Return when all have ended. Raises EngineStopping where the server stopped before that."""
        changed = self._listener.changed
        for generation in self.generations:
            while not generation.is_finished:
                await changed.wait()
                changed.clear()
            generation.check_not_shut_down()

    async def updates(self) -> AsyncIterator[Update]:
        """Each output's updates, as they come; the last one of an output has its finish_reason.

        Samples grow piece by piece, and tokens that come while the reader is busy come in one update. Beams come
        whole, at their end. Raises EngineStopping where the server stops before the end.
        """
        self._listener.only_ends = False
        changed = self._listener.changed
        pending = [source for generation in self.generations for source in _sources(generation)]
        while True:
            for source in pending:
                for update in source.take():
                    yield update
            pending = [source for source in pending if not source.is_over]
            if not pending:
                break
            await changed.wait()
            changed.clear()
        await self.wait()  # an output's end comes a moment before the request's


class Generator:
    """Runs requests. One serves all front ends, whose event loops may be in threads of their own."""

    def __init__(self, engine: Engine, encoder: RequestEncoder, observer: RequestObserver | None = None) -> None:
        self.engine = engine
        self.encoder = encoder
        self.observer = observer
        self._by_id: dict[str, Request] = {}  # those that run and have a request_id
        self._lock = threading.Lock()
        self._notifiers: dict[asyncio.AbstractEventLoop, LoopNotifier] = {}

    @contextlib.asynccontextmanager
    async def run(self, requests: Prompts, *, front_end: str = "triton", log_id: str = "") -> AsyncIterator[Run]:
        """Run the prompts of one front-end request, all or none; leaving cancels those that have not ended.

        requests: they are read in the thread that tokenizes, so that parsing holds up no other request, and only
        where the engine has room for as many.
        log_id: the client's own id of it; by default the first prompt's request_id, or a new one.
        Raises ParameterError or ValueError for a request that cannot run, EngineBusy where there is no room now.
        """
        arrived = time.monotonic()
        with self.reporting(front_end, log_id):
            generations, listener = await self._start(requests)
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(generation.request.deadline_s, self.engine.cancel, generation.engine_request)
            for generation in generations
            if generation.request.deadline_s is not None
        ]
        own_ids = (generation.request.request_id for generation in generations)
        log_id = log_id or next(filter(None, own_ids), None) or uuid.uuid4().hex
        run = Run(generations, listener, front_end, log_id, arrived)
        try:
            yield run
        finally:
            for timer in timers:
                timer.cancel()
            self._leave(generations)
            if self.observer is not None:
                self.observer.ended(run)

    @contextlib.contextmanager
    def reporting(self, front_end: str, log_id: str) -> Iterator[None]:
        """Tell the observer of an error in the block: a front end refuses a request before it runs."""
        try:
            yield
        except ConnectionError:  # the client went away
            raise
        except Exception as error:
            if self.observer is not None:
                self.observer.refused(front_end, log_id, error)
            raise

    async def _start(self, requests: Prompts) -> tuple[list[Generation], _Listener]:
        self.engine.check_room(len(requests))
        encoded = await asyncio.to_thread(self.encoder.encode, requests)
        if any(request.with_log_probs for request, _ in encoded) and not self.engine.has_token_log_probs:
            raise ParameterError("with_log_probs", "is set; the FasterTransformer engine has cum_log_probs only")
        loop = asyncio.get_running_loop()
        with self._lock:
            notifier = self._notifiers.get(loop)
            if notifier is None:  # loops end where a front end starts anew
                self._notifiers = {known: old for known, old in self._notifiers.items() if not known.is_closed()}
                notifier = self._notifiers[loop] = LoopNotifier(loop)
        listener = _Listener(notifier)
        generations = [Generation(request, own, self.encoder.tokenizer) for request, own in encoded]
        for generation in generations:
            generation.engine_request.on_update = listener
        self._submit(generations)
        return generations, listener

    def stop(self, request_ids: Sequence[str]) -> None:
        """End the requests with these ids, all or none, with the tokens that they have.

        Raises ParameterError for an id that no running request has.
        """
        with self._lock:
            for request_id in request_ids:
                if request_id not in self._by_id:
                    raise ParameterError("request_id", f"{request_id!r} is not running")
            for request_id in request_ids:
                self.engine.cancel(self._by_id[request_id])

    def _submit(self, generations: Sequence[Generation]) -> None:
        """Submit requests and keep their ids, under one lock: a stop finds an id only where the engine has it."""
        by_id: dict[str, Request] = {}
        with self._lock:
            for generation in generations:
                request_id = generation.request.request_id
                if not request_id:
                    continue
                if request_id in self._by_id or request_id in by_id:
                    raise ParameterError("request_id", f"{request_id!r} is running already; it must be unique")
                by_id[request_id] = generation.engine_request
            self.engine.submit(*(generation.engine_request for generation in generations))
            self._by_id |= by_id

    def _leave(self, generations: Sequence[Generation]) -> None:
        with self._lock:
            for generation in generations:
                self._by_id.pop(generation.request.request_id or "", None)
        for generation in generations:
            if not generation.is_finished:  # the client went away
                self.engine.cancel(generation.engine_request)


class LoopNotifier:
    """Sets events of an event loop from other threads.

    Coalesces wake-ups: one call_soon_threadsafe for each batch of updates, because it costs more than an update.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed: deque[asyncio.Event] = deque()
        self._is_scheduled = False

    def notify(self, event: asyncio.Event) -> None:
        """Set an event of the loop soon; called from the engine's thread."""
        self._changed.append(event)
        if not self._is_scheduled:
            self._is_scheduled = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_scheduled = False  # before looking: an event that comes from now on schedules again
        while self._changed:
            self._changed.popleft().set()


class _Listener:
    """The on_update of all requests of a run. It holds none of them, so that they form no cycle."""

    def __init__(self, notifier: LoopNotifier) -> None:
        self.changed = asyncio.Event()
        self.only_ends = True
        self._notifier = notifier

    def __call__(self, request: Request) -> None:
        if request.is_finished or not self.only_ends:
            self._notifier.notify(self.changed)


class _Sample:
    """The updates of one output that grows token by token."""

    def __init__(self, generation: Generation, index: int) -> None:
        self.is_over = False
        self._generation = generation
        self._index = index
        self._num_seen = self._num_sent = 0

    @functools.cached_property
    def _text(self) -> TextStream:
        """Made when it is needed: it decodes the prompt, which a request may have many of."""
        return TextStream(
            self._generation.tokenizer, self._generation.prompt_ids, **self._generation.request.text_options
        )

    def take(self) -> list[Update]:
        """The update that there is by now, if any: tokens without final text wait for the next one."""
        output = self._generation.outputs[self._index]
        finish_reason = output.finish_reason  # before the tokens: it is set after the last one is there
        if finish_reason == SHUTDOWN:
            self._generation.check_not_shut_down()
        token_ids = output.token_ids[self._num_seen :]
        self._num_seen += len(token_ids)
        text = self._text.push(self._generation.without_end(token_ids)) if token_ids else ""
        if finish_reason is not None:
            self.is_over = True
            text += self._text.finish()
        elif not text:
            return []
        new, self._num_sent = slice(self._num_sent, self._num_seen), self._num_seen
        return [Update(self._generation, self._index, output, text, new, finish_reason)]


class _Beams:
    """The updates of a beam search: its outputs are known at the end."""

    def __init__(self, generation: Generation) -> None:
        self.is_over = False
        self._generation = generation

    def take(self) -> list[Update]:
        if not self._generation.is_finished:
            return []
        self.is_over = True
        indexes = range(len(self._generation.outputs))
        return [update for index in indexes for update in _Sample(self._generation, index).take()]


def _sources(generation: Generation) -> list[_Sample | _Beams]:
    sampling = generation.request.sampling
    if sampling.beam_width > 1:
        return [_Beams(generation)]
    return [_Sample(generation, index) for index in range(sampling.n)]
