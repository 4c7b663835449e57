"""Megatron-LM GPT: a folder of iterations, or one iteration → settings, shards and tokenizer.

Owns the location of the ranks' files, the training arguments and their defaults, the sizes read off the tensors of
checkpoints without arguments, and the order of q, k and v in each checkpoint_version. Megatron-LM itself is not
needed. It knows no tensor.

Format: megatron/checkpointing.py (files, versions: fix_query_key_value_ordering), megatron/arguments.py.
"""

from __future__ import annotations

import re
import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

from readers import tokens
from readers.archive import file_place, folder_files
from readers.distributed import DistributedCheckpoint
from readers.ranks import RankFile, find_grid
from readers.sharded import (
    REQUIRED,
    Settings,
    ShardedReader,
    SourceOptions,
    gelu,
    layer_shape,
    query_groups,
    rotation,
    whatever_pipeline,
)
from readers.shards import Shards, Trained
from readers.tokens import CheckpointTokenizer
from readers.torchfile import StandIn, load

_TRACKER = "latest_checkpointed_iteration.txt"
_FILE = re.compile(r"model(?:_optim)?_rng\.pt")
_DISTRIBUTED_FILES = (".metadata", "metadata.json")
_QKV_ORDERS = {0: "3nd", 1.0: "nd3", 2.0: "n3d", 3.0: "n3d"}
# Megatron-LM's own, beside those of both trainers; absent arguments are those of versions that could not do otherwise.
_REQUIRED: dict[str, tuple[Any, ...]] = REQUIRED | {
    "apply_residual_connection_post_layernorm": (False,),
    "normalization": ("LayerNorm", "RMSNorm"),
    "use_rope_scaling": (False,),
    "quick_geglu": (False,),
    "num_experts": (0, 1),
}


def is_megatron_folder(folder: Path) -> bool:
    """Whether a folder holds iterations of Megatron-LM, or is one."""
    if (folder / _TRACKER).is_file():
        return True
    if any(any(folder.glob(f"{level}{name}")) for level in ("", "iter_*/", "release/") for name in _DISTRIBUTED_FILES):
        return True
    return any(_FILE.fullmatch(path.name) for level in ("", "*/", "*/*/") for path in folder.glob(f"{level}model_*.pt"))


class MegatronReader(ShardedReader):
    """Reads a checkpoint's latest iteration, or the iteration that the folder is."""

    def __init__(self, source: Path, options: SourceOptions) -> None:
        """Raises ValueError where files are missing."""
        self._source = source
        self._options = options
        folder = latest_iteration(source)
        self._distributed = None
        if any((folder / name).is_file() for name in _DISTRIBUTED_FILES):
            self._distributed = DistributedCheckpoint(folder_files(folder), str(folder))
            self.files = [place.path for place in self._distributed.files]
        else:
            names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            self._grid = [[file_place(folder / name) for name in row] for row in find_grid(names, folder, _FILE)]
            self.files = [place.path for row in self._grid for place in row]
        beside = (path for path in (folder, source, source.parent) if tokens.find_files(path))
        self._tokenizer_path = next(beside, source) if options.tokenizer is None else options.tokenizer
        self.files += tokens.find_files(self._tokenizer_path)

    @cached_property
    def _name(self) -> str:
        """The file of `_facts`, for messages."""
        return self._grid[0][0].name if self._distributed is None else self._distributed.common_place.name

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """The values beside the model in rank 0's file, or in the one for all ranks."""
        if self._distributed is not None:
            content = self._distributed.common()
            if content.get("args") is None:
                raise ValueError(f"{self._name}: no training arguments (args), so Megatron-LM has not written this")
        else:
            content, _ = load(self._grid[0][0])
            if "model" not in content:
                why = "of an interleaved pipeline" if "model0" in content else "without a model"
                raise ValueError(f"{self._name}: a checkpoint {why}; only a single `model` is supported")
        return {key: content.get(key) for key in ("args", "checkpoint_version", "iteration")}

    @cached_property
    def settings(self) -> Settings:
        """The training arguments; empty in the oldest checkpoints."""
        name, args = self._name, self._facts["args"]
        if args is None:
            return Settings(name, {})
        if not isinstance(args, (StandIn, dict)):
            raise ValueError(f"{name}: args is {type(args).__name__}; an argparse.Namespace is expected")
        values = args.state if isinstance(args, StandIn) else args
        settings = Settings(f"{name}: args", values)
        if self._distributed is not None:  # of whole tensors, whatever ranks trained them
            return whatever_pipeline(settings)
        for keys, found in (
            (("tensor_model_parallel_size", "model_parallel_size"), len(self._grid[0])),
            (("pipeline_model_parallel_size",), len(self._grid)),
        ):
            key = next((key for key in keys if key in values), None)
            if key and settings.size(key, found) != found:
                raise ValueError(f"{settings.name}: {key} is {settings.get(key)}; there are files of {found}")
        return settings

    @cached_property
    def shards(self) -> Shards:
        if self._distributed is not None:
            return Shards([[self._distributed]])
        places = {place.name: place for row in self._grid for place in row}
        for place in list(places.values())[1:]:
            content, _ = load(place)
            for key in ("checkpoint_version", "iteration"):
                if content.get(key) != self._facts[key]:
                    raise ValueError(
                        f"{place.name}: {key} is {content.get(key)}, and {self._facts[key]} in {self._name}"
                    )
        return Shards([[RankFile(place, _state) for place in row] for row in self._grid])

    @cached_property
    def trained(self) -> Trained:
        settings = self.settings
        version = self._facts["checkpoint_version"] or 0
        if not isinstance(version, (int, float)) or version not in _QKV_ORDERS:
            known = ", ".join(map(str, _QKV_ORDERS))
            raise ValueError(f"{self._name}: checkpoint_version is {reprlib.repr(version)}; supported: {known}")
        heads = self._num_heads()
        is_grouped = settings.get("group_query_attention", False)
        has_biases = bool(settings.get("add_bias_linear", True))
        # --apply-layernorm-1p; the second is what newer versions call it among the arguments.
        norms_around_zero = ("apply_layernorm_1p", "layernorm_zero_centered_gamma")
        return Trained(
            heads=heads,
            kv_heads=query_groups(settings, heads) if is_grouped else heads,
            qkv_order=_QKV_ORDERS[version],
            norms_around_zero=any(settings.get(key, False) for key in norms_around_zero),
            has_biases=has_biases,
            has_qkv_bias=has_biases or bool(settings.get("add_qkv_bias", False)),
            ties_head=not settings.get("untie_embeddings_and_output_weights", False),
        )

    def _num_heads(self) -> int:
        asked = self._options.num_heads
        if not self.settings.values:
            if asked is None:
                raise ValueError(f"{self.settings.name}: no training arguments; --num-heads gives the heads")
            return asked
        heads = self.settings.size("num_attention_heads")
        if asked not in (None, heads):
            raise ValueError(f"{self.settings.name}: num_attention_heads is {heads}, and --num-heads is {asked}")
        return heads

    def shape(self) -> dict[str, Any]:
        settings = self.settings
        settings.require_all(_REQUIRED)
        wpe = self.shards.whole_shape("wpe") or (0, 0)
        inter = self.shards.whole_shape("layers.0.mlp.dense_h_to_4h.weight") or (0,)
        hidden = settings.size("hidden_size", wpe[-1])
        activations = [name for name in ("swiglu", "squared_relu") if settings.get(name, False)]
        is_fused = settings.get("bias_gelu_fusion", not settings.values)  # the first versions knew the tanh form only
        eps = "norm_epsilon" if "norm_epsilon" in settings.values else "layernorm_epsilon"
        shape = layer_shape(settings, self.trained, hidden) | {
            "inter_size": settings.size("ffn_hidden_size", inter[0] // (1 + ("swiglu" in activations))),
            "num_layer": settings.size("num_layers", self.shards.num_layers),
            "layernorm_eps": settings.fraction(eps, 1e-5),
            "normalization_type": settings.get("normalization", "LayerNorm").lower(),
        }
        if activations:
            shape["activation_type"] = activations[0]
        else:
            shape |= gelu(is_fused and self.trained.has_biases, bool(settings.get("openai_gelu", False)))
        if settings.get("position_embedding_type") == "rope" or settings.get("use_rotary_position_embeddings", False):
            shape |= rotation(settings, shape["size_per_head"], "rotary_percent", "rotary_seq_len_interpolation_factor")
            # The modules before Megatron-core add a table of positions as well unless they are told not to.
            shape["has_positional_encoding"] = self.shards.whole_shape("wpe") is not None
        else:
            settings.require("add_position_embedding", True)
        return shape

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        if self._options.tokenizer is None and not tokens.find_files(self._tokenizer_path):
            raise ValueError(
                f"{self._source}: no tokenizer beside the checkpoint (vocab.json and merges.txt, tokenizer.model or "
                f"tokenizer.json); --tokenizer names one"
            )
        return tokens.from_path(self._tokenizer_path)


def _state(content: dict[str, Any]) -> dict[str, Any]:
    return content.get("model", {})


def latest_iteration(source: Path) -> Path:
    """The folder of the latest iteration, as the tracker file says, or the only one there is. Raises ValueError."""
    tracker = source / _TRACKER
    if tracker.is_file():
        text = tracker.read_text(errors="replace").strip()
        if text != "release" and not re.fullmatch(r"\d{1,15}", text):
            raise ValueError(f"{tracker}: {text[:40]!r}; the number of an iteration or 'release' is expected")
        folder = source / (text if text == "release" else f"iter_{int(text):07d}")
        if not folder.is_dir():
            raise ValueError(f"{tracker}: names {folder.name}, and there is no such folder")
        return folder
    folders = [path for path in sorted(source.iterdir()) if re.fullmatch(r"iter_\d{7,}|release", path.name)]
    if len(folders) > 1:
        raise ValueError(f"{source}: {len(folders)} iterations and no {_TRACKER}; give the folder of one")
    return folders[0] if folders else source
