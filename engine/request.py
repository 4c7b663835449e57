"""What a user asks for and what the engine answers: Request, SamplingParams, Update. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

SEED_LIMIT = 2**64
END_ID = "end_id"  # finish reasons
LENGTH = "length"
SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. top_k 0 and top_p 0 (the default) is greedy, as in FasterTransformer.

    top_k > 0 keeps the k likeliest tokens; top_p > 0 then keeps the shortest prefix, in order of
    probability, that holds at least that mass (the token that crosses it included); top_p alone works on
    the whole vocabulary, and top_p 1 samples from the plain softmax. temperature 0 means greedy.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    random_seed: int = 0

    def __post_init__(self) -> None:
        _check("request_output_len", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("runtime_top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("runtime_top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1")
        _check("random_seed", self.random_seed, 0 <= self.random_seed < SEED_LIMIT, "between 0 and 2^64 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1 or self.temperature == 0 or (self.top_k == 0 and self.top_p == 0)


def _check(name: str, value: float, ok: bool, limit: str) -> None:
    if not ok:
        shown = f"{value:g}" if isinstance(value, float) else value  # fp32 on the wire: 1.2, not 1.2000000476837158
        raise ValueError(f"{name} is {shown}; it must be {limit}")


@dataclass
class Update:
    """News of one request: its new tokens and, once, why it ended."""

    token_ids: list[int]
    finish_reason: str | None = None  # end_id, length, shutdown; None while it runs


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine.

    `on_update` is called from the engine's thread, so it must be quick and must not raise.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    end_id: int
    on_update: Callable[[Update], None]
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token_id: int) -> None:
        """Take one generated token; end_id is kept as the last token, as FasterTransformer's op does."""
        self.output_ids.append(token_id)
        if token_id == self.end_id:
            self.finish_reason = END_ID
        elif len(self.output_ids) == self.sampling.max_new_tokens:
            self.finish_reason = LENGTH

    def publish(self, token_ids: list[int]) -> None:
        """Tell the one who waits about new tokens and, where it has ended, why."""
        self.on_update(Update(token_ids, self.finish_reason))
