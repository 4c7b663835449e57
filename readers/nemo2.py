"""NeMo 2 GPT: a folder of weights/ and context/ → settings, shards and tokenizer.

Owns the location of the settings (context/model.yaml; io.json lacks the defaults) and of the tokenizer's files. NeMo
itself is not needed, and nothing of the checkpoint is executed. It knows no tensor.

Format: NVIDIA/NeMo 2.x: nemo/lightning/io (mixin.py and connector.py: files, artifact/file.py and registry.py: names of
the tokenizer's files), nemo/lightning/ckpt_utils.py (adapters), nemo/lightning/_strategy_lib.py (prefixes of tensors),
nemo/collections/common/tokenizers (huggingface/auto_tokenizer.py, sentencepiece_tokenizer.py); end tokens: config's
generation_config of nemo/collections/llm/gpt/model, saved by nemo/lightning/io/artifact/hf_auto.py into artifacts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from readers import tokens
from readers.archive import file_place, folder_files
from readers.core_settings import CoreReader, check_class, core_settings
from readers.distributed import DistributedCheckpoint
from readers.end_tokens import GENERATION_CONFIG
from readers.settings_file import read_yaml
from readers.sharded import Settings, SourceOptions
from readers.tokens import CheckpointTokenizer

_MODEL = "context/model.yaml"
_ADAPTER = "weights/adapter_metadata.json"
_MARKS = (_MODEL, "context/io.json", "weights/metadata.json", "weights/.metadata")
_GENERATION = f"context/artifacts/{GENERATION_CONFIG}"
_FOLDERS = ("nemo_tokenizer", "artifacts")  # of Hugging Face's files
_LONGEST_NAME = 255  # bytes, of a file; Linux raises an error for a longer one
_ROLES = tuple(f"{role}_token" for role in ("unk", "mask", "pad", "sep", "eos", "bos", "cls"))


def is_nemo2_folder(folder: Path) -> bool:
    """Whether a folder is a checkpoint of NeMo 2."""
    return any((folder / name).is_file() for name in _MARKS)


class Nemo2Reader(CoreReader):
    """Reads one checkpoint's folder."""

    def __init__(self, source: Path, options: SourceOptions) -> None:
        """Raises ValueError where files are missing, and for an adapter."""
        self.source = source
        self._options = options
        options.refuse_num_heads(source)
        if not (source / _MODEL).is_file():
            raise ValueError(f"{source}: {_MODEL} is missing; io.json lacks the defaults of its classes")
        if not (source / "weights").is_dir():
            raise ValueError(f"{source}: weights is missing")
        if (source / _ADAPTER).exists():
            raise ValueError(f"{source / _ADAPTER}: the weights are an adapter's; merge it into its model first")
        self.weights_files = DistributedCheckpoint(folder_files(source / "weights"), str(source / "weights"))
        self.files = [source / _MODEL, *(place.path for place in self.weights_files.files)]
        context = source / "context"
        if options.tokenizer is not None:
            self.files += tokens.find_files(options.tokenizer)
        else:
            self.files += [path for path in sorted(context.glob("*")) if path.is_file() and path != source / _MODEL]
            self.files += [path for name in _FOLDERS for path in tokens.find_files(context / name)]
            self.files += [path for path in (source / _GENERATION,) if path.is_file() and path not in self.files]

    @cached_property
    def _model(self) -> dict[str, Any]:
        """context/model.yaml: the model's class, `config`, `tokenizer` and others."""
        place = file_place(self.source / _MODEL)
        values = read_yaml(place)
        if not isinstance(values, dict):
            raise ValueError(f"{place.name}: settings are expected, not {type(values).__name__}")
        check_class(values, place.name)
        return values

    @cached_property
    def settings(self) -> Settings:
        """The model's `config`."""
        return core_settings(self._model.get("config"), f"{self.source / _MODEL}: config")

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        """The options' tokenizer, or the checkpoint's, whose end tokens the model's generation_config may list."""
        if self._options.tokenizer is not None:
            return tokens.from_path(self._options.tokenizer)
        generation = self.source / _GENERATION
        return replace(self._own_tokenizer(), generation=generation) if generation.is_file() else self._own_tokenizer()

    def _own_tokenizer(self) -> CheckpointTokenizer:
        name = f"{self.source / _MODEL}: tokenizer"
        values = self._model.get("tokenizer")
        if values is None:
            folders = (self.source / "context" / folder for folder in _FOLDERS)
            found = next((folder for folder in folders if tokens.find_files(folder)), None)
            if found is None:
                raise ValueError(f"{name} is not set; --tokenizer names one")
            return tokens.from_path(found)
        if not isinstance(values, dict):
            raise ValueError(f"{name} is {type(values).__name__}; settings are expected")
        settings = Settings(name, values)
        target = settings.get("_target_")
        kind = target.rpartition(".")[2] if isinstance(target, str) else ""
        if kind == "SentencePieceTokenizer":
            path = self._artifact(settings, "model_path")
            if path is None:
                raise ValueError(f"{name}: model_path is not set; --tokenizer names the file")
            is_legacy = settings.require("legacy", False, True)
            return tokens.sentencepiece(file_place(path), settings.get("special_tokens"), is_legacy)
        if kind == "AutoTokenizer":
            return self._hugging_face(settings)
        raise ValueError(
            f"{name}: _target_ is {target!r:.200}; supported: AutoTokenizer, SentencePieceTokenizer; "
            f"--tokenizer names another"
        )

    def _hugging_face(self, settings: Settings) -> CheckpointTokenizer:
        special_tokens = {role: settings.get(role) for role in _ROLES if settings.get(role) is not None}
        if more := settings.get("additional_special_tokens"):
            special_tokens["additional"] = more
        vocab, merges = (self._artifact(settings, key) for key in ("vocab_file", "merges_file"))
        if vocab and merges:
            return tokens.gpt2_bpe(file_place(vocab), file_place(merges), special_tokens)
        key = "pretrained_model_name"
        value = settings.get(key)
        if isinstance(value, dict) and isinstance(value.get("attr"), str):  # no folder, when it was written
            return tokens.hub(value["attr"], special_tokens, f"{settings.name}: {key}")
        path = self._artifact(settings, key)
        if path is None:
            raise ValueError(f"{settings.name}: {key} is not set; --tokenizer names one")
        return tokens.from_path(path, special_tokens)

    def _artifact(self, settings: Settings, key: str) -> Path | None:
        """A file or folder of the tokenizer: the last part of its name, in context/. None where the setting is absent.

        Raises ValueError where there is none such.
        """
        value = settings.get(key)
        if value is None:
            return None
        name = PurePosixPath(value).name if isinstance(value, str) else ""
        path = self.source / "context" / name
        if not 0 < len(name.encode(errors="replace")) <= _LONGEST_NAME or name == ".." or not path.exists():
            raise ValueError(
                f"{settings.name}: {key} is {value!r:.200}, and there is no such file in "
                f"{self.source / 'context'}; --tokenizer names another"
            )
        return path
