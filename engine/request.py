"""Requests and answers: SamplingParams, Request, Output, and the error that names a wrong parameter. No torch here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

SEED_LIMIT = 2**64
_COUNT_LIMIT = 2**32  # beyond it, a count may not fit into the executor's tensors
MAX_BEAM_WIDTH = 16
MAX_N = 64
MAX_LOGIT_BIASES = 1024
# Beyond these, numbers of a step would leave what fp32 (or a power of the length) can hold.
_LEAST_FACTOR, _MOST, _MOST_EXPONENT = 1e-3, 1e3, 10

END_ID = "end_id"  # finish reasons
LENGTH = "length"
STOP = "stop"  # a stop word
CANCELLED = "cancelled"  # by the one who asked, or at the deadline
SHUTDOWN = "shutdown"

_EARLY_STOPPING = ("false", "true", "never")


class EngineBusy(RuntimeError):
    """The engine takes no request now, and may take it later."""


class EngineStopping(EngineBusy):
    """The server stops: it takes no new request, or ended one before it was finished."""


class ParameterError(ValueError):
    """A wrong parameter, by the engine's name; a front end puts its own names in with `sentence`.

    field: the parameter; rest: the sentence after it, with {} for the name of each of `others`; index: the prompt
    that it belongs to, for parameters that each prompt has.
    """

    def __init__(self, field: str, rest: str, *others: str, index: int | None = None) -> None:
        self.field = field
        self.rest = rest
        self.others = others
        self.index = index
        super().__init__(self.sentence({}))

    def sentence(self, names: Mapping[str, str]) -> str:
        """The error's sentence. names: field -> the front end's name; others keep the engine's."""
        field, *others = (names.get(name, name) for name in (self.field, *self.others))
        place = "" if self.index is None else f"[{self.index}]"
        return f"{field}{place} {self.rest.format(*others) if others else self.rest}"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. top_k 0 and top_p 0 (the default) is greedy, as in FasterTransformer.

    top_k > 0 keeps the k likeliest tokens; top_p > 0 then keeps the shortest prefix, in order of probability, that
    holds at least that mass (the token that crosses it included); top_p alone works on the whole vocabulary, and
    top_p 1 samples from the plain softmax. Before both, min_p leaves the tokens that have at least min_p of the
    likeliest one's probability (after the temperature). temperature 0 means greedy. `n` samples of one prompt have the
    seeds random_seed, random_seed + 1, …

    top_p_decay: after each token top_p becomes max(top_p · top_p_decay, top_p_min), and what it was at first after
    the token top_p_reset_id (FasterTransformer, sampling_topp_kernels.cu, computeToppDecay).

    repetition_penalty r: a logit l of a token that the prompt or the output has is l / r, or l · r where it is
    negative; presence_penalty is subtracted from it instead, after the temperature (FasterTransformer,
    sampling_penalty_kernels.cu, RepetitionPenaltyType); frequency_penalty is subtracted as often as the output has
    the token (OpenAI's definition). With openai_penalties, presence_penalty and frequency_penalty are as OpenAI defines
    both: they count the output only and are subtracted before the temperature. min_length: the end token is not chosen
    as one of the first min_length tokens.

    logit_bias: (token id, bias) pairs; a bias is added to its token's logit before everything else, so it changes a
    greedy choice too. Biases of one token add up.

    beam_width > 1 is beam search, which does not sample: `engine.beam` has its rules.

    Raises ParameterError for a value that no model could take.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    random_seed: int = 0
    top_p_decay: float = 1.0
    top_p_min: float = 1e-6
    top_p_reset_id: int = -1  # none
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    openai_penalties: bool = False
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_length: int = 0
    n: int = 1
    beam_width: int = 1
    len_penalty: float | None = None  # the executor's own: 1 for the torch engine
    beam_search_diversity_rate: float = 0.0
    early_stopping: str = "false"
    num_log_probs: int = 0  # alternatives to report per generated token
    prompt_log_probs: bool = False
    num_prompt_log_probs: int = 0  # alternatives to report per prompt token
    next_token_logits: bool = False

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        is_usable = self.temperature == 0 or _LEAST_FACTOR <= self.temperature <= _MOST
        _check("temperature", self.temperature, is_usable, f"0, or between {_LEAST_FACTOR:g} and {_MOST:g}")
        _check("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1")
        _check("random_seed", self.random_seed, 0 <= self.random_seed < SEED_LIMIT, "between 0 and 2^64 - 1")
        _check("top_p_decay", self.top_p_decay, 0 < self.top_p_decay <= 1, "above 0 and at most 1")
        _check("top_p_min", self.top_p_min, 0 < self.top_p_min <= 1, "above 0 and at most 1")
        penalty = self.repetition_penalty
        limit = f"between {_LEAST_FACTOR:g} and {_MOST:g}"
        _check("repetition_penalty", penalty, _LEAST_FACTOR <= penalty <= _MOST, limit)
        for name in ("presence_penalty", "frequency_penalty", "beam_search_diversity_rate"):
            value = getattr(self, name)
            _check(name, value, abs(value) <= _MOST, f"between -{_MOST:g} and {_MOST:g}")
        exponent = 0.0 if self.len_penalty is None else self.len_penalty
        _check(
            "len_penalty", exponent, abs(exponent) <= _MOST_EXPONENT, f"between -{_MOST_EXPONENT} and {_MOST_EXPONENT}"
        )
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _check_biases(self.logit_bias)
        _check("n", self.n, 1 <= self.n <= MAX_N, f"between 1 and {MAX_N}")
        _check("beam_width", self.beam_width, 1 <= self.beam_width <= MAX_BEAM_WIDTH, f"between 1 and {MAX_BEAM_WIDTH}")
        for name in ("top_k", "min_length", "num_log_probs", "num_prompt_log_probs"):
            count = getattr(self, name)
            _check(name, count, 0 <= count < _COUNT_LIMIT, "between 0 and 2^32 - 1")
        _check("early_stopping", self.early_stopping, self.early_stopping in _EARLY_STOPPING, "false, true or never")
        self._check_together()

    def _check_together(self) -> None:
        if self.repetition_penalty != 1 and self.presence_penalty != 0 and not self.openai_penalties:
            raise ParameterError(
                "repetition_penalty",
                f"is {self.repetition_penalty:g} and {{}} {self.presence_penalty:g}; at most one of the two can be set",
                "presence_penalty",
            )
        if self.n > 1 and self.beam_width > 1:
            raise ParameterError("n", f"is {self.n} and {{}} {self.beam_width}; one of the two must be 1", "beam_width")
        if self.n > 1 and self.is_greedy:
            raise ParameterError(
                "n", f"is {self.n}; with greedy choice it must be 1 (set {{}} or {{}})", "top_k", "top_p"
            )
        if self.num_prompt_log_probs and not self.prompt_log_probs:
            raise ParameterError(
                "num_prompt_log_probs", f"is {self.num_prompt_log_probs}; it needs {{}}", "prompt_log_probs"
            )

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0 or (self.top_k == 0 and self.top_p == 0)

    @property
    def width(self) -> int:
        """Sequences that the request runs at once."""
        return max(self.n, self.beam_width)

    def for_sample(self, index: int) -> SamplingParams:
        """The parameters of the index-th of n samples: a request of one sample with that seed gives the same text."""
        if index == 0 or self.n == 1:
            return self
        return dataclasses.replace(self, n=1, random_seed=(self.random_seed + index) % SEED_LIMIT)

    @property
    def has_penalty(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _check(field: str, value: Any, ok: bool, limit: str) -> None:
    if not ok:
        shown = f"{value:g}" if isinstance(value, float) else value  # fp32 on the wire: 1.2, not 1.2000000476837158
        raise ParameterError(field, f"is {shown}; it must be {limit}")


def _check_biases(biases: tuple[tuple[int, float], ...]) -> None:
    if len(biases) > MAX_LOGIT_BIASES:
        raise ParameterError("logit_bias", f"has {len(biases)} tokens; at most {MAX_LOGIT_BIASES} are allowed")
    for token_id, bias in biases:
        if token_id < 0:
            raise ParameterError("logit_bias", f"has token {token_id}; it must be 0 or more")
        if not abs(bias) <= _MOST:
            raise ParameterError(
                "logit_bias", f"has {bias:g} for token {token_id}; it must be between -{_MOST:g} and {_MOST:g}"
            )


class Words(Protocol):
    """A request's stop and bad words, matched over the bytes of tokens (engine.words)."""

    always_banned: list[int]
    has_bad: bool
    has_stop: bool

    def banned(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> list[int]: ...
    def stops(self, output_ids: Sequence[int]) -> bool: ...


@dataclass(frozen=True)
class Token:
    """A chosen token: its log-probability under the model's own logits, and the likeliest ones in its place."""

    token_id: int
    log_prob: float = 0.0
    alternatives: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), likeliest first


@dataclass
class Output:
    """One generated sequence. Its lists only grow; beams come all at once."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)  # per token, if asked for
    cum_log_prob: float = 0.0
    finish_reason: str | None = None

    def append(self, token_id: int, log_prob: float) -> None:
        """Take one more token; its alternatives, if any, are there already."""
        self.log_probs.append(log_prob)
        self.cum_log_prob += log_prob
        self.token_ids.append(token_id)  # last: a concurrent reader goes by the number of tokens

    def extended(self, token: Token) -> Output:
        """A copy with one more token."""
        alternatives = [*self.alternatives, token.alternatives] if token.alternatives else self.alternatives
        copy = Output(self.token_ids[:], self.log_probs[:], alternatives[:], self.cum_log_prob)
        copy.append(token.token_id, token.log_prob)
        return copy


@dataclass(slots=True)
class Times:
    """When things happened to a request, in seconds of time.monotonic(); 0: not yet, or never.

    arrived: it was submitted; scheduled: it got its slots; first_token, last_token: of all its outputs.
    """

    arrived: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine.

    The engine's thread calls `on_update` whenever outputs have grown or ended: it must be quick and must not raise.
    Other threads may read the outputs at any time: lists grow by appending, and a finish_reason is set after the last
    token. end_ids: each of them ends the text. origin: requests that were submitted together have the same one.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    end_ids: tuple[int, ...] = ()
    on_update: Callable[[Request], None] = lambda request: None
    words: Words | None = None
    bad_word_ids: list[list[int]] = field(default_factory=list)  # as tokens, for an executor that knows no text
    outputs: list[Output] = field(default_factory=list)  # n samples, or beams, best first, once they have ended
    prompt_log_probs: list[float] = field(default_factory=list)  # of prompt_ids[1:], where asked for
    prompt_alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)  # in their places, as asked
    next_token_logits: Sequence[float] | None = None  # [vocab], of the first new token, where asked for
    is_finished: bool = False
    origin: object | None = None
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        if not self.outputs:
            self.outputs = [Output() for _ in range(self.sampling.n)]

    @property
    def output_ids(self) -> list[int]:
        """The first (often the only) output's tokens."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    def reason_to_end(self, output_ids: list[int]) -> str | None:
        """Why a sequence ends with its last token; an end token stays in it, as with FasterTransformer's op."""
        if output_ids[-1] in self.end_ids:
            return END_ID
        if self.words is not None and self.words.has_stop and self.words.stops(output_ids):
            return STOP
        return LENGTH if len(output_ids) == self.sampling.max_new_tokens else None

    def finish(self, now: float) -> None:
        """Mark it as finished by its last token, which came at `now`."""
        self.times.last_token = self.times.finished = now
        self.is_finished = True  # last: a concurrent reader of the times goes by it

    def end(self, reason: str) -> None:
        """End every output that has not ended, and call on_update."""
        for output in self.outputs:
            output.finish_reason = output.finish_reason or reason
        self.times.finished = time.monotonic()
        self.is_finished = True
        self.on_update(self)


def check_length(request: Request, limit: int, what: str) -> None:
    """Raise ParameterError where prompt and output together exceed `limit` tokens of `what`."""
    total = len(request.prompt_ids) + request.sampling.max_new_tokens
    if total > limit:
        raise ParameterError(
            "max_new_tokens",
            f"is {request.sampling.max_new_tokens}; with the prompt's {len(request.prompt_ids)} tokens "
            f"that is {total}, and {what} is {limit} tokens",
        )
