"""The tokens that end a text: transformers' generation_config.json lists them, beside a model's or tokenizer's own."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from readers.checkpoint import read_json

GENERATION_CONFIG = "generation_config.json"


def listed_end_ids(path: Path) -> Any:
    """eos_token_id of a generation_config.json, not yet checked; None where it lists none or is not there."""
    return read_json(path).get("eos_token_id") if path.is_file() else None


def check_end_ids(path: Path, value: Any, own: Any, vocab_size: int) -> tuple[int, ...]:
    """One id or a list, as `path` has it → all ids; `own`, the model's, comes first if it is one of them.

    FasterTransformer gets the first. Raises ValueError.
    """
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(is_token_id(one, vocab_size) for one in listed):
        raise ValueError(f"{path}: eos_token_id is {reprlib.repr(value)}; it must be one of the {vocab_size} token ids")
    return tuple(sorted(dict.fromkeys(listed), key=lambda token_id: token_id != own))


def is_token_id(value: Any, vocab_size: int) -> bool:
    """Whether a value of a file is one of the vocabulary's ids."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
