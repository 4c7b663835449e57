"""Source checkpoints → canonical tensors: one module an architecture, streamed.

A reader alone knows its source's names, transposes and interleavings; what it gives is FasterTransformer's table
(engine.weights), unsplit. `convert.py` splits, casts and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from engine.config import ModelConfig
from readers.checkpoint import Weight, read_json
from readers.gpt2 import GPT2Reader

__all__ = ["READERS", "Reader", "Weight", "open_reader"]


class Reader(Protocol):
    """What convert.py asks of a source."""

    files: list[Path]  # every file that is read or copied: the source's identity

    def data_type(self) -> str:
        """The stored data type that --weight-data-type auto stands for: fp32, fp16 or bf16."""
        ...

    def config(self, weight_data_type: str, tp: int, model_name: str) -> ModelConfig:
        """The model's config.ini; reads no weight file. Raises ValueError for what cannot be served."""
        ...

    def weights(self, config: ModelConfig) -> list[Weight]:
        """All weights of the table, checked for names, shapes and data types, none of them read yet.

        `lm_head.weight` is left out where it is the embedding. Raises ValueError.
        """
        ...

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, so that AutoTokenizer.from_pretrained(folder) works."""
        ...


# config.json's model_type -> what makes a reader from the folder and the parsed config.json
READERS: dict[str, Callable[[Path, dict[str, Any]], Reader]] = {"gpt2": GPT2Reader}


def open_reader(source: Path) -> Reader:
    """The reader for a source. Raises ValueError for one that is missing or of an unknown architecture."""
    if not source.is_dir():
        raise ValueError(f"{source}: {'not a folder' if source.exists() else 'no such folder'}")
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source}: no config.json, so this is not a Hugging Face checkpoint")
    settings = read_json(path)
    architecture = settings.get("model_type")
    if architecture not in READERS:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(READERS)}")
    return READERS[architecture](source, settings)
