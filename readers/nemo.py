"""NeMo Megatron GPT: a .nemo archive or its unpacked folder → settings, shards and tokenizer.

Owns model_config.yaml (or the settings inside a Lightning checkpoint, *last.ckpt), NeMo's defaults, the location of the
ranks' files, and the choice of the tokenizer's file. NeMo itself is not needed. It knows no tensor.

Format: nemo/collections/nlp: parts/nlp_overrides.py (files), models/language_modeling/megatron_gpt_model.py and
megatron_base_model.py (settings and their defaults, tokenizer), modules/common/tokenizer_utils.py.
"""

from __future__ import annotations

import re
import reprlib
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from readers import tokens
from readers.archive import Place, archive_files, folder_files
from readers.distributed import DistributedCheckpoint
from readers.ranks import RankFile, find_grid
from readers.settings_file import read_yaml
from readers.sharded import (
    REQUIRED,
    Settings,
    ShardedReader,
    SourceOptions,
    gelu,
    layer_shape,
    rotation,
    trained_as,
    whatever_pipeline,
)
from readers.shards import Shards, Trained
from readers.tokens import CheckpointTokenizer
from readers.torchfile import load, plain

_CONFIG = "model_config.yaml"
_WEIGHTS = "model_weights.ckpt"
_DISTRIBUTED = "model_weights/"  # Megatron-core's, since NeMo 1.21
_LIGHTNING = re.compile(r".*last\.ckpt")
# NeMo's own, beside those of both trainers.
_REQUIRED: dict[str, tuple[Any, ...]] = REQUIRED | {
    "scale_positional_embedding": (False,),
    "mcore_customization_config": ({},),
    "hyena": (None,),
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "normalize_attention_scores": (True,),
    "headscale": (False,),
    "multi_query_attention": (False,),
    "apply_embedding_scaling": (False,),
    "num_moe_experts": (0, 1),
    "drop_layers": ([],),
}
# What one kind of modules reads and the other ignores. `name` chooses the layers' classes (get_specs).
_REQUIRED_OF_CORE = {"name": ("", "te_gpt", "decoder_block_gpt", "modelopt")}
_REQUIRED_OF_LEGACY = {"megatron_legacy": (False,)}  # True: the rows of q, k and v lie in another order
_ACTIVATIONS = {"gelu": "gelu", "squared-relu": "squared_relu", "swiglu": "swiglu", "fast-swiglu": "swiglu"}
_NORMALIZATIONS = {"layernorm": "layernorm", "layernorm1p": "layernorm", "rmsnorm": "rmsnorm"}
_ARTIFACTS = {"model": "*.model", "vocab_file": "*vocab*", "merge_file": "*merge*.txt"}  # FasterTransformer's patterns
_GPT2_TYPES = ("GPT2BPETokenizer", "megatron-gpt-345m")


def is_nemo_folder(folder: Path) -> bool:
    """Whether a folder is an unpacked .nemo archive, or holds Lightning checkpoints of NeMo."""
    return any(folder.glob(_CONFIG)) or any(folder.glob("*last.ckpt")) or any(folder.glob("*_rank_*/*last.ckpt"))


class NemoReader(ShardedReader):
    """Reads a .nemo archive, plain or gzipped, or a folder. A gzipped one is unpacked below `scratch` when needed."""

    def __init__(self, source: Path, options: SourceOptions, scratch: Path) -> None:
        """Raises ValueError where a folder or --tokenizer is incomplete; an archive is not looked into yet."""
        self._source = source
        self._options = options
        self._scratch = scratch
        options.refuse_num_heads(source)
        self.files = [source] if source.is_file() else self._used_files()
        if options.tokenizer is not None:
            self.files += tokens.find_files(options.tokenizer)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Every file by its name relative to the settings'."""
        source = self._source
        places = archive_files(source, self._scratch) if source.is_file() else folder_files(source)
        configs = [name for name in places if PurePosixPath(name).name == _CONFIG]
        if len(configs) > 1:
            raise ValueError(f"{source}: both {configs[0]} and {configs[1]} are there")
        root = PurePosixPath(configs[0]).parent if configs else PurePosixPath()
        inside = {name: place for name, place in places.items() if PurePosixPath(name).is_relative_to(root)}
        return {PurePosixPath(name).relative_to(root).as_posix(): place for name, place in inside.items()}

    @cached_property
    def _distributed(self) -> DistributedCheckpoint | None:
        names = [name for name in self._places if name.startswith(_DISTRIBUTED)]
        if not names:
            return None
        files = {name.removeprefix(_DISTRIBUTED): self._places[name] for name in names}
        return DistributedCheckpoint(files, self._places[names[0]].name.removesuffix(names[0]) + _DISTRIBUTED[:-1])

    @cached_property
    def _grid(self) -> list[list[Place]]:
        names = list(self._places)
        is_plain = any(PurePosixPath(name).name == _WEIGHTS for name in names)
        grid = find_grid(names, self._source, re.compile(re.escape(_WEIGHTS)) if is_plain else _LIGHTNING)
        return [[self._places[name] for name in row] for row in grid]

    @cached_property
    def settings(self) -> Settings:
        """model_config.yaml, or a Lightning checkpoint's hyper_parameters."""
        place = self._places.get(_CONFIG)
        if place is None:
            place = self._grid[0][0]
            values = load(place)[0].get("hyper_parameters")
            if values is None:
                raise ValueError(f"{self._source}: no {_CONFIG}, and {place.name} has no hyper_parameters")
            try:
                values = plain(values)
            except ValueError as error:
                raise ValueError(f"{place.name}: {error}") from None
            values = values.get("cfg", values) if isinstance(values, dict) else values
        else:
            values = read_yaml(place)
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values = values["model"]
        if not isinstance(values, dict):
            raise ValueError(f"{place.name}: settings are expected, not {type(values).__name__}")
        settings = Settings(place.name, {key: _resolved(value, values) for key, value in values.items()})
        return settings if self._distributed is None else whatever_pipeline(settings)

    @cached_property
    def shards(self) -> Shards:
        if self._distributed is not None:  # of whole tensors, whatever ranks trained them
            return Shards([[self._distributed]])
        grid = self._grid
        for key, found in (("tensor", len(grid[0])), ("pipeline", len(grid))):
            said = self.settings.size(f"{key}_model_parallel_size", found)
            if said != found:
                raise ValueError(
                    f"{self.settings.name}: {key}_model_parallel_size is {said}; there are files of {found}"
                )
        return Shards([[RankFile(place, _state) for place in row] for row in grid])

    @property
    def _is_core(self) -> bool:
        """Whether the modules are Megatron-core's, not NeMo's own, the legacy ones."""
        return bool(self.settings.get("mcore_gpt", False))

    @cached_property
    def trained(self) -> Trained:
        settings = self.settings
        is_core = self._is_core
        return trained_as(
            settings,
            norms_around_zero=self._normalization() == "layernorm1p"
            or is_core
            and settings.require("layernorm_zero_centered_gamma", False, True),
            has_biases=settings.require("bias", True, False),
            has_qkv_bias=is_core and settings.require("qkv_bias", False, True),
        )

    def _normalization(self) -> str:
        norm = self.settings.get("normalization", "layernorm")
        name = norm.lower() if isinstance(norm, str) else ""
        if name not in _NORMALIZATIONS:
            raise ValueError(
                f"{self.settings.name}: normalization is {reprlib.repr(norm)}; supported: {', '.join(_NORMALIZATIONS)}"
            )
        return name

    def shape(self) -> dict[str, Any]:
        settings = self.settings
        settings.require_all(_REQUIRED | (_REQUIRED_OF_CORE if self._is_core else _REQUIRED_OF_LEGACY))
        activation = settings.require("activation", *_ACTIVATIONS)
        hidden = settings.size("hidden_size")
        is_fused = settings.get("bias_activation_fusion", settings.get("bias_gelu_fusion", True))
        shape = layer_shape(settings, self.trained, hidden) | {
            "inter_size": settings.size("ffn_hidden_size", 4 * hidden),
            "num_layer": settings.size("num_layers"),
            "layernorm_eps": settings.fraction("layernorm_epsilon", 1e-5),
            "normalization_type": _NORMALIZATIONS[self._normalization()],
        }
        if activation == "gelu":
            shape |= gelu(is_fused and self.trained.has_biases, bool(settings.get("openai_gelu", False)))
        else:
            settings.require("openai_gelu", False)
            shape["activation_type"] = _ACTIVATIONS[activation]
        if settings.get("position_embedding_type") == "rope":
            shape |= rotation(settings, shape["size_per_head"], "rotary_percentage", "seq_len_interpolation_factor")
        return shape

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        if self._options.tokenizer is not None:
            return tokens.from_path(self._options.tokenizer)
        values = self.settings.get("tokenizer", {})
        if not isinstance(values, dict):
            raise ValueError(f"{self.settings.name}: tokenizer is {type(values).__name__}; settings are expected")
        settings = Settings(self.settings.name, values)
        library, kind = (settings.get(key) for key in ("library", "type"))
        special_tokens = settings.get("special_tokens")
        if more := settings.get("additional_special_tokens"):
            given = special_tokens if isinstance(special_tokens, dict) else {"": special_tokens or []}
            special_tokens = given | {"additional": more}
        if library == "sentencepiece" or (library, kind) == ("megatron", "GPTSentencePieceTokenizer"):
            is_legacy = settings.get("sentencepiece_legacy", library == "sentencepiece")
            return tokens.sentencepiece(self._artifact(settings, "model"), special_tokens, bool(is_legacy))
        vocab, merges = (self._find_artifact(settings, key) for key in ("vocab_file", "merge_file"))
        is_gpt2 = library == "megatron" and kind in _GPT2_TYPES
        if vocab and merges and (is_gpt2 or library == "huggingface"):
            return tokens.gpt2_bpe(vocab, merges, special_tokens)
        if is_gpt2 or library == "huggingface" and isinstance(kind, str):
            return tokens.hub("gpt2" if is_gpt2 else kind, special_tokens, f"{settings.name}: tokenizer.type")
        raise ValueError(
            f"{settings.name}: tokenizer.library is {reprlib.repr(library)} with type {reprlib.repr(kind)}; supported: "
            f"sentencepiece, huggingface, megatron with GPT2BPETokenizer or GPTSentencePieceTokenizer; "
            f"--tokenizer names another"
        )

    def _artifact(self, settings: Settings, key: str) -> Place:
        """`_find_artifact`. Raises ValueError where the setting is absent, too."""
        place = self._find_artifact(settings, key)
        if place is None:
            raise ValueError(f"{settings.name}: tokenizer.{key} is not set; --tokenizer names the file")
        return place

    def _find_artifact(self, settings: Settings, key: str) -> Place | None:
        """A tokenizer's file: `nemo:NAME`, or the path it had where the model was trained, now under some prefix.

        None where the setting is absent. Raises ValueError where it names no file.
        """
        value = settings.get(key) or self.settings.get(key)
        if value in (None, "", "None"):
            return None
        if not isinstance(value, str):
            raise ValueError(f"{settings.name}: tokenizer.{key} is {type(value).__name__}; a file's name is expected")
        name = PurePosixPath(value.removeprefix("nemo:")).name
        top = [place for place in self._places if "/" not in place]
        for found in (
            [place for place in top if place == name],
            [place for place in top if place.endswith(name)],
            [place for place in top if PurePosixPath(place).match(_ARTIFACTS[key])],
        ):
            if len(found) == 1:
                return self._places[found[0]]
        raise ValueError(
            f"{settings.name}: tokenizer.{key} is {value!r:.200}, and there is no such file in {self._source}; "
            f"--tokenizer names another"
        )

    def _used_files(self) -> list[Path]:
        """The files of a folder that are read: settings, weights, tokenizer."""
        names = [_CONFIG, *_ARTIFACTS.values()]
        files = [path for pattern in names for path in sorted(self._source.glob(pattern)) if path.is_file()]
        if self._distributed is not None:
            weights = self._distributed.files
        else:
            weights = [place for row in self._grid for place in row]
        return list(dict.fromkeys([*files, *(place.path for place in weights)]))


def _state(content: dict[str, Any]) -> dict[str, Any]:
    """The model of a Lightning checkpoint, or the content itself if it is nothing else."""
    return content.get("state_dict", content)


def _resolved(value: Any, values: dict[str, Any]) -> Any:
    """OmegaConf's reference to another setting of the same level, `${.name}` or `${model.name}`, followed once."""
    found = re.fullmatch(r"\$\{(?:\.|model\.)?(\w+)\}", value) if isinstance(value, str) else None
    return values.get(found[1]) if found else value
