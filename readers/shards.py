"""Weights of Megatron's GPT, trained on tp × pp ranks: puts their shards together, one weight of the table at a time.

Owns the common ground of NeMo and Megatron-LM: the names of Megatron's modules (of megatron.model, `legacy`, and of
megatron.core), the axis that training splits, layers numbered anew on each pipeline rank, and q, k, v interleaved by
head, or by group where several query heads share a KV head. A weight is assembled when it is written, so memory holds
one weight and no file. A distributed checkpoint counts as a single rank's file. It knows neither the origin of the
files nor the model's name.

Names: NVIDIA/Megatron-LM: megatron/core/transformer/attention.py (SelfAttention, q_layernorm and k_layernorm too),
megatron/core/models/gpt/gpt_layer_specs.py; the same in NVIDIA/NeMo's nemo/collections/llm/gpt/model/qwen3.py.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Protocol

import torch

from readers.checkpoint import Weight
from weights.model_config import DATA_TYPES, ModelConfig
from weights.table import WeightSpec, weight_specs

_PREFIX = re.compile(r"(?:(?:model|module|language_model|_orig_mod)\.)*")
_LAYER = re.compile(r"(?:encoder|transformer|decoder)\.layers\.(\d{1,9})\.(.+)")
_HEAD = "lm_head.weight"
_TIED_HEAD = "the embedding again"  # on the last pipeline rank, where the embedding is the head too
_OUTER_NAMES = {
    "embedding.word_embeddings.weight": "wte",
    "embedding.position_embeddings.weight": "wpe",
    "output_layer.weight": _HEAD,
    "word_embeddings.weight": _TIED_HEAD,
    "word_embeddings_for_head.weight": _TIED_HEAD,
} | {
    f"{block}.final_layernorm.{kind}": f"final_layernorm.{kind}"
    for block in ("encoder", "transformer", "decoder")
    for kind in ("weight", "bias")
}
_LAYER_NAMES = {
    pattern.format(kind): f"{part}.{kind}"
    for part, patterns in {
        "input_layernorm": ("input_layernorm.{}", "self_attention.linear_qkv.layer_norm_{}"),
        "attention.query_key_value": (
            "self_attention.query_key_value.{}",
            "attention.query_key_value.{}",
            "self_attention.linear_qkv.{}",
        ),
        "attention.q_norm": ("self_attention.q_layernorm.{}",),
        "attention.k_norm": ("self_attention.k_layernorm.{}",),
        "attention.dense": ("self_attention.dense.{}", "attention.dense.{}", "self_attention.linear_proj.{}"),
        "post_attention_layernorm": (
            "post_attention_layernorm.{}",
            "pre_mlp_layernorm.{}",
            "mlp.linear_fc1.layer_norm_{}",
        ),
        "mlp.dense_h_to_4h": ("mlp.dense_h_to_4h.{}", "mlp.linear_fc1.{}"),
        "mlp.dense_h_to_4h_2": ("mlp.dense_h_to_4h_2.{}",),
        "mlp.dense_4h_to_h": ("mlp.dense_4h_to_h.{}", "mlp.linear_fc2.{}"),
    }.items()
    for pattern in patterns
    for kind in ("weight", "bias")
}
# The axis of [out, in] that training splits; what is not here lies on every tensor-parallel rank.
_TRAINED_AXES = {
    "wte": 0,
    _HEAD: 0,
    "attention.query_key_value.weight": 0,
    "attention.query_key_value.bias": 0,
    "attention.dense.weight": 1,
    "mlp.dense_h_to_4h.weight": 0,
    "mlp.dense_h_to_4h.bias": 0,
    "mlp.dense_4h_to_h.weight": 1,
}
_IGNORED = "rotary_pos_emb.inv_freq"  # follows from the settings
_FLOATS = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_REOPEN_BYTES = 64 << 20  # as in readers.checkpoint: pages of a mapping count until it goes
_log = logging.getLogger("convert")


@dataclass(frozen=True)
class Trained:
    """How the tensors are to be read.

    qkv_order: the axes of a query_key_value's rows, of 3, n heads, d elements; where there are fewer kv_heads than
    heads, it is by head of keys: its queries, the key, the value.
    """

    heads: int
    kv_heads: int
    qkv_order: str = "n3d"  # checkpoint_version 2 and later; 3nd: 0, nd3: 1
    norms_around_zero: bool = False  # LayerNorm1P: what is stored is the scale - 1
    has_biases: bool = True
    has_qkv_bias: bool = True  # of query_key_value, which may be the only one
    ties_head: bool = True


@dataclass(frozen=True)
class Shard:
    """A tensor's header in one file."""

    stored: str  # its name there
    shape: tuple[int, ...]
    dtype: torch.dtype
    second: str = ""  # another one's name, whose rows follow


class Source(Protocol):
    """The tensors of a rank, or of the whole model: readers.ranks, readers.distributed."""

    name: str  # for messages

    def headers(self) -> Iterable[Shard]:
        """Every tensor, in any order. Raises ValueError for a file that is not whole."""
        ...

    def open(self) -> tuple[Callable[[str], torch.Tensor], bool]:
        """A function that returns a tensor by its stored name, and whether tensors keep the file mapped."""
        ...


class Shards:
    """The tensors of all ranks, under the table's names; opens files when they are needed."""

    def __init__(self, grid: list[list[Source]]) -> None:
        """`grid` is [pp][tp]."""
        self._grid = grid
        self._open: dict[tuple[int, int], tuple[Callable[[str], torch.Tensor], bool]] = {}
        self._read_bytes = 0
        self._has_warned = False

    @property
    def tp(self) -> int:
        return len(self._grid[0])

    @property
    def pp(self) -> int:
        return len(self._grid)

    @cached_property
    def stages(self) -> list[dict[str, list[Shard]]]:
        """For each pipeline rank: the table's name, its layer numbered on that rank → each tp rank's shard.

        Raises ValueError for names that are not the table's, and for ranks that disagree.
        """
        return [self._stage(pp_rank) for pp_rank in range(self.pp)]

    @cached_property
    def first_layers(self) -> list[int]:
        """The number in the whole model of each stage's first layer, and at the end the number of layers."""
        firsts = [0]
        for pp_rank, stage in enumerate(self.stages):
            layers = {int(name.split(".")[1]) for name in stage if name.startswith("layers.")}
            for layer in range(len(layers)):
                if layer not in layers:
                    name = self._grid[pp_rank][0].name
                    raise ValueError(f"{name}: layer {layer} is missing, and layer {max(layers)} is there")
            firsts.append(firsts[-1] + len(layers))
        return firsts

    @property
    def num_layers(self) -> int:
        return self.first_layers[-1]

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape as [out, in] of one weight put together; None where there is none. `name` as in the table."""
        place = self._find(name)
        if place is None:
            return None
        pp_rank, local = place
        shards = self.stages[pp_rank][local]
        shape = list(shards[0].shape)
        axis = _TRAINED_AXES.get(_part(name))
        if axis is not None and axis < len(shape):
            shape[axis] = sum(shard.shape[axis] for shard in shards)
        return tuple(shape)

    def data_type(self) -> str:
        """The data type in which most of the weights are stored; fp64, which has no place on disk, is fp32."""
        counts: Counter[str] = Counter()
        for stage in self.stages:
            for shards in stage.values():
                counts[_FLOATS.get(shards[0].dtype, "")] += sum(torch.Size(shard.shape).numel() for shard in shards)
        data_type = counts.most_common(1)[0][0] if counts else "fp32"
        return data_type if data_type in DATA_TYPES else "fp32"

    def weights(self, config: ModelConfig, trained: Trained) -> list[Weight]:
        """Every weight, its shards' shapes checked and not yet read. Raises ValueError with the file and the tensor."""
        specs = [spec for spec in weight_specs(config) if spec.name != _HEAD or not trained.ties_head]
        expected = {self._find(spec.name) for spec in specs}
        for pp_rank, stage in enumerate(self.stages):
            for local, shards in stage.items():
                is_copy = local == _TIED_HEAD or local == _HEAD and trained.ties_head
                if (pp_rank, local) not in expected and not (is_copy and 0 < pp_rank == self.pp - 1):
                    raise ValueError(
                        f"{self._grid[pp_rank][0].name}: unexpected tensor {shards[0].stored}; "
                        f"the model of {config.num_layer} layers has none such"
                    )
        return [self._weight(spec, trained) for spec in specs]

    def _stage(self, pp_rank: int) -> dict[str, list[Shard]]:
        stage: dict[str, list[Shard]] = {}
        for tp_rank, place in enumerate(self._grid[pp_rank]):
            mine: dict[str, Shard] = {}
            for shard in place.headers():
                if shard.stored.endswith(_IGNORED):
                    continue
                name = _table_name(shard.stored)
                if name is None:
                    raise ValueError(f"{place.name}: unexpected tensor {shard.stored}; it is no part of Megatron's GPT")
                if name in mine:
                    raise ValueError(f"{place.name}: holds both {mine[name].stored} and {shard.stored}")
                mine[name] = shard
            for name in [name for name in mine if _second(name) in mine]:
                second = mine.pop(_second(name))
                first = mine[name]
                if (second.shape, second.dtype) != (first.shape, first.dtype):
                    raise ValueError(
                        f"{place.name}: tensor {second.stored} is {list(second.shape)} in "
                        f"{_dtype_name(second.dtype)}, and {first.stored} is {list(first.shape)} in "
                        f"{_dtype_name(first.dtype)}"
                    )
                mine[name] = replace(first, shape=(2 * first.shape[0], *first.shape[1:]), second=second.stored)
            if tp_rank and mine.keys() != stage.keys():
                name = next(name for name in (*mine, *stage) if (name in mine) != (name in stage))
                has, lacks = (place, self._grid[pp_rank][0]) if name in mine else (self._grid[pp_rank][0], place)
                raise ValueError(f"{lacks.name}: {name} is missing, and {has.name} has it")
            for name, shard in mine.items():
                stage.setdefault(name, []).append(shard)
                first = stage[name][0]
                if (shard.shape, shard.dtype) != (first.shape, first.dtype):
                    raise ValueError(
                        f"{place.name}: tensor {shard.stored} is {list(shard.shape)} in {_dtype_name(shard.dtype)}, "
                        f"and {list(first.shape)} in {_dtype_name(first.dtype)} on tensor-parallel rank 0"
                    )
            self._open.clear()
        return stage

    def _find(self, name: str) -> tuple[int, str] | None:
        """The pipeline rank that has a weight of the table, and its name there."""
        if not name.startswith("layers."):
            return next(((pp_rank, name) for pp_rank, stage in enumerate(self.stages) if name in stage), None)
        _, layer, part = name.split(".", 2)
        for pp_rank, first in enumerate(self.first_layers[:-1]):
            local = f"layers.{int(layer) - first}.{part}"
            if first <= int(layer) < self.first_layers[pp_rank + 1] and local in self.stages[pp_rank]:
                return pp_rank, local
        return None

    def _weight(self, spec: WeightSpec, trained: Trained) -> Weight:
        place = self._find(spec.name)
        if place is None:
            is_biased = trained.has_qkv_bias if "query_key_value" in spec.name else trained.has_biases
            if spec.name.endswith("bias") and not spec.name.endswith("norm.bias") and not is_biased:
                return Weight(spec.name, f"no bias: {spec.name}", lambda: torch.zeros(spec.shape))
            raise ValueError(f"{self._grid[0][0].name}: {spec.name} is missing, there and on the other ranks")
        pp_rank, local = place
        shards = self.stages[pp_rank][local]
        axis = _TRAINED_AXES.get(_part(spec.name))
        shape = _stored_shape(spec)
        if axis is not None:
            shared = shape[axis] if spec.split_axis is None else spec.shape[spec.split_axis]
            if shared % self.tp or "query_key_value" in spec.name and trained.kv_heads % self.tp:
                raise ValueError(
                    f"{self._grid[0][0].name}: trained on {self.tp} tensor-parallel ranks, which "
                    f"do not divide {spec.name} of shape {list(shape)} with {trained.kv_heads} heads"
                )
            shape = (*shape[:axis], shape[axis] // self.tp, *shape[axis + 1 :])
        of_others = f" (of {self.tp} shards)" if axis is not None and self.tp > 1 else ""
        origin = f"{self._grid[pp_rank][0].name}: tensor {shards[0].stored}{of_others}"
        if shards[0].shape != shape:
            raise ValueError(f"{origin} has shape {list(shards[0].shape)}; the settings ask for {list(shape)}")
        if shards[0].dtype not in _FLOATS:
            known = ", ".join(_FLOATS.values())
            raise ValueError(f"{origin} is stored as {_dtype_name(shards[0].dtype)}; supported: {known}")
        return Weight(spec.name, origin, partial(self._load, spec, pp_rank, local, axis, trained))

    def _load(self, spec: WeightSpec, pp_rank: int, local: str, axis: int | None, trained: Trained) -> torch.Tensor:
        """One weight as the table has it, out of every tensor-parallel rank's shard."""
        parts = [self._tensor(pp_rank, tp_rank, local) for tp_rank in range(self.tp)]
        is_interleaved = "query_key_value" in spec.name and trained.kv_heads == trained.heads
        row_axes = _row_axes(spec)
        if axis is None:
            self._compare(parts, pp_rank, local)
            parts = parts[:1]
        elif is_interleaved:
            parts, axis = [_by_head(part, trained.qkv_order, trained.heads // self.tp) for part in parts], 1
        elif row_axes:
            assert spec.split_axis is not None, spec  # training splits these weights, and so does the table
            axis = spec.split_axis % len(row_axes)
            sizes = [size // self.tp if index == axis else size for index, size in enumerate(row_axes)]
            parts = [part.unflatten(0, sizes) for part in parts]
        whole = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)
        if is_interleaved:  # [3, heads, head_dim, ...] → [3, hidden, ...]
            whole = whole.flatten(1, 2)
        if row_axes:
            return whole.movedim(-1, 0) if spec.name.endswith("weight") else whole
        if spec.name.endswith("norm.weight") and trained.norms_around_zero:
            return whole.float() + 1
        return whole if spec.name in ("wte", "wpe", _HEAD) or whole.ndim == 1 else whole.T

    def _compare(self, parts: list[torch.Tensor], pp_rank: int, local: str) -> None:
        """Warn if ranks' copies of a weight differ: training may let them drift. FasterTransformer takes rank 0's."""
        for tp_rank, part in enumerate(parts):
            if not self._has_warned and not torch.equal(part, parts[0]):
                self._has_warned = True
                worst = (part.float() - parts[0].float()).abs().max()
                _log.warning(
                    "%s: %s differs by up to %g from tensor-parallel rank 0's, which is taken",
                    self._grid[pp_rank][tp_rank].name,
                    self.stages[pp_rank][local][tp_rank].stored,
                    worst,
                )

    def _tensor(self, pp_rank: int, tp_rank: int, name: str) -> torch.Tensor:
        if self._read_bytes > _REOPEN_BYTES or any(stage != pp_rank for stage, _ in self._open):
            self._open.clear()  # lets go of the mappings before new ones are made
            self._read_bytes = 0
        if (pp_rank, tp_rank) not in self._open:
            self._open[pp_rank, tp_rank] = self._grid[pp_rank][tp_rank].open()
        read, is_mapped = self._open[pp_rank, tp_rank]
        shard = self.stages[pp_rank][name][tp_rank]
        tensor = read(shard.stored)
        if shard.second:
            tensor = torch.cat([tensor, read(shard.second)])
        if is_mapped:  # else the file is in memory whole, and would be read anew
            self._read_bytes += tensor.nbytes
        return tensor


def _table_name(stored: str) -> str | None:
    """Megatron's name → the table's, the layer numbered as stored; None if the table has no such weight."""
    prefix = _PREFIX.match(stored)
    assert prefix is not None  # an empty one matches too
    name = stored[prefix.end() :]
    found = _LAYER.fullmatch(name)
    if found is None:
        return _OUTER_NAMES.get(name)
    part = _LAYER_NAMES.get(found[2])
    return None if part is None else f"layers.{int(found[1])}.{part}"


def _part(name: str) -> str:
    """A table's name without the layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _stored_shape(spec: WeightSpec) -> tuple[int, ...]:
    """The whole weight's shape as Megatron keeps it: [out, in]."""
    if row_axes := _row_axes(spec):
        return (prod(row_axes), spec.shape[0]) if spec.name.endswith("weight") else (prod(row_axes),)
    return spec.shape if spec.name in ("wte", "wpe", _HEAD) else spec.shape[::-1]


def _row_axes(spec: WeightSpec) -> tuple[int, ...]:
    """The table's axes that Megatron's [out, ...] has as one, where there are several: of q, k, v and of a gate."""
    axes = spec.shape[1:] if spec.name.endswith("weight") else spec.shape
    return axes if len(axes) > 1 and spec.name.startswith("layers.") else ()


def _second(name: str) -> str:
    """The other matrix of a gated MLP, which NeMo's first such models keep apart; its rows follow the gate's.

    Empty for every name but that of the gate.
    """
    return name.replace("mlp.dense_h_to_4h.", "mlp.dense_h_to_4h_2.") if "mlp.dense_h_to_4h." in name else ""


def _by_head(part: torch.Tensor, order: str, heads: int) -> torch.Tensor:
    """[3 · heads · head_dim, ...] with its rows in `order` → [3, heads, head_dim, ...]."""
    sizes = {"3": 3, "n": heads, "d": part.shape[0] // (3 * heads)}
    rows = part.reshape(*(sizes[axis] for axis in order), *part.shape[1:])
    return rows.permute(*(order.index(axis) for axis in "3nd"), *range(3, rows.ndim))


def _dtype_name(dtype: torch.dtype) -> str:
    return _FLOATS.get(dtype, str(dtype).removeprefix("torch."))
