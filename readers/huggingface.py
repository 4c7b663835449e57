"""Shared by the readers of Hugging Face folders: checked values of config.json, checked tensors, tied heads.

A reader of one architecture gives the names and shapes of its tensors and the recipe of each weight of the table
(weights.table); everything is checked here. The only tensor that this module knows by name is `lm_head.weight`.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from readers.checkpoint import Checkpoint, Entry, Weight, copy_tokenizer, tokenizer_files
from readers.end_tokens import GENERATION_CONFIG, check_end_ids, is_token_id, listed_end_ids
from weights.model_config import DATA_TYPES, ModelConfig
from weights.table import WeightSpec, weight_specs

HEAD = "lm_head.weight"  # under this name in every architecture and in the table

# transformers' names → activation_type and gelu_form; FasterTransformer's gelu is the tanh form.
_ACTIVATIONS = {
    "gelu": ("gelu", "erf"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_fast": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", "tanh"),
    "relu2": ("squared_relu", "tanh"),
}
_FLOATS = ("fp64", *DATA_TYPES)


@dataclass(frozen=True)
class Recipe:
    """The recipe of one weight of the table: `build` takes the tensors of `parts` in order and returns it whole.

    `parts`: the architecture's names, without prefix → the shapes that config.json asks for. `label` is for messages:
    the word between the parts or, without parts, the reason.
    """

    parts: Mapping[str, tuple[int, ...]]
    build: Callable[..., torch.Tensor]
    label: str = ""


def as_stored(name: str, shape: tuple[int, ...]) -> Recipe:
    """A tensor already in the table's layout."""
    return Recipe({name: shape}, lambda tensor: tensor)


def transposed(name: str, shape: tuple[int, ...]) -> Recipe:
    """A matrix of torch.nn.Linear, which is [out, in]; `shape` is the table's, [in, out]."""
    return Recipe({name: shape[::-1]}, torch.Tensor.t)


def by_head(name: str, spec: WeightSpec, head_dim: int) -> Recipe:
    """q, k and v in one linear, stored as [heads, 3, head_dim] and, of a matrix, [in]; the table has q, k, v first."""
    *inputs, three, width = spec.shape

    def build(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.unflatten(0, (-1, three, head_dim)).transpose(0, 1)  # [3, heads, head_dim, …]
        return heads.flatten(1, 2).movedim(-1, 0) if inputs else heads.flatten(1)

    return Recipe({name: (three * width, *inputs)}, build)


def split_name(spec: WeightSpec) -> tuple[str, str, str]:
    """layers.3.attention.dense.bias → (3, attention.dense, bias); outside the layers the first is empty."""
    part, _, kind = spec.name.rpartition(".")
    if not part.startswith("layers."):
        return "", part, kind
    _, layer, part = part.split(".", 2)
    return layer, part, kind


class HuggingFaceReader:
    """Reads one folder. A subclass gives the attributes below, `shape` and `recipe`."""

    architecture: str  # with its article, for messages
    embedding: str  # the token embedding's name, without prefix
    prefix: re.Pattern[str]  # what stored names may begin with: whether they do depends on the class that saved them
    buffers: re.Pattern[str]  # names, without prefix, of tensors that are no weights
    renamed: Mapping[str, str] = {}  # names, without prefix, that some versions wrote → the architecture's
    defaults: Mapping[str, Any]  # config.json's keys that may be absent, with transformers' values for that case
    aliases: Mapping[str, str] = {}  # other names of config.json's keys that transformers takes
    required: Mapping[str, Any] = {}  # keys of variants that compute something else → the one value that is served
    repeats_head = False  # whether lm_head.weight is written even where it is the embedding

    def __init__(self, source: Path, settings: dict[str, Any]) -> None:
        """`settings` is the parsed config.json. Raises ValueError where the weight files are not all there."""
        self._source = source
        self._path = source / "config.json"
        renamed = {self.aliases[name]: value for name, value in settings.items() if name in self.aliases}
        self._settings = {**self.defaults, **settings, **{name: v for name, v in renamed.items() if v is not None}}
        self._checkpoint = Checkpoint(source)
        self.files = [*self._checkpoint.files, *tokenizer_files(source)]

    def shape(self) -> dict[str, Any]:
        """ModelConfig's fields that depend on the architecture."""
        raise NotImplementedError

    def recipe(self, spec: WeightSpec) -> Recipe:
        """How one weight of the table is made."""
        raise NotImplementedError

    def config(self, weight_data_type: str, tp: int, model_name: str) -> ModelConfig:
        """The model's config.ini. Raises ValueError with config.json's key for a model that cannot be served."""
        for name, value in self.required.items():
            if self._settings.get(name, value) != value:
                raise ValueError(f"{self._path}: {name} is {self._settings[name]!s:.100}; only {value} is supported")
        end_ids = self._end_ids()
        values = {
            "model_name": model_name,
            "vocab_size": self._size("vocab_size"),
            "start_id": end_ids[0] if self._settings["bos_token_id"] is None else self._token_id("bos_token_id"),
            "end_id": end_ids[0],
            "end_ids": end_ids,
            "weight_data_type": weight_data_type,
            "tensor_para_size": tp,
            **self.shape(),
        }
        try:
            return ModelConfig(**values)
        except ValueError as error:
            raise ValueError(f"{self._path}: {str(error).removeprefix('config.ini: ')}") from None

    def data_type(self) -> str:
        """The data type in which most of the weights are stored; fp64, which has no place on disk, is fp32."""
        counts: Counter[str] = Counter()
        for _, entry in self._entries().values():
            counts[entry.data_type] += entry.num_elements
        data_type = counts.most_common(1)[0][0] if counts else "fp32"
        return data_type if data_type in DATA_TYPES else "fp32"

    def weights(self, config: ModelConfig) -> list[Weight]:
        """Every weight, checked and not yet read. Raises ValueError with the file and the tensor."""
        entries = self._entries()
        recipes = {spec.name: self.recipe(spec) for spec in weight_specs(config)}
        parts = {name: shape for recipe in recipes.values() for name, shape in recipe.parts.items()}
        for name, (stored, entry) in entries.items():
            if name not in parts:
                raise ValueError(
                    f"{entry.path}: unexpected tensor {stored}; "
                    f"{self.architecture} of {config.num_layer} layers has none such"
                )
        if self._settings["tie_word_embeddings"]:  # transformers ties in either direction
            for absent, present in ((HEAD, self.embedding), (self.embedding, HEAD)):
                if absent not in entries and present in entries:
                    entries[absent] = entries[present]
        missing = [name for name in parts if name not in entries]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self._source}: tensor {missing[0]} is missing{more}")
        for name, shape in parts.items():
            self._check(*entries[name], shape)
        if not self.repeats_head and self._is_tied(entries):
            del recipes[HEAD]
        return [self._weight(name, recipe, entries) for name, recipe in recipes.items()]

    def write_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self._source, folder)

    def _entries(self) -> dict[str, tuple[str, Entry]]:
        """The architecture's name, without prefix, → the stored name and its header entry; buffers left out."""
        entries: dict[str, tuple[str, Entry]] = {}
        for stored, entry in self._checkpoint.entries.items():
            name = self.prefix.sub("", stored, count=1)
            name = self.renamed.get(name, name)
            if name in entries:
                raise ValueError(f"{entry.path}: holds both {entries[name][0]} and {stored}")
            if not self.buffers.fullmatch(name):
                entries[name] = stored, entry
        return entries

    def _check(self, stored: str, entry: Entry, shape: tuple[int, ...]) -> None:
        origin = self._checkpoint.origin(stored)
        if entry.shape != shape:
            raise ValueError(f"{origin} has shape {list(entry.shape)}; config.json asks for {list(shape)}")
        if entry.data_type not in _FLOATS:
            raise ValueError(f"{origin} is stored as {entry.data_type}; supported: {', '.join(_FLOATS)}")

    def _is_tied(self, entries: dict[str, tuple[str, Entry]]) -> bool:
        """Whether the head is the embedding, or is stored as the embedding again.

        The stored tensors decide, as in transformers 5, not tie_word_embeddings: .bin files hold both tensors of a tied
        model, and a head that was trained apart would be lost.
        """
        (wte_name, _), (head_name, _) = entries[self.embedding], entries[HEAD]
        if wte_name == head_name:
            return True
        wte, head = self._checkpoint.tensor(wte_name), self._checkpoint.tensor(head_name)
        return wte.dtype == head.dtype and (wte.data_ptr() == head.data_ptr() or torch.equal(wte, head))

    def _weight(self, name: str, recipe: Recipe, entries: dict[str, tuple[str, Entry]]) -> Weight:
        stored = [entries[part][0] for part in recipe.parts]
        paths = sorted({str(entries[part][1].path) for part in recipe.parts})
        origin = f"{', '.join(paths)}: tensor {recipe.label.join(stored)}" if paths else f"{self._path}: {recipe.label}"
        return Weight(name, origin, partial(self._load, stored, recipe.build))

    def _load(self, stored: list[str], build: Callable[..., torch.Tensor]) -> torch.Tensor:
        return build(*map(self._checkpoint.tensor, stored))

    # config.json's values, checked

    def _size(self, name: str) -> int:
        value = self._settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self._path}: {name} is {reprlib.repr(value)}; it must be a whole number of at least 1")
        return value

    def _is(self, name: str) -> bool:
        value = self._settings[name]
        if not isinstance(value, bool):
            raise ValueError(f"{self._path}: {name} is {reprlib.repr(value)}; it must be true or false")
        return value

    def _token_id(self, name: str) -> int:
        value = self._settings[name]
        if not is_token_id(value, self._vocab_size):
            raise ValueError(
                f"{self._path}: {name} is {reprlib.repr(value)}; it must be one of the {self._vocab_size} token ids"
            )
        return value

    def _end_ids(self) -> tuple[int, ...]:
        """All tokens that end a text. As in transformers' generate, generation_config.json overrules config.json."""
        own, generation = self._settings["eos_token_id"], self._source / GENERATION_CONFIG
        listed = listed_end_ids(generation)
        path, value = (self._path, own) if listed is None else (generation, listed)
        return check_end_ids(path, value, own, self._vocab_size)

    @property
    def _vocab_size(self) -> int:
        return self._size("vocab_size")

    def _heads(self, heads_name: str, hidden_name: str) -> dict[str, int]:
        heads, hidden = self._size(heads_name), self._size(hidden_name)
        if hidden % heads:
            raise ValueError(f"{self._path}: {heads_name} {heads} does not divide {hidden_name} {hidden}")
        return {"head_num": heads, "size_per_head": hidden // heads}

    def _epsilon(self, name: str) -> float:
        value = self._settings[name]
        if not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"{self._path}: {name} is {reprlib.repr(value)}; it must lie between 0 and 1")
        return float(value)

    def _activation(self, name: str) -> dict[str, str]:
        value = self._settings[name]
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise ValueError(
                f"{self._path}: {name} {reprlib.repr(value)} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            )
        return dict(zip(("activation_type", "gelu_form"), _ACTIVATIONS[value], strict=True))
