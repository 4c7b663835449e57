"""/tokenize, /detokenize and /tokenizer_info: the tokenizer, for clients that have none of their own."""

from __future__ import annotations

from typing import Any

from serving.openai.chat import prompt_of
from serving.openai.errors import bad_field
from serving.openai.fields import Fields
from serving.openai.model import ServedModel

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenize(fields: Fields, model: ServedModel) -> dict[str, Any]:
    """The tokens of the field prompt, or of messages through the chat template. Call it in a thread.

    Raises OpenAIError, or ParameterError with the engine's names.
    """
    if fields.any("messages") is not None:
        token_ids = prompt_of(fields, model)
    else:
        prompt = fields.get("prompt", str)
        if prompt is None:
            raise bad_field("prompt", "is missing; it must be a string")
        adds_special_tokens = fields.flag("add_special_tokens", True)
        token_ids = model.encoder.tokenize(prompt, add_special_tokens=adds_special_tokens)
    answer = {"count": len(token_ids), "max_model_len": model.encoder.max_seq_len, "tokens": token_ids}
    if fields.flag("return_token_strs"):
        answer["token_strs"] = model.encoder.tokenizer.convert_ids_to_tokens(token_ids)
    return answer


def detokenize(fields: Fields, model: ServedModel) -> dict[str, Any]:
    """The text of the field tokens. Call it in a thread."""
    encoder = model.encoder
    if fields.any("tokens") is None:
        raise bad_field("tokens", "is missing; it must be a list of token ids")
    token_ids = fields.items("tokens", int)
    if len(token_ids) > encoder.max_seq_len:
        raise bad_field("tokens", f"has {len(token_ids)} tokens; at most {encoder.max_seq_len} are taken")
    for token_id in token_ids:
        if not 0 <= token_id < encoder.vocab_size:
            raise bad_field("tokens", f"has {token_id}; it must be between 0 and {encoder.vocab_size - 1}")
    return {"prompt": encoder.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)}


def describe(model: ServedModel) -> dict[str, Any]:
    """What a client needs to know of the tokenizer: class, special tokens, chat template, limits. No paths."""
    tokenizer = model.encoder.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: getattr(tokenizer, name, None) for name in _SPECIAL_TOKENS},
        "chat_template": model.encoder.chat_template.text,
        "vocab_size": model.encoder.vocab_size,
        "model_max_length": model.encoder.max_seq_len,
    }
