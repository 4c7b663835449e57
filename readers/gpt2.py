"""Hugging Face GPT-2: config.json → ModelConfig, tensors → FasterTransformer's table.

GPT-2's linears are Conv1D modules, stored [in, out] as FasterTransformer wants them: nothing is transposed.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config import DATA_TYPES, ModelConfig
from engine.weights import WeightSpec, weight_specs
from readers.checkpoint import Checkpoint, Entry, Weight, copy_tokenizer, tokenizer_files

# config.json's keys that may be absent, with transformers' values for that case.
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}
# FasterTransformer's gelu is the tanh form; transformers' "gelu" is the exact one.
_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu": "relu"}
# Variants that compute something else. (reorder_and_upcast_attn is not among them: it changes rounding only.)
_REQUIRED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_OUTER_NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "final_layernorm.weight": "ln_f.weight",
    "final_layernorm.bias": "ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which older versions saved
_FLOATS = ("fp64", *DATA_TYPES)


class GPT2Reader:
    """Reads a GPT-2 checkpoint, saved with or without its language-model head."""

    def __init__(self, source: Path, settings: dict[str, Any]) -> None:
        """`settings` is the parsed config.json. Raises ValueError where the weight files are not all there."""
        self._source = source
        self._path = source / "config.json"
        self._settings = _DEFAULTS | settings
        self._checkpoint = Checkpoint(source)
        self.files = [*self._checkpoint.files, *tokenizer_files(source)]

    def config(self, weight_data_type: str, tp: int, model_name: str) -> ModelConfig:
        """The model's config.ini. Raises ValueError, naming config.json's key, for what cannot be served."""
        for name, value in _REQUIRED.items():
            if self._settings.get(name, value) != value:
                raise ValueError(f"{self._path}: {name} is {self._settings[name]}; only {value} is supported")
        activation = self._settings["activation_function"]
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{self._path}: activation_function {activation!r} is not supported; "
                f"supported: {', '.join(_ACTIVATIONS)}"
            )
        hidden, heads = self._size("n_embd"), self._size("n_head")
        if hidden % heads:
            raise ValueError(f"{self._path}: n_head {heads} does not divide n_embd {hidden}")
        epsilon = self._settings["layer_norm_epsilon"]
        if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
            raise ValueError(f"{self._path}: layer_norm_epsilon is {epsilon!r}; it must lie between 0 and 1")
        end_id = self._token_id("eos_token_id")
        return ModelConfig(
            model_name=model_name,
            head_num=heads,
            size_per_head=hidden // heads,
            inter_size=4 * hidden if self._settings["n_inner"] is None else self._size("n_inner"),
            num_layer=self._size("n_layer"),
            max_pos_seq_len=self._size("n_positions"),
            vocab_size=self._size("vocab_size"),
            start_id=end_id if self._settings["bos_token_id"] is None else self._token_id("bos_token_id"),
            end_id=end_id,
            weight_data_type=weight_data_type,
            tensor_para_size=tp,
            layernorm_eps=float(epsilon),
            activation_type=_ACTIVATIONS[activation],
        )

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
        sources = {spec.name: _source_name(spec) for spec in weight_specs(config)}
        for name, (stored, entry) in entries.items():
            if name not in sources.values():
                raise ValueError(
                    f"{entry.path}: unexpected tensor {stored}; a GPT-2 of {config.num_layer} layers has none such"
                )
        sources = self._tie(sources, entries)
        missing = [name for name in sources.values() if name not in entries]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{self._source}: tensor {missing[0]} is missing{more}")
        specs = [spec for spec in weight_specs(config) if spec.name in sources]
        for spec in specs:
            self._check(spec, *entries[sources[spec.name]])
        if "lm_head.weight" in sources and self._is_tied(sources, entries):
            specs = [spec for spec in specs if spec.name != "lm_head.weight"]
        return [
            Weight(spec.name, self._checkpoint.origin(stored), partial(self._load, stored, spec.shape))
            for spec, (stored, _) in ((spec, entries[sources[spec.name]]) for spec in specs)
        ]

    def write_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self._source, folder)

    def _entries(self) -> dict[str, tuple[str, Entry]]:
        """GPT-2's name, without `transformer.`, → the stored name and its header entry; buffers left out."""
        entries: dict[str, tuple[str, Entry]] = {}
        for stored, entry in self._checkpoint.entries.items():
            name = stored.removeprefix("transformer.")
            if name in entries:
                raise ValueError(f"{entry.path}: holds both {entries[name][0]} and {stored}")
            if not _BUFFERS.fullmatch(name):
                entries[name] = stored, entry
        return entries

    def _tie(self, sources: dict[str, str], entries: dict[str, tuple[str, Entry]]) -> dict[str, str]:
        """Settle where the embedding and the head come from if only one of them is stored."""
        if not self._settings["tie_word_embeddings"]:
            return sources
        head = sources["lm_head.weight"]
        sources = {name: source for name, source in sources.items() if source != head or head in entries}
        if sources["wte"] not in entries and head in entries:  # transformers ties in either direction
            sources["wte"] = sources.pop("lm_head.weight")
        return sources

    def _is_tied(self, sources: dict[str, str], entries: dict[str, tuple[str, Entry]]) -> bool:
        """Whether the stored head is the embedding again.

        What is stored decides, as in transformers 5, whatever tie_word_embeddings says: .bin files hold both
        tensors of a tied model, and a head that was trained apart would be lost.
        """
        wte, head = (self._checkpoint.tensor(entries[sources[name]][0]) for name in ("wte", "lm_head.weight"))
        return wte.dtype == head.dtype and (wte.data_ptr() == head.data_ptr() or torch.equal(wte, head))

    def _check(self, spec: WeightSpec, stored: str, entry: Entry) -> None:
        expected = _source_shape(spec)
        origin = self._checkpoint.origin(stored)
        if entry.shape != expected:
            raise ValueError(f"{origin} has shape {list(entry.shape)}; config.json asks for {list(expected)}")
        if entry.data_type not in _FLOATS:
            raise ValueError(f"{origin} is stored as {entry.data_type}; supported: {', '.join(_FLOATS)}")

    def _load(self, stored: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.tensor(stored).reshape(shape)

    def _size(self, name: str) -> int:
        value = self._settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self._path}: {name} is {value!r}; it must be a whole number of at least 1")
        return value

    def _token_id(self, name: str) -> int:
        value, vocab_size = self._settings[name], self._size("vocab_size")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise ValueError(f"{self._path}: {name} is {value!r}; it must be one of the {vocab_size} token ids")
        return value


def _source_name(spec: WeightSpec) -> str:
    """GPT-2's name for a weight of the table, without `transformer.`."""
    if spec.name in _OUTER_NAMES:
        return _OUTER_NAMES[spec.name]
    _, layer, rest = spec.name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"h.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _source_shape(spec: WeightSpec) -> tuple[int, ...]:
    """GPT-2 keeps q, k and v side by side in one axis, where the table has an axis of 3."""
    *rows, num_parts, columns = spec.shape if "query_key_value" in spec.name else (*spec.shape[:-1], 1, spec.shape[-1])
    return (*rows, num_parts * columns)
