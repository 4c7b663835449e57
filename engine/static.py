"""Schedules static batches for FasterTransformer's op. Numbers only: no torch.

Forms batches, refuses requests that the op cannot run (`check`), and cuts each result to its own length and at its
stop words. executor.fastertransformer calls the op.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from engine.metrics import Progress
from engine.request import SHUTDOWN, Output, ParameterError, Request, SamplingParams, check_length
from engine.waiting import WaitingQueue

_MAX_TOP_K = 1024  # the op clips silently (TopKSamplingLayer.cu)
_MAX_PENALIZED_LEN = 6144  # 8 bytes of 48 KiB of shared memory per token (sampling_penalty_kernels.cu)

# field -> the one value that the op has
_ONLY_VALUES: dict[str, Any] = {
    "frequency_penalty": 0,
    "min_p": 0,
    "top_p_decay": 1,
    "early_stopping": "false",
    "num_log_probs": 0,
    "prompt_log_probs": False,  # and so no num_prompt_log_probs
    "next_token_logits": False,
}


@dataclass(frozen=True)
class RequestRow:
    """One row of a batch: a prompt with the parameters of one sample, or of one beam search."""

    prompt_ids: list[int]
    sampling: SamplingParams
    bad_word_ids: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Rows that run together, from first to last token, the same on every rank."""

    rows: list[RequestRow]

    @property
    def beam_width(self) -> int:
        return self.rows[0].sampling.beam_width

    @property
    def num_steps(self) -> int:
        """The batch's output length: that of its longest request."""
        return max(row.sampling.max_new_tokens for row in self.rows)

    @property
    def num_sequences(self) -> int:
        """Sequences that get tokens."""
        return len(self.rows) * self.beam_width

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and outputs, the longest output for all."""
        return sum(len(row.prompt_ids) for row in self.rows) + self.num_steps * self.num_sequences


class StaticScheduler:
    """Batches in order of arrival, with turns (engine.waiting): each is formed around the first in line.

    It takes in those behind it, in their order, that fit (`_Group`); the others keep their places in line. So a
    request may be overtaken while it does not fit, but only until it is the first in line: an origin that comes where
    n others wait has a request in the (n + 1)-th batch at the latest. A batch runs to its end whatever becomes of its
    requests.
    """

    has_token_log_probs = False
    kv_cache_usage = 0.0  # the op keeps it to itself

    def __init__(self, max_batch_size: int, max_seq_len: int, end_id: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.end_id = end_id
        self.waiting = WaitingQueue()
        self._running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_cohorts(self) -> int:
        return 1

    def check(self, request: Request) -> None:
        """Raise ParameterError for a request that the op cannot run. May be called from any thread."""
        params = request.sampling
        for field, value in _ONLY_VALUES.items():
            if getattr(params, field) != value:
                given = _shown(getattr(params, field))
                raise ParameterError(field, f"is {given}; with the FasterTransformer engine it must be {_shown(value)}")
        if params.logit_bias:
            raise ParameterError("logit_bias", "is given; the FasterTransformer engine does not have it")
        if params.openai_penalties and params.presence_penalty != 0:
            raise ParameterError(
                "presence_penalty",
                f"is {params.presence_penalty:g} and counts the output only; "
                "with the FasterTransformer engine it must be 0 then",
            )
        if not request.end_ids:
            raise ParameterError("ignore_eos", "is true; with the FasterTransformer engine it must be false")
        if request.end_ids != (self.end_id,):
            shown = ", ".join(map(str, request.end_ids))
            raise ParameterError(
                "end_id", f"is {shown}; with the FasterTransformer engine it must be the model's, {self.end_id}"
            )
        if params.top_k > _MAX_TOP_K and not params.is_greedy:
            raise ParameterError(
                "top_k", f"is {params.top_k}; with the FasterTransformer engine it must be at most {_MAX_TOP_K}"
            )
        if any(word[-1] == 0 for word in request.bad_word_ids):
            raise ParameterError(
                "bad_words", "has a word whose last token is 0, the one that FasterTransformer never bans"
            )
        if params.width > self.max_batch_size:
            name = "n" if params.n > 1 else "beam_width"
            raise ParameterError(name, f"is {params.width}; at most {self.max_batch_size} sequences run at once")
        check_length(request, self.max_seq_len, "the longest sequence served")
        if _penalty(params) is not None:
            what = f"the longest sequence to which FasterTransformer applies a {_penalty(params)}"
            check_length(request, _MAX_PENALIZED_LEN, what)

    def add(self, request: Request) -> None:
        """Queue a request that `check` let pass."""
        self.waiting.add(request)

    def schedule(self) -> Batch | None:
        """The next batch, or None where nothing waits or one is on its way."""
        if self._running or not self.waiting:
            return None
        group = _Group(self.max_batch_size, self.max_seq_len)
        for request in list(self.waiting):
            if group.take(request):
                self.waiting.take(request)
        self._running = group.requests
        now = time.monotonic()
        for request in self._running:
            request.times.scheduled = now
        return Batch([row for request in self._running for row in _rows(request)])

    def commit(self, results: list[list[Output]]) -> Progress:
        """Take what the op gave: per row one sequence, or its beams, best first, each as long as the whole batch."""
        requests, self._running = self._running, []
        rows = iter(results)
        now = time.monotonic()
        progress = Progress()
        for request in requests:
            sequences = [sequence for _ in range(request.sampling.n) for sequence in next(rows)]
            if request.is_finished:  # ended while the batch ran
                continue
            outputs = request.outputs if len(sequences) == request.sampling.n else [Output() for _ in sequences]
            for output, sequence in zip(outputs, sequences, strict=True):
                _cut(request, sequence, output)
            request.outputs = outputs
            request.times.first_token = now
            request.finish(now)
            progress.started.append(request)
            progress.finished.append(request)
            if request.sampling.beam_width == 1:
                progress.num_tokens += sum(len(output.token_ids) for output in outputs)
            request.on_update(request)
        return progress

    def cancel(self, request: Request, reason: str) -> None:
        """End a request: one that runs gets nothing, and its rows are dropped when the batch ends."""
        if request.is_finished:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        elif request not in self._running:  # it never came
            return
        request.end(reason)

    def unfinished(self) -> list[Request]:
        """The requests that run, then those that wait."""
        return [*self._running, *self.waiting]

    def abort_all(self) -> None:
        """End every request; the running batch's tokens are dropped when they come."""
        for request in self.unfinished():
            self.cancel(request, SHUTDOWN)


class _Group:
    """A batch that is being formed.

    The op pads prompts to the longest and generates the longest output for all, so longest prompt + longest output
    must stay within its positions; and some things it takes once for all rows (`_kind`, `_penalty`).
    """

    def __init__(self, max_batch_size: int, max_seq_len: int) -> None:
        self.requests: list[Request] = []
        self._max_batch_size = max_batch_size
        self._max_seq_len = max_seq_len
        self._num_sequences = self._prompt_len = self._output_len = 0
        self._penalty: str | None = None

    def take(self, request: Request) -> bool:
        """Take a request in where it fits; says whether it does."""
        params = request.sampling
        num_sequences = self._num_sequences + params.width
        prompt_len = max(self._prompt_len, len(request.prompt_ids))
        output_len = max(self._output_len, params.max_new_tokens)
        penalty = self._penalty or _penalty(params)
        limit = min(self._max_seq_len, _MAX_PENALIZED_LEN) if penalty else self._max_seq_len
        if num_sequences > self._max_batch_size or prompt_len + output_len > limit:
            return False
        if _penalty(params) not in (None, penalty):
            return False
        if self.requests and _kind(request) != _kind(self.requests[0]):
            return False
        self.requests.append(request)
        self._num_sequences, self._prompt_len, self._output_len = num_sequences, prompt_len, output_len
        self._penalty = penalty
        return True


def _kind(request: Request) -> tuple[Any, ...]:
    """What all requests of a batch must have in common, for a result that does not depend on the others.

    The op counts padding where it looks back for a bad word of several tokens, and in a beam's length; applies the
    first row's parameters to the beams of all; searches as many steps for all; and finds other rows' beams in the place
    of a row's own for bad words, with several pipeline stages.
    """
    params = request.sampling
    has_long_word = any(len(word) > 1 for word in request.bad_word_ids)
    prompt_len = len(request.prompt_ids)
    if params.beam_width == 1:
        return (1, prompt_len if has_long_word else None)
    return (
        params.beam_width,
        prompt_len if params.len_penalty else None,
        params.max_new_tokens,
        params.temperature or 1.0,
        params.repetition_penalty,
        params.presence_penalty,
        params.min_length,
        params.len_penalty,
        params.beam_search_diversity_rate,
        id(request) if request.bad_word_ids else None,
    )


def _penalty(params: SamplingParams) -> str | None:
    """Which of the two penalties a request has: the op takes one or the other for a batch."""
    if params.repetition_penalty != 1:
        return "repetition_penalty"
    return "presence_penalty" if params.presence_penalty != 0 else None


def _rows(request: Request) -> list[RequestRow]:
    samples = [request.sampling.for_sample(index) for index in range(request.sampling.n)]
    return [RequestRow(request.prompt_ids, params, request.bad_word_ids) for params in samples]


def _cut(request: Request, sequence: Output, output: Output) -> None:
    """Fill an output with the op's tokens up to the one that ends it.

    The op's log-probability is of all that it generated: it is unknown (NaN) for a text that ends before that, at a
    stop word or because the batch has a longer request.
    """
    for token_id in sequence.token_ids:
        output.token_ids.append(token_id)
        reason = request.reason_to_end(output.token_ids)
        if reason is not None:
            break
    assert reason is not None, (len(sequence.token_ids), request.sampling.max_new_tokens)
    is_whole = output.token_ids[-1] in request.end_ids or len(output.token_ids) == len(sequence.token_ids)
    output.cum_log_prob = sequence.cum_log_prob if is_whole else math.nan
    output.finish_reason = reason


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
