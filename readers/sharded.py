"""Shared by the readers of NeMo's and Megatron's checkpoints: checked settings, and the way from them to the table.

Each of these readers finds its files, settings and tokenizer; readers.shards knows the tensors.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.flags import flag
from readers.checkpoint import Weight
from readers.shards import Shards, Trained
from readers.tokens import CheckpointTokenizer
from weights.model_config import ModelConfig

# Settings of variants that compute something else: the values that are served, the default first. The names are
# Megatron-core's, which both trainers use.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned_absolute", "rope"),
    "rope_type": ("rope",),
    "no_rope_freq": (None,),
    "window_size": (None, [-1, -1], [-1, 0]),  # tokens before and after; -1: all of them
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "multi_latent_attention": (False,),
    "qk_layernorm": (False, True),
    "qk_l2_norm": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "use_mup": (False,),
    "heterogeneous_layers_config_path": (None,),
    "virtual_pipeline_model_parallel_size": (1,),
}


@dataclass(frozen=True)
class SourceOptions:
    """Facts that a source may lack; flags of convert.py and server.py."""

    tokenizer: Path | None = flag(
        None,
        "NeMo, Megatron-LM, Megatron-Bridge: a .model file, or a folder with vocab.json and merges.txt, "
        "tokenizer.model or tokenizer.json; by default the checkpoint's own, or the one beside it",
        type=Path,
    )
    num_heads: int | None = flag(None, "Megatron-LM: attention heads, for a checkpoint without arguments", type=int)

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.num_heads < 0:
            raise ValueError(f"num_heads is {self.num_heads}; it must be 0 or more")

    def refuse_num_heads(self, source: Path) -> None:
        """Raise ValueError for --num-heads, where the checkpoint itself says it."""
        if self.num_heads is not None:
            raise ValueError(f"{source}: --num-heads is for Megatron-LM's checkpoints without arguments only")

    def describe(self) -> dict[str, Any]:
        """For the manifest: other options make another folder."""
        return {"tokenizer": None if self.tokenizer is None else str(self.tokenizer), "num_heads": self.num_heads}


@dataclass(frozen=True)
class Settings:
    """A model's settings, by name; messages call their file `name`."""

    name: str
    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str, *allowed: Any) -> Any:
        """A value out of `allowed`, the first of which is the default. Raises ValueError for another."""
        value = self.get(key, allowed[0])
        if (list(value) if isinstance(value, tuple) else value) not in allowed:
            known = ", ".join(str(one) or "''" for one in allowed)
            raise ValueError(f"{self.name}: {key} is {reprlib.repr(value)}; supported: {known}")
        return value

    def require_all(self, table: dict[str, tuple[Any, ...]]) -> None:
        """`require` of each key of a table such as REQUIRED."""
        for key, allowed in table.items():
            self.require(key, *allowed)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1. Raises ValueError."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.name}: {key} is {reprlib.repr(value)}; it must be a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        """A value as a float, from text too, because YAML's parser takes 1e-5 for text; nan if it is no number."""
        value = self.get(key, default)
        try:
            return math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return math.nan

    def fraction(self, key: str, default: float) -> float:
        """A number between 0 and 1. Raises ValueError."""
        number = self.number(key, default)
        if not 0 < number < 1:
            raise ValueError(f"{self.name}: {key} is {reprlib.repr(self.get(key))}; it must lie between 0 and 1")
        return number

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0. Raises ValueError."""
        number = self.number(key, default)
        if not 0 < number < math.inf:
            raise ValueError(f"{self.name}: {key} is {reprlib.repr(self.get(key))}; it must be a finite number above 0")
        return number


class ShardedReader:
    """Reads a GPT that was trained with Megatron's modules.

    A subclass gives `files`, `shape` and the properties; each property is read once.
    """

    files: list[Path]

    @property
    def settings(self) -> Settings:
        """The model's settings. Raises ValueError."""
        raise NotImplementedError

    @property
    def shards(self) -> Shards:
        """The tensors of all ranks. Raises ValueError."""
        raise NotImplementedError

    @property
    def trained(self) -> Trained:
        """How the tensors are to be read. Raises ValueError."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> CheckpointTokenizer:
        """The checkpoint's tokenizer, or that of the options. Raises ValueError."""
        raise NotImplementedError

    def shape(self) -> dict[str, Any]:
        """ModelConfig's fields that follow from the settings. Raises ValueError for a model that cannot be served."""
        raise NotImplementedError

    def config(self, weight_data_type: str, tp: int, model_name: str) -> ModelConfig:
        """The model's config.ini; the vocabulary is the embedding's rows, padding included, and so are positions."""
        shape = self.shape()
        for key, found in (("num_layer", self.shards.num_layers), ("head_num", self.trained.heads)):
            if shape[key] != found:
                raise ValueError(f"{self.settings.name}: {key} is {shape[key]}; the weight files hold {found}")
        vocab_size = self._rows("wte", shape)
        if shape.get("has_positional_encoding", True):
            shape["max_pos_seq_len"] = self._rows("wpe", shape)
        tokenizer = self.tokenizer
        end_ids = tokenizer.end_ids(vocab_size)
        start_id = end_ids[0] if tokenizer.start_id is None else tokenizer.start_id
        if max(len(tokenizer.tokenizer) - 1, start_id, *end_ids) >= vocab_size:
            raise ValueError(
                f"{tokenizer.name}: {len(tokenizer.tokenizer)} tokens; the embedding has {vocab_size} rows only"
            )
        return ModelConfig(
            model_name=model_name,
            vocab_size=vocab_size,
            start_id=start_id,
            end_id=end_ids[0],
            end_ids=end_ids,
            weight_data_type=weight_data_type,
            tensor_para_size=tp,
            **shape,
        )

    def data_type(self) -> str:
        """The data type in which most of the weights are stored."""
        return self.shards.data_type()

    def weights(self, config: ModelConfig) -> list[Weight]:
        """Every weight, checked and not yet read. Raises ValueError with the file and the tensor."""
        return self.shards.weights(config, self.trained)

    def write_tokenizer(self, folder: Path) -> None:
        self.tokenizer.write(folder)

    def _rows(self, name: str, shape: dict[str, Any]) -> int:
        whole = self.shards.whole_shape(name)
        hidden = shape["hidden_size"]
        if whole is None:
            raise ValueError(f"{self.settings.name}: the weight files hold no {name}")
        if len(whole) != 2 or whole[1] != hidden:
            raise ValueError(f"{self.settings.name}: hidden size {hidden}; {name} has shape {list(whole)}")
        return whole[0]


def whatever_pipeline(settings: Settings) -> Settings:
    """Drop the settings that concern only ranks' files: a distributed checkpoint numbers the whole model's layers."""
    return Settings(settings.name, settings.values | {"virtual_pipeline_model_parallel_size": None})


def trained_as(settings: Settings, norms_around_zero: bool, has_biases: bool, has_qkv_bias: bool) -> Trained:
    """How a model of NeMo's or Megatron-Bridge's is to be read. has_qkv_bias: even without other biases."""
    heads = settings.size("num_attention_heads")
    return Trained(
        heads=heads,
        kv_heads=query_groups(settings, heads, heads),
        norms_around_zero=norms_around_zero,
        has_biases=has_biases,
        has_qkv_bias=has_biases or has_qkv_bias,
        ties_head=settings.require("share_embeddings_and_output_weights", True, False),
    )


def layer_shape(settings: Settings, trained: Trained, hidden: int) -> dict[str, Any]:
    """ModelConfig's fields of a layer's heads. hidden: hidden_size. Raises ValueError."""
    heads = trained.heads
    if hidden % heads and settings.get("kv_channels") is None:
        raise ValueError(f"{settings.name}: num_attention_heads {heads} does not divide hidden_size {hidden}")
    return {
        "head_num": heads,
        "kv_head_num": trained.kv_heads,
        "size_per_head": settings.size("kv_channels", hidden // heads),
        "hidden_size": hidden,
        "qk_layernorm": settings.require("qk_layernorm", False, True),
    }


def query_groups(settings: Settings, heads: int, default: int | None = None) -> int:
    """Heads of keys and values, num_query_groups. Raises ValueError."""
    groups = settings.size("num_query_groups", default)
    if heads % groups:
        raise ValueError(f"{settings.name}: num_query_groups is {groups}; it must divide the {heads} attention heads")
    return groups


def rotation(
    settings: Settings, head_dim: int, share_key: str, factor_key: str, length_key: str = "max_position_embeddings"
) -> dict[str, Any]:
    """ModelConfig's rotary fields. share_key: the setting for the rotated share of a head; factor_key: for the divisor
    of positions; length_key: for the length of training.

    max_pos_seq_len is the length of training, no limit for such a model. Raises ValueError.
    """
    settings.require("rotary_interleaved", False)
    share = 1.0 if settings.number(share_key, 1) == 1 else settings.fraction(share_key, 1)
    num_turned = int(head_dim * share)
    if num_turned % 2 or num_turned == 0:
        raise ValueError(
            f"{settings.name}: {share_key} is {settings.get(share_key, 1)}, which turns {num_turned} of a head's "
            f"{head_dim} elements; that number must be even and at least 2"
        )
    return {
        "has_positional_encoding": False,
        "rotary_embedding": num_turned,
        "rotary_base": settings.positive("rotary_base", 10000),
        "rotary_interpolation_factor": settings.positive(factor_key, 1),
        "max_pos_seq_len": settings.size(length_key),
    }


def gelu(is_fused: bool, is_openai: bool) -> dict[str, str]:
    """activation_type and gelu_form: Megatron's fused bias and gelu is the tanh form, as OpenAI's; else it is exact.

    Source: bias_gelu in megatron/core/fusions/fused_bias_gelu.py, torch.nn.functional.gelu without fusion.
    """
    return {"activation_type": "gelu", "gelu_form": "tanh" if is_fused or is_openai else "erf"}
