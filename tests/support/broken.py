"""Edits that break or change a checkpoint on disk, and a pickle that would run code.

An edit takes the checkpoint's folder. Hugging Face's come first, then NeMo's and Megatron-LM's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_weights

Edit = Callable[[Path], Any]
EVIL_TRACE = Path("/tmp/test_evil_was_here")
NEMO_WEIGHTS = "model_weights.ckpt"
MEGATRON_ITERATION = "iter_0000500"
MEGATRON_FILE = "model_optim_rng.pt"


class Evil:
    """Unpickled without weights_only, it runs a command that leaves EVIL_TRACE behind."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {EVIL_TRACE}",)


def edit_config(folder: Path, **values: Any) -> None:
    """Change config.json; `...` removes a key."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def fill(name: str, value: float) -> Edit:
    return lambda folder: edit_weights(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def drop(*names: str) -> Edit:
    return lambda folder: edit_weights(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, tensor: torch.Tensor) -> Edit:
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update({name: tensor}))


def settings(**values: Any) -> Edit:
    return lambda folder: edit_config(folder, **values)


def end_token(value: Any) -> Edit:
    """An end token in config.json alone: generation_config.json's goes before it."""

    def act(folder: Path) -> None:
        (folder / "generation_config.json").unlink()
        edit_config(folder, eos_token_id=value)

    return act


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def as_bin(content: Any, cut: int = 0) -> Edit:
    """Replace the weights by a .bin of this content, less its last bytes."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        torch.save(content(tensors) if callable(content) else content, path)
        os.truncate(path, path.stat().st_size - cut)

    return act


def sharded(edit: Callable[[Path, dict[str, str]], Any]) -> Edit:
    """Replace the weights by three shards, then let `edit` change files and the index's map."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_weights(folder, tensors, "safetensors", shards=3)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(folder, index["weight_map"])
        path.write_text(json.dumps(index))

    return act


def edit_state(edit: Callable[[dict[str, Any]], Any], path: str = NEMO_WEIGHTS) -> Edit:
    """Change the state dict of an unpacked NeMo checkpoint."""

    def act(folder: Path) -> None:
        state = torch.load(folder / path, weights_only=False)
        edit(state)
        torch.save(state, folder / path)

    return act


def edit_content(edit: Callable[[dict[str, Any]], Any], rank: str = "mp_rank_00") -> Edit:
    """Change what one rank of a Megatron-LM checkpoint saved."""

    def act(folder: Path) -> None:
        path = folder / MEGATRON_ITERATION / rank / MEGATRON_FILE
        content = torch.load(path, weights_only=False)
        edit(content)
        torch.save(content, path)

    return act
