"""The callable behind Triton's model: arrays → requests, the engine's answers → arrays.

It knows the tokenizer and the engine's `submit`; it never sees a rank or a tensor of the model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from pytriton.model_config import Tensor

from engine.request import SHUTDOWN, Request, SamplingParams, Update
from helpers import one_line

_LOG = logging.getLogger("gpt")

INPUTS = [
    Tensor(name="prompts", dtype=bytes, shape=(1,)),
    Tensor(name="request_output_len", dtype=np.uint32, shape=(1,)),
    Tensor(name="beam_width", dtype=np.uint32, shape=(1,), optional=True),
    Tensor(name="runtime_top_k", dtype=np.uint32, shape=(1,), optional=True),
    Tensor(name="runtime_top_p", dtype=np.float32, shape=(1,), optional=True),
    Tensor(name="temperature", dtype=np.float32, shape=(1,), optional=True),
    Tensor(name="random_seed", dtype=np.uint64, shape=(1,), optional=True),
]
OUTPUTS = [
    Tensor(name="sentences", dtype=bytes, shape=(-1, 1)),
    Tensor(name="sequence_length", dtype=np.int64, shape=(-1,)),
    Tensor(name="output_ids", dtype=np.int32, shape=(-1, -1)),
]
MAX_BEAM_WIDTH = 1


class BadRequest(ValueError):
    """An error that reaches the client as its one sentence.

    PyTriton sends an exception's class and traceback to the client; a class that names itself a builtin, with
    no traceback to show, leaves the sentence.
    """

    __module__ = "builtins"

    @property
    def __traceback__(self) -> None:  # type: ignore[override]
        return None

    def with_traceback(self, traceback: Any) -> BadRequest:
        return self


class InternalError(BadRequest):
    """A defect of the server: logged in full there, named in one sentence here."""

    __module__ = "builtins"


class GPTModel:
    """Answers PyTriton's requests through an engine.

    tokenizer: of transformers; end_id: the token that ends a text; vocab_size: of the model.
    """

    def __init__(self, submit: Callable[..., None], tokenizer: Any, end_id: int, vocab_size: int) -> None:
        self.submit = submit
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.vocab_size = vocab_size

    async def infer(self, requests: list[Any]) -> list[dict[str, np.ndarray]]:
        """PyTriton's callable: one dict of batched arrays in, one out, for each Triton request.

        Raises BadRequest, in one sentence, for the first thing that is wrong; nothing runs then.
        """
        try:
            return list(await asyncio.gather(*(self._answer(dict(request)) for request in requests)))
        except BadRequest:
            raise
        except ValueError as error:
            raise BadRequest(one_line(error)) from None
        except Exception as error:
            _LOG.exception("a request failed")
            raise InternalError(f"internal error: {one_line(error)}") from None

    async def _answer(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        loop = asyncio.get_running_loop()
        parsed = [self._parse(arrays, row) for row in range(_num_rows(arrays))]
        waiting = [_Waiting(loop) for _ in parsed]
        requests = [
            Request(prompt_ids, sampling, self.end_id, waiter.on_update)
            for (prompt_ids, sampling), waiter in zip(parsed, waiting, strict=True)
        ]
        self.submit(*requests)
        for reason in await asyncio.gather(*(waiter.finished for waiter in waiting)):
            if reason == SHUTDOWN:
                raise BadRequest("the server stopped before the request was finished")
        return self._arrays(requests)

    def _parse(self, arrays: dict[str, np.ndarray], row: int) -> tuple[list[int], SamplingParams]:
        def value(name: str, default: Any) -> Any:
            return arrays[name][row].reshape(-1)[0].item() if name in arrays else default

        beam_width = value("beam_width", 1)
        if not 1 <= beam_width <= MAX_BEAM_WIDTH:
            raise ValueError(f"beam_width is {beam_width}; it must be {MAX_BEAM_WIDTH}")
        top_k = value("runtime_top_k", 0)
        if top_k > self.vocab_size:
            raise ValueError(f"runtime_top_k is {top_k}; the vocabulary has {self.vocab_size} tokens")
        sampling = SamplingParams(
            max_new_tokens=value("request_output_len", 0),
            temperature=value("temperature", 1.0),
            top_k=top_k,
            top_p=value("runtime_top_p", 0.0),
            random_seed=value("random_seed", 0),
        )
        return self._tokenize(arrays["prompts"][row].reshape(-1)[0], row), sampling

    def _tokenize(self, prompt: bytes | str, row: int) -> list[int]:
        try:
            text = prompt if isinstance(prompt, str) else bytes(prompt).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts[{row}] is not valid UTF-8: {error.reason} at byte {error.start}") from None
        prompt_ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        if not prompt_ids:
            raise ValueError(f"prompts[{row}] is empty; it must have at least one token")
        if max(prompt_ids) >= self.vocab_size:  # a token that was added to the tokenizer and not to the model
            raise ValueError(f"prompts[{row}] has token {max(prompt_ids)}; the vocabulary has {self.vocab_size} tokens")
        return prompt_ids

    def _arrays(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """[rows, beam 1, …] arrays; output_ids are padded to the longest row with each row's end_id."""
        rows = [request.prompt_ids + request.output_ids for request in requests]
        output_ids = np.empty((len(rows), 1, max(map(len, rows))), dtype=np.int32)
        for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
            output_ids[index] = request.end_id
            output_ids[index, 0, : len(row)] = row
        sentences = [self._text(request).encode() for request in requests]
        return {
            "sentences": np.array(sentences, dtype=object).reshape(-1, 1, 1),
            "sequence_length": np.array([[len(row)] for row in rows], dtype=np.int64),
            "output_ids": output_ids,
        }

    def _text(self, request: Request) -> str:
        """Prompt and generated text; the end token that ended it is no text."""
        output_ids = request.output_ids
        if output_ids and output_ids[-1] == request.end_id:
            output_ids = output_ids[:-1]
        return self.tokenizer.decode(request.prompt_ids + output_ids, clean_up_tokenization_spaces=False)


class _Waiting:
    """Lets a coroutine wait for a request's end, which the engine's thread reports."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.finished: asyncio.Future[str] = loop.create_future()

    def on_update(self, update: Update) -> None:
        if update.finish_reason is not None:
            self._loop.call_soon_threadsafe(self._finish, update.finish_reason)

    def _finish(self, reason: str) -> None:
        if not self.finished.done():  # its request may have been cancelled
            self.finished.set_result(reason)


def _num_rows(arrays: dict[str, np.ndarray]) -> int:
    for name in ("prompts", "request_output_len"):
        if name not in arrays:
            raise ValueError(f"{name} is missing; it is required")
    rows = len(arrays["prompts"])
    for name, array in arrays.items():
        if array.size != rows:
            raise ValueError(f"{name} has {array.size} values; it must have one for each of the {rows} prompts")
    return rows
