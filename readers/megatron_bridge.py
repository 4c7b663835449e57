"""Megatron-Bridge GPT: a folder of iterations, or one iteration → settings, shards and tokenizer.

Owns the location of the settings (run_config.yaml), of the latest iteration and of the tokenizer's files.
Megatron-Bridge itself is not needed, and nothing of the checkpoint is executed. It knows no tensor.

Format: NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/training: checkpointing.py (save_checkpoint,
save_tokenizer_assets), utils/checkpoint_utils.py (names of files), state.py (train_state.pt), tokenizers/config.py.
"""

from __future__ import annotations

import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from readers import tokens
from readers.archive import file_place, folder_files
from readers.core_settings import CoreReader, core_settings
from readers.distributed import DistributedCheckpoint
from readers.megatron import latest_iteration
from readers.pickles import check_tensor
from readers.settings_file import read_yaml
from readers.sharded import Settings, SourceOptions
from readers.tokens import CheckpointTokenizer
from readers.torchfile import load

_CONFIG = "run_config.yaml"
_STATE = "latest_train_state.pt"
_OTHERS = ("hf/", "tokenizer/")  # folders beside the weights


def is_bridge_folder(folder: Path) -> bool:
    """Whether a folder holds iterations of Megatron-Bridge, or is one."""
    names = (_STATE, *(f"{level}{_CONFIG}" for level in ("", "iter_*/", "release/")))
    return any(any(folder.glob(name)) for name in names)


class BridgeReader(CoreReader):
    """Reads a checkpoint's latest iteration, or the iteration that the folder is."""

    def __init__(self, source: Path, options: SourceOptions) -> None:
        """Raises ValueError where files are missing."""
        self.source = source
        self._options = options
        options.refuse_num_heads(source)
        self._folder = folder = _iteration(source)
        if not (folder / _CONFIG).is_file():
            raise ValueError(f"{folder}: {_CONFIG} is missing")
        files = {name: place for name, place in folder_files(folder).items() if not name.startswith(_OTHERS)}
        self.weights_files = DistributedCheckpoint(files, str(folder))
        self._tokenizer_path = folder / "tokenizer" if options.tokenizer is None else options.tokenizer
        self.files = [place.path for place in files.values()] + tokens.find_files(self._tokenizer_path)

    @cached_property
    def _run(self) -> dict[str, Any]:
        """run_config.yaml: `model`, `tokenizer` and others. Raises ValueError, for an adapter too."""
        place = file_place(self._folder / _CONFIG)
        values = read_yaml(place)
        if not isinstance(values, dict):
            raise ValueError(f"{place.name}: settings are expected, not {type(values).__name__}")
        if values.get("peft") is not None:
            raise ValueError(f"{place.name}: peft is set: the weights are an adapter's; merge it into its model first")
        return values

    @cached_property
    def settings(self) -> Settings:
        """The settings of `model`."""
        return core_settings(self._run.get("model"), f"{self._folder / _CONFIG}: model")

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        if self._options.tokenizer is not None or tokens.find_files(self._tokenizer_path):
            return tokens.from_path(self._tokenizer_path)
        values = self._run.get("tokenizer")
        values = values if isinstance(values, dict) else {}
        kind, model = values.get("tokenizer_type"), values.get("tokenizer_model")
        if kind == "HuggingFaceTokenizer" and isinstance(model, str):
            return tokens.hub(model, None, f"{self._folder / _CONFIG}: tokenizer.tokenizer_model")
        raise ValueError(
            f"{self._folder}: no tokenizer folder with vocab.json and merges.txt, tokenizer.model or tokenizer.json, "
            f"and tokenizer_type is {reprlib.repr(kind)}; --tokenizer names one"
        )


def _iteration(source: Path) -> Path:
    """The folder of the latest iteration, as latest_train_state.pt says; without it, as Megatron-LM's own has it."""
    path = source / _STATE
    if not path.is_file():
        return latest_iteration(source)
    step = load(file_place(path))[0].get("step")
    if not isinstance(step, torch.Tensor) or step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError(f"{path}: step is {type(step).__name__}; a whole number in a tensor is expected")
    check_tensor(step, f"{path}: step")
    folder = source / f"iter_{int(step):07d}"
    if not folder.is_dir():
        raise ValueError(f"{path}: names {folder.name}, and there is no such folder")
    return folder
