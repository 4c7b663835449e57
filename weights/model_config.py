"""The model: the `[gpt]` section of a FasterTransformer config.ini, checked once. No torch here."""

from __future__ import annotations

import configparser
import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path

DATA_TYPES = {"fp32": 4, "fp16": 2, "bf16": 2}  # name -> bytes per element
_ACTIVATIONS = ("gelu", "relu", "squared_relu", "swiglu")
_NORMALIZATIONS = ("layernorm", "rmsnorm")
_GELU_FORMS = ("tanh", "erf")
_LAYERNORM_TYPES = ("pre_layernorm", "post_layernorm")
_LENGTH_WITHOUT_POSITIONS = 2048  # tokens; such a model has no limit of its own


@dataclass(frozen=True)
class ModelConfig:
    """A GPT's shape and switches, under FasterTransformer's names and defaults for absent keys.

    Sizes are those of the whole model, not of one rank. `inter_size` 0 stands for 4 × hidden. `max_pos_seq_len` is
    the number of positions; for a model without any it is but the default of EngineConfig.max_seq_len, 0 for 2048.

    Some keys and values are ours; the op for which FasterTransformer's GPT reads this file has none of them.
    `gelu_form`: tanh, as its gelu is, or erf, the exact one. `apply_residual_connection_post_layernorm`, a variant of
    pre_layernorm under BLOOM's name: what is added to attention's and to the MLP's output is their normalized input
    (its converter takes it for post_layernorm). `normalization_type`: rmsnorm has no bias and subtracts no mean.
    `activation_type`: squared_relu, and swiglu, whose MLP has two matrices before it. `kv_head_num`: heads of keys
    and values, each read by head_num / kv_head_num heads; 0 stands for head_num. `rotary_embedding` (the key that
    FasterTransformer's GPT-J and GPT-NeoX have): how many of a head's first elements are turned by the position, 0
    for none; `rotary_base` to the power of -2i / rotary_embedding is how far, in radians for each position, and
    `rotary_interpolation_factor` divides positions.
    """

    head_num: int
    size_per_head: int
    num_layer: int
    vocab_size: int
    start_id: int
    end_id: int
    model_name: str = "gpt"
    inter_size: int = 0
    max_pos_seq_len: int = 0
    weight_data_type: str = "fp32"
    tensor_para_size: int = 1
    layernorm_eps: float = 1e-6
    layernorm_type: str = "pre_layernorm"
    activation_type: str = "gelu"
    has_positional_encoding: bool = True
    has_pre_decoder_layernorm: bool = False
    has_post_decoder_layernorm: bool = True
    use_attention_linear_bias: bool = False
    has_adapters: bool = False
    adapter_inter_size: int = 0
    gelu_form: str = "tanh"
    apply_residual_connection_post_layernorm: bool = False
    normalization_type: str = "layernorm"
    kv_head_num: int = 0
    rotary_embedding: int = 0
    rotary_base: float = 10000.0
    rotary_interpolation_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.inter_size == 0:
            object.__setattr__(self, "inter_size", 4 * self.hidden)
        if self.kv_head_num == 0:
            object.__setattr__(self, "kv_head_num", self.head_num)
        if not self.has_positional_encoding and self.max_pos_seq_len == 0:
            object.__setattr__(self, "max_pos_seq_len", _LENGTH_WITHOUT_POSITIONS)
        for name in (
            "head_num",
            "size_per_head",
            "num_layer",
            "vocab_size",
            "inter_size",
            "max_pos_seq_len",
            "tensor_para_size",
            "kv_head_num",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)}; it must be at least 1")
        for name, allowed in (
            ("weight_data_type", tuple(DATA_TYPES)),
            ("activation_type", _ACTIVATIONS),
            ("layernorm_type", _LAYERNORM_TYPES),
            ("gelu_form", _GELU_FORMS),
            ("normalization_type", _NORMALIZATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)!r}; known: {', '.join(allowed)}")
        if self.apply_residual_connection_post_layernorm and self.layernorm_type != "pre_layernorm":
            raise ValueError(
                f"config.ini: apply_residual_connection_post_layernorm is True; layernorm_type must be pre_layernorm "
                f"then, not {self.layernorm_type}"
            )
        if self.head_num % self.kv_head_num:
            raise ValueError(
                f"config.ini: kv_head_num is {self.kv_head_num}; it must divide the {self.head_num} heads of queries"
            )
        if self.rotary_embedding % 2 or not 0 <= self.rotary_embedding <= self.size_per_head:
            raise ValueError(
                f"config.ini: rotary_embedding is {self.rotary_embedding}; it must be even, and at most size_per_head "
                f"{self.size_per_head}"
            )
        for name in ("rotary_base", "rotary_interpolation_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)}; it must be above 0")
        for name in ("start_id", "end_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"config.ini: {name} is {getattr(self, name)}; the vocabulary has {self.vocab_size} tokens"
                )

    @property
    def hidden(self) -> int:
        return self.head_num * self.size_per_head

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's activation multiplies two products of its input."""
        return self.activation_type == "swiglu"

    def check_tp(self, tp: int) -> None:
        """Raise ValueError where `tp` ranks cannot share the heads and the MLP evenly."""
        heads = self.kv_head_num  # divides the heads of queries
        allowed = [n for n in range(1, heads + 1) if heads % n == 0 and self.inter_size % n == 0]
        if tp not in allowed:
            of_what = "heads" if heads == self.head_num else "heads of keys and values"
            raise ValueError(
                f"tp {tp} does not divide this model's {heads} {of_what} and inter_size {self.inter_size}; "
                f"possible: {', '.join(map(str, allowed))}"
            )

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a config.ini; keys that are not ours (converters write many) are passed over.

        Raises ValueError with the file and the key for what is missing or cannot be parsed.
        """
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text())
        except configparser.Error as error:
            raise ValueError(f"{path}: not an ini file ({str(error).splitlines()[0]})") from None
        if not parser.has_section("gpt"):
            raise ValueError(f"{path}: no section [gpt]")
        section = parser["gpt"]
        values: dict[str, typing.Any] = {}
        if folder := re.fullmatch(r"(\d+)-gpu", path.absolute().parent.name):  # all that FT's OPT converter says of it
            values["tensor_para_size"] = int(folder[1])
        types = typing.get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            if spec.name not in section:
                if spec.name not in values and spec.default is dataclasses.MISSING:
                    raise ValueError(f"{path}: key {spec.name} is missing from [gpt]")
                continue
            try:
                values[spec.name] = _parse(section, spec.name, types[spec.name])
            except ValueError:
                raise ValueError(f"{path}: {spec.name} = {section[spec.name]!r} is not a valid value") from None
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix('config.ini: ')}") from None

    def write(self, path: Path) -> None:
        """Write config.ini with every key, so that FasterTransformer's defaults never come into play."""
        parser = configparser.ConfigParser(interpolation=None)
        parser["gpt"] = {
            name: str(int(value) if isinstance(value, bool) else value)
            for name, value in dataclasses.asdict(self).items()
        }
        with path.open("w") as file:
            parser.write(file)


def _parse(section: configparser.SectionProxy, name: str, kind: type) -> typing.Any:
    if kind is bool:
        return section.getboolean(name)
    if name == "activation_type":  # FasterTransformer's own converters write Gelu and Relu
        return section[name].lower()
    return kind(section[name])
