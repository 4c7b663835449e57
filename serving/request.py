"""One prompt and how to continue it, in no front end's format.

Front ends make `GenerationRequest`s of their own formats; serving/tokenization.py checks and tokenizes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.request import ParameterError, SamplingParams


@dataclass(frozen=True)
class Chat:
    """A conversation in place of a prompt: a JSON list of messages. The chat template makes the prompt of it."""

    messages: str


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One prompt with its parameters and options. Raises ParameterError for a deadline that is not above 0.

    prompt: text (bytes are UTF-8), a chat, or token ids. Any sequence of integers will do: it is copied once its length
    is known to be within the limits.
    add_special_tokens: those that the tokenizer puts around a text.
    truncate_prompt_tokens: only so many tokens of the prompt are kept, the last ones; None: all.
    start_id: stands for an empty prompt.
    end_ids: tokens that end the text; None: the model's own. ignore_eos: no token ends it.
    stop_words end the text and are cut from it, unless keep_stop_word; bad_words are never generated.
    with_prompt: the text begins with the prompt's.
    with_log_probs: the log-probability of each new token is asked for.
    request_id: `Generator.stop` knows the request by it while it runs.
    deadline_s: seconds after which the request ends with the tokens that it has.
    """

    prompt: str | bytes | Chat | Sequence[int]
    sampling: SamplingParams
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    start_id: int | None = None
    end_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    stop_words: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    with_prompt: bool = False
    keep_stop_word: bool = False
    skip_special_tokens: bool = True
    with_log_probs: bool = False
    request_id: str | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ParameterError("deadline_s", f"is {self.deadline_s:g}; it must be above 0")

    @property
    def text_options(self) -> dict[str, Any]:
        """The keyword arguments of serving.text's TextStream and whole_text."""
        return {
            "with_prompt": self.with_prompt,
            "skip_special_tokens": self.skip_special_tokens,
            "stop_words": self.stop_words,
            "keep_stop_word": self.keep_stop_word,
        }


class Prompts(Protocol):
    """The prompts of one front-end request. Their number is known before any is parsed: reading one may parse it."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[GenerationRequest]: ...
