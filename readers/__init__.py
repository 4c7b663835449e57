"""Source checkpoints → canonical tensors: one module per architecture or trainer, streamed.

Only a reader knows its source's names, transposes and interleavings. It yields FasterTransformer's table
(weights.table), unsplit. `convert.py` splits, casts and writes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from readers.bloom import BloomReader
from readers.checkpoint import Weight, read_json
from readers.gpt2 import GPT2Reader
from readers.gpt_neox import GPTNeoXReader
from readers.gptj import GPTJReader
from readers.llama import LlamaReader
from readers.megatron import MegatronReader, is_megatron_folder
from readers.megatron_bridge import BridgeReader, is_bridge_folder
from readers.mistral import MistralReader
from readers.nemo import NemoReader, is_nemo_folder
from readers.nemo2 import Nemo2Reader, is_nemo2_folder
from readers.nemotron import NemotronReader
from readers.opt import OPTReader
from readers.phi import PhiReader
from readers.qwen2 import Qwen2Reader
from readers.qwen3 import Qwen3Reader
from readers.sharded import SourceOptions
from weights.model_config import ModelConfig

__all__ = ["READERS", "Reader", "SourceOptions", "Weight", "open_reader"]


class Reader(Protocol):
    """The interface of a source for convert.py."""

    @property
    def files(self) -> list[Path]:
        """Every file that is read or copied; they identify the source."""
        ...

    def data_type(self) -> str:
        """The stored data type that --weight-data-type auto stands for: fp32, fp16 or bf16."""
        ...

    def config(self, weight_data_type: str, tp: int, model_name: str) -> ModelConfig:
        """The model's config.ini, without reading a weight. Raises ValueError for a model that cannot be served."""
        ...

    def weights(self, config: ModelConfig) -> list[Weight]:
        """All weights of the table, checked for names, shapes and data types, not yet read.

        A tied `lm_head.weight` is left out. Raises ValueError.
        """
        ...

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, so that AutoTokenizer.from_pretrained(folder) works."""
        ...


# config.json's model_type -> the reader's class, called with the folder and the parsed config.json
READERS: dict[str, Callable[[Path, dict[str, Any]], Reader]] = {
    "bloom": BloomReader,
    "gpt2": GPT2Reader,
    "gpt_neox": GPTNeoXReader,
    "gptj": GPTJReader,
    "llama": LlamaReader,
    "mistral": MistralReader,
    "nemotron": NemotronReader,
    "opt": OPTReader,
    "phi": PhiReader,
    "qwen2": Qwen2Reader,
    "qwen3": Qwen3Reader,
}


def open_reader(source: Path, options: SourceOptions, scratch: Path) -> Reader:
    """The reader for a source; a gzipped archive is unpacked below `scratch` when it is first looked into.

    Raises ValueError for one that is missing, of an unknown kind or architecture, or that takes no such options.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such folder")
    if source.is_file() or is_nemo_folder(source):
        return NemoReader(source, options, scratch)
    path = source / "config.json"
    if not path.is_file():
        if is_nemo2_folder(source):
            return Nemo2Reader(source, options)
        if is_bridge_folder(source):  # which has files of Megatron-LM's names too
            return BridgeReader(source, options)
        if is_megatron_folder(source):
            return MegatronReader(source, options)
        archives = list(source.glob("*.nemo"))
        if len(archives) == 1:
            return NemoReader(archives[0], options, scratch)
        if archives:
            raise ValueError(f"{source}: {len(archives)} .nemo archives; give one of them")
        raise ValueError(
            f"{source}: no config.json (Hugging Face), model_config.yaml (NeMo), context/model.yaml (NeMo 2), "
            f"run_config.yaml (Megatron-Bridge) or files of ranks (Megatron-LM), so this is not a checkpoint"
        )
    if options != SourceOptions():
        raise ValueError(f"{source}: a Hugging Face checkpoint, which takes neither --tokenizer nor --num-heads")
    settings = read_json(path)
    architecture = settings.get("model_type")
    if not isinstance(architecture, str) or architecture not in READERS:
        raise ValueError(
            f"{path}: architecture {reprlib.repr(architecture)} is not supported; supported: {', '.join(READERS)}"
        )
    return READERS[architecture](source, settings)
