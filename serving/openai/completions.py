"""/v1/completions: its request, and the shape of its choices."""

from __future__ import annotations

from typing import Any

from serving.openai import parameters
from serving.openai.errors import bad_field
from serving.openai.fields import Fields
from serving.openai.log_probs import ScoredToken, TextOffsets, TokenLabels, completion_log_probs
from serving.openai.model import ServedModel
from serving.openai.parameters import Ask
from serving.request import GenerationRequest

_MAX_PROMPTS = _MAX_SAMPLES = 1024  # in one request
_DEFAULT_MAX_TOKENS = 16


def parse(fields: Fields, model: ServedModel) -> Ask:
    """Raises OpenAIError, or ParameterError with the engine's names, for the first thing that is wrong."""
    fields.refuse("suffix", "is not supported: the model cannot insert text")
    parameters.check_format(fields)
    prompts = _prompts(fields)
    max_tokens = parameters.count(fields, "max_tokens")
    max_tokens = _DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    max_new_tokens = max(1, max_tokens)
    echo, num_log_probs = fields.flag("echo"), parameters.count(fields, "logprobs")
    num_prompt_log_probs = parameters.count(fields, "prompt_logprobs")
    stream, include_usage = parameters.stream_options(fields)
    if stream and num_prompt_log_probs is not None:
        raise bad_field("prompt_logprobs", "is set; a stream does not have them (echo with logprobs does)")
    at_prompt = [n for n in (num_log_probs if echo else None, num_prompt_log_probs) if n is not None]
    num_choices = parameters.num_choices(fields)
    params = parameters.sampling_params(
        fields, model, max_new_tokens, num_choices, num_log_probs or 0, max(at_prompt, default=None)
    )
    num_samples = len(prompts) * max(params.n, num_choices)
    if num_samples > _MAX_SAMPLES:
        raise bad_field("n", f"asks for {num_samples} choices of all prompts; at most {_MAX_SAMPLES} are made at once")
    options = parameters.text_options(fields, model, max_new_tokens)
    options |= {
        "with_prompt": echo,
        "with_log_probs": num_log_probs is not None,
        "add_special_tokens": fields.flag("add_special_tokens", True),
    }
    samplings = parameters.with_seeds(fields, params, len(prompts))
    return Ask(
        [GenerationRequest(prompt, own, **options) for prompt, own in zip(prompts, samplings, strict=True)],
        num_choices=num_choices,
        stream=stream,
        include_usage=include_usage,
        echo=echo,
        num_log_probs=num_log_probs,
        num_prompt_log_probs=num_prompt_log_probs,
        tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        skips_special_tokens=options["skip_special_tokens"],
        drops_output=max_tokens == 0,
    )


def _prompts(fields: Fields) -> list[Any]:
    """A string, a list of strings, token ids, or lists of token ids, as a list of prompts."""
    given = fields.any("prompt")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise bad_field("prompt", "must be a string, token ids, or a list of either, with at least one item")
    kind = type(given[0])
    if kind is not int and len(given) > _MAX_PROMPTS:
        raise bad_field("prompt", f"has {len(given)} prompts; at most {_MAX_PROMPTS} are taken at once")
    for index, item in enumerate(given):
        is_right = type(item) is kind and kind in (int, str, list)
        if not is_right or (kind is list and not all(type(token_id) is int for token_id in item)):
            raise bad_field("prompt", f"has an item ({index}) that is no text or tokens, or unlike the first one")
    return [given] if kind is int else given


class CompletionShape:
    """The JSON of text completions, whole and in pieces."""

    id_prefix = "cmpl-"
    kind = piece_kind = "text_completion"

    def __init__(self, ask: Ask) -> None:
        self._num_log_probs = ask.num_log_probs

    def log_probs(self, tokens: list[ScoredToken], labels: TokenLabels, offsets: TextOffsets) -> dict[str, Any] | None:
        """The field logprobs of tokens; offsets: of the text so far."""
        if self._num_log_probs is None:
            return None
        return completion_log_probs(tokens, labels, self._num_log_probs, offsets)

    def choice(self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str) -> dict[str, Any]:
        """A whole choice."""
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}

    def piece(
        self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None, is_first: bool
    ) -> dict[str, Any]:
        """A piece of a choice, in a stream."""
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}
