"""/v1/chat/completions: messages through the chat template, and the shape of its choices."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from serving.chat import TemplateFailure
from serving.openai import parameters
from serving.openai.errors import OpenAIError, bad_field
from serving.openai.fields import Fields
from serving.openai.log_probs import ScoredToken, TextOffsets, TokenLabels, chat_log_probs
from serving.openai.model import ServedModel
from serving.openai.parameters import Ask
from serving.request import GenerationRequest
from serving.template_process import SYNTAX

# The engine's field → the API's, where chat differs from text completions.
NAMES = parameters.NAMES | {"prompt": "messages", "prompt_ids": "messages", "num_log_probs": "top_logprobs"}


def parse(fields: Fields, model: ServedModel) -> Ask:
    """Render the messages and make the request. Call it in a thread: a template may take long.

    Raises OpenAIError, or ParameterError with the engine's names, for the first thing that is wrong.
    """
    for name in ("tools", "functions", "audio"):
        fields.refuse(name, "is not supported")
    if any(kind != "text" for kind in fields.items("modalities", str)):
        raise bad_field("modalities", "is not supported, other than text")
    parameters.check_format(fields)
    wants_log_probs = fields.flag("logprobs")
    num_log_probs = parameters.count(fields, "top_logprobs") or 0
    if num_log_probs and not wants_log_probs:
        raise bad_field("top_logprobs", f"is {num_log_probs}; logprobs must be true with it")
    stream, include_usage = parameters.stream_options(fields)
    num_choices = parameters.num_choices(fields)
    max_tokens = parameters.count(fields, "max_completion_tokens")
    max_tokens_name = "max_tokens" if max_tokens is None else "max_completion_tokens"
    if max_tokens is None:
        max_tokens = parameters.count(fields, "max_tokens")
    prompt_ids = prompt_of(fields, model)
    if max_tokens is None:  # all that there is room for
        kept = fields.get("truncate_prompt_tokens", int) or -1  # -1: the whole prompt, if there is room
        num_kept = min(len(prompt_ids), kept) if kept > 0 else len(prompt_ids)
        max_tokens = max(1, model.encoder.max_seq_len - num_kept)
    max_new_tokens = max(1, max_tokens)
    params = parameters.sampling_params(fields, model, max_new_tokens, num_choices, num_log_probs)
    options = parameters.text_options(fields, model, max_new_tokens) | {"with_log_probs": wants_log_probs}
    (params,) = parameters.with_seeds(fields, params, 1)
    return Ask(
        [GenerationRequest(prompt_ids, params, **options)],
        num_choices=num_choices,
        stream=stream,
        include_usage=include_usage,
        num_log_probs=num_log_probs if wants_log_probs else None,
        tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        skips_special_tokens=options["skip_special_tokens"],
        drops_output=max_tokens == 0,
        max_tokens_name=max_tokens_name,
    )


def prompt_of(fields: Fields, model: ServedModel) -> list[int]:
    """The tokens of the field messages. The template writes special tokens itself, so none are added."""
    messages = [_message(index, item) for index, item in enumerate(fields.items("messages", dict))]
    if not messages:
        raise bad_field("messages", "is empty; it must have at least one message")
    num_bytes = sum(len(message["content"].encode(errors="replace")) for message in messages)
    most = model.encoder.max_prompt_bytes
    if num_bytes > most:
        raise bad_field("messages", f"has {num_bytes} bytes of content; at most {most} are taken")
    if len(messages) > model.encoder.max_seq_len:
        raise bad_field("messages", f"has {len(messages)} messages; at most {model.encoder.max_seq_len} are taken")
    text, adds_special_tokens = _rendered(fields, messages, model), fields.flag("add_special_tokens")
    return model.encoder.tokenize(text, add_special_tokens=adds_special_tokens)


def _message(index: int, item: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one string."""
    fields = Fields(item, f"messages[{index}].")
    if fields.get("role", str) is None:
        raise bad_field(f"messages[{index}].role", "is missing; it is required")
    content = fields.any("content")
    if isinstance(content, list):
        parts = [Fields(part, f"messages[{index}].content.") for part in fields.items("content", dict)]
        for part in parts:
            if part.any("type") != "text":
                raise bad_field(f"messages[{index}].content", "has a part that is not of type text")
        return {**item, "content": "\n".join(part.get("text", str) or "" for part in parts)}
    return {**item, "content": fields.get("content", str) or ""}


def _rendered(fields: Fields, messages: Sequence[dict[str, Any]], model: ServedModel) -> str:
    template, tokenizer = model.encoder.chat_template, model.encoder.tokenizer
    if template.text is None:
        raise OpenAIError(
            400,
            f"{model.name} has no chat template, so it takes no messages: use /v1/completions, "
            "or start the server with --chat-template FILE",
            "messages",
            "no_chat_template",
        )
    continues = fields.flag("continue_final_message")
    adds_prompt = fields.flag("add_generation_prompt", not continues)
    if continues and adds_prompt:
        raise bad_field("continue_final_message", "is true; add_generation_prompt must be false with it")
    variables = fields.get("chat_template_kwargs", dict) or {}
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "self"}
    for name in variables:
        if name in reserved:
            raise bad_field("chat_template_kwargs", f"has {name!r}, which is no variable of a template")
    try:
        return template.render(
            messages, add_generation_prompt=adds_prompt, continue_final_message=continues, variables=variables
        )
    except TemplateFailure as error:
        status = 500 if error.kind == SYNTAX else 400
        raise OpenAIError(status, str(error), "messages", for_log=error.for_log) from None


class ChatShape:
    """The JSON of chat completions, whole and in pieces."""

    id_prefix = "chatcmpl-"
    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def __init__(self, ask: Ask) -> None:
        self._num_log_probs = ask.num_log_probs

    def log_probs(self, tokens: list[ScoredToken], labels: TokenLabels, offsets: TextOffsets) -> dict[str, Any] | None:
        """The field logprobs of tokens."""
        if self._num_log_probs is None:
            return None
        return chat_log_probs(tokens, labels, self._num_log_probs)

    def choice(self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": log_probs, "finish_reason": finish_reason}

    def piece(
        self, index: int, text: str, log_probs: dict[str, Any] | None, finish_reason: str | None, is_first: bool
    ) -> dict[str, Any]:
        """A piece of a choice, in a stream. The role comes with the first text: clients time the first piece."""
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish_reason}
