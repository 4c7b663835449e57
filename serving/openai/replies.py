"""The answer of a completion: its choices and its usage, whole or in pieces as the text comes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Protocol

from engine.request import CANCELLED, END_ID, LENGTH, STOP, Output
from serving.generation import Generation, Run, Update
from serving.openai.errors import bad_field
from serving.openai.log_probs import (
    ScoredToken,
    TextOffsets,
    TokenLabels,
    output_tokens,
    prompt_log_probs,
    prompt_tokens,
)
from serving.openai.model import ServedModel
from serving.openai.parameters import Ask
from serving.text import whole_text

_FINISH_REASONS = {END_ID: "stop", STOP: "stop", LENGTH: "length", CANCELLED: "abort"}
_MAX_LOG_PROBS = 1 << 18  # in one answer: more would take seconds to write


class Shape(Protocol):
    """The JSON of an endpoint's choices."""

    id_prefix: str
    kind: str
    piece_kind: str

    def log_probs(self, tokens: list[ScoredToken], labels: TokenLabels, offsets: TextOffsets) -> Any: ...
    def choice(self, index: int, text: str, log_probs: Any, finish_reason: str) -> dict[str, Any]: ...
    def piece(
        self, index: int, text: str, log_probs: Any, finish_reason: str | None, is_first: bool
    ) -> dict[str, Any]: ...


class Reply:
    """The answer of one request. Take `body` once the run has ended, or `pieces` while it goes on.

    Raises OpenAIError for one that would be too large.
    """

    def __init__(self, run: Run, ask: Ask, shape: Shape, model: ServedModel, request_id: str) -> None:
        self._run = run
        self._ask = ask
        self._shape = shape
        self._labels = TokenLabels(model.encoder.vocabulary.token_bytes, ask.tokens_as_ids)
        self._skipped = frozenset(model.encoder.tokenizer.all_special_ids) if ask.skips_special_tokens else frozenset()
        self._head: dict[str, Any] = {
            "id": shape.id_prefix + request_id,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": None,
        }
        self._check_size()

    def body(self) -> bytes:
        """The whole answer as JSON. Call it in a thread: large ones take long.

        Choices are written one by one, because nothing else runs while json writes.
        """
        head = {**self._head, "object": self._shape.kind, "usage": self._usage()}
        choices = b",".join(dumped(choice) for choice in self._choices())
        return dumped(head)[:-1] + b',"choices":[' + choices + b"]}"

    async def pieces(self) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream, the usage in one of its own at the end, where asked for."""
        head: dict[str, Any] = {**self._head, "object": self._shape.piece_kind}
        if self._ask.include_usage:
            head["usage"] = None
        if self._ask.drops_output:
            await self._run.wait()
            for piece in self._choices(as_pieces=True):
                yield {**head, "choices": [piece]}
        else:
            firsts = {id(g): number * self._ask.num_choices for number, g in enumerate(self._run.generations)}
            states: dict[int, _Choice] = {}
            async for update in self._run.updates():
                first_index = firsts[id(update.generation)]
                state = states.setdefault(first_index + update.index, _Choice(self._skipped))
                for piece in self._pieces(update, state, first_index):
                    yield {**head, "choices": [piece]}
        if self._ask.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _choices(self, as_pieces: bool = False) -> Iterator[dict[str, Any]]:
        """All choices, of an ended run; as_pieces: each in the form of a stream's only piece."""
        index = 0
        for generation in self._run.generations:
            outputs, drops = generation.outputs, self._ask.drops_output
            texts = [self._prompt_text(generation)] * len(outputs) if drops else generation.texts()
            at_prompt = {}
            if self._ask.num_prompt_log_probs is not None:
                found = prompt_log_probs(generation, self._labels, self._ask.num_prompt_log_probs)
                at_prompt = {"prompt_logprobs": found}
            for place in self._picked(outputs):
                output = outputs[place]
                finish_reason = LENGTH if drops else output.finish_reason
                assert finish_reason is not None, "the run has ended"
                reason = _FINISH_REASONS[finish_reason]
                new = slice(0) if drops else slice(None)
                log_probs = self._log_probs(generation, output, new, _Choice(self._skipped))
                if as_pieces:
                    yield self._shape.piece(index, texts[place], log_probs, reason, True)
                else:
                    yield self._shape.choice(index, texts[place], log_probs, reason) | at_prompt
                index += 1

    def _pieces(self, update: Update, state: _Choice, first_index: int) -> list[dict[str, Any]]:
        """An update as pieces: one, or one per choice where a single sample stands for all."""
        log_probs = self._log_probs(update.generation, update.output, update.new, state)
        finish_reason = update.finish_reason and _FINISH_REASONS[update.finish_reason]
        is_single = len(update.generation.outputs) == 1
        indexes = range(self._ask.num_choices) if is_single else [update.index]
        is_first, state.is_first = state.is_first, False
        return [
            self._shape.piece(first_index + index, update.text, log_probs, finish_reason, is_first) for index in indexes
        ]

    def _log_probs(self, generation: Generation, output: Output, new: slice, state: _Choice) -> Any:
        """Of the new tokens; with echo, of the prompt's before the first ones."""
        if self._ask.num_log_probs is None:
            return None
        tokens = prompt_tokens(generation) if self._ask.echo and state.is_first else []
        return self._shape.log_probs([*tokens, *output_tokens(output, new)], self._labels, state.offsets)

    def _picked(self, outputs: list[Output]) -> list[int]:
        """The samples to return: all, the only one as often as asked, or the likeliest per token of best_of."""
        num_choices = self._ask.num_choices
        if len(outputs) == 1:
            return [0] * num_choices
        places = range(len(outputs))
        if len(outputs) == num_choices:
            return list(places)
        return sorted(places, key=lambda i: -outputs[i].cum_log_prob / max(1, len(outputs[i].token_ids)))[:num_choices]

    def _prompt_text(self, generation: Generation) -> str:
        options = generation.request.text_options
        return whole_text(generation.tokenizer, generation.prompt_ids, [], **options)

    def _usage(self) -> dict[str, int]:
        """Tokens: each prompt's once, and those of all choices, or of all samples that best_of chose from."""
        num_prompt = sum(len(generation.prompt_ids) for generation in self._run.generations)
        num_new = 0
        if not self._ask.drops_output:
            for generation in self._run.generations:
                copies = self._ask.num_choices if len(generation.outputs) == 1 else 1
                num_new += copies * sum(len(output.token_ids) for output in generation.outputs)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}

    def _check_size(self) -> None:
        ask, generations = self._ask, self._run.generations
        num_prompt = sum(len(generation.prompt_ids) for generation in generations)
        num_new = sum(generation.request.sampling.max_new_tokens for generation in generations)
        total = 0
        if ask.num_log_probs is not None:
            total += (num_prompt * ask.echo + num_new) * (ask.num_log_probs + 1) * ask.num_choices
        if ask.num_prompt_log_probs is not None:
            total += num_prompt * (ask.num_prompt_log_probs + 1) * ask.num_choices
        if total > _MAX_LOG_PROBS:
            raise bad_field(
                "logprobs", f"asks for {total} log-probabilities; at most {_MAX_LOG_PROBS} are in an answer"
            )


class _Choice:
    """How far a choice is."""

    def __init__(self, skipped: frozenset[int]) -> None:
        self.is_first = True
        self.offsets = TextOffsets(skipped)


def dumped(value: Any) -> bytes:
    """JSON in ASCII: some clients take characters such as U+2028 for ends of lines. Raises ValueError for NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
