"""The model: the `[gpt]` section of a FasterTransformer config.ini, checked once. Imports no torch."""

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
# Counts that loops run over, and sizes that fit FasterTransformer's ints; far above any model's.
_LARGEST = {"num_layer": 10_000, "head_num": 65_536, "kv_head_num": 65_536, "tensor_para_size": 65_536}
_LARGEST_SIZE = 2**31 - 1
_LENGTH_WITHOUT_POSITIONS = 2048  # tokens; such a model has no limit of its own
# Keys that came after the first converted folders: a folder that does not need them stays as it was, byte for byte.
_WRITTEN_IF_CHANGED = (
    "hidden_size",
    "end_ids",
    "has_qkv_bias",
    "has_dense_bias",
    "has_mlp_bias",
    "rotary_low_freq_factor",
    "rotary_high_freq_factor",
    "rotary_trained_positions",
    "sliding_window",
    "full_attention_layers",
    "qk_layernorm",
    "use_parallel_residual",
    "has_post_attention_layernorm",
    "has_lm_head_bias",
    "rotary_ramp_first",
    "rotary_ramp_last",
    "rotary_attention_factor",
)


@dataclass(frozen=True)
class ModelConfig:
    """A GPT's shape and switches, under FasterTransformer's names and with its defaults for absent keys.

    Sizes are of the whole model, not of one rank. `inter_size` 0 stands for 4 × hidden_size. `max_pos_seq_len` is the
    number of positions; a model without positions takes it as the default of EngineConfig.max_seq_len (0: 2048).

    Keys and values beyond FasterTransformer's GPT op:
    - `gelu_form`: tanh, the op's own form, or erf, the exact one.
    - `apply_residual_connection_post_layernorm` (BLOOM's name), a variant of pre_layernorm: the residual of attention
      and MLP is their normalized input. FasterTransformer's converter takes it for post_layernorm.
    - `normalization_type`: rmsnorm has no bias and subtracts no mean.
    - `activation_type`: squared_relu, and swiglu, whose MLP has two matrices before the activation.
    - `kv_head_num`: heads of keys and values; head_num / kv_head_num query heads share one. 0 stands for head_num.
    - `rotary_embedding` (FasterTransformer's GPT-J and GPT-NeoX have it): the number of a head's first elements that
      the position rotates, 0 for none. `rotary_base`^(-2i / rotary_embedding) is the angle per position, in radians;
      `rotary_interpolation_factor` divides positions.
    - `rotary_trained_positions`, 0 for none: Llama 3's scaling. Frequencies that turn less than
      `rotary_low_freq_factor` times in so many positions are divided by the interpolation factor, those that turn more
      than `rotary_high_freq_factor` times are not, and those between are in proportion.
    - `rotary_ramp_first`, `rotary_ramp_last`, 0 for none: YaRN's scaling. Of the frequencies, fastest first, those up
      to the first place are not divided by the interpolation factor, those from the last place on are, and those
      between are in proportion. `rotary_attention_factor` multiplies the rotated elements of queries and keys.
    - `qk_layernorm`: a norm of normalization_type over each head of queries and of keys, before the rotation.
    - `use_parallel_residual`, a variant of pre_layernorm: x + attention(ln(x)) + mlp(ln(x)), with a norm for each; or
      with one norm for both, where `has_post_attention_layernorm` is False.
    - `has_lm_head_bias`: the logits have a bias.
    - `hidden_size`: 0 stands for head_num · size_per_head.
    - `end_ids`: all tokens that end a text, `end_id` first; empty stands for `end_id` alone.
    - `sliding_window`, 0 for none: a query sees so many tokens only, itself included. Those of the
      `full_attention_layers`, numbered from 0, see all. None: older converters did not write which layers these are,
      and sequences end at the window.
    - `has_qkv_bias`, `has_dense_bias`, `has_mlp_bias`: False means that these .bias files do not exist.
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
    hidden_size: int = 0
    end_ids: tuple[int, ...] = ()
    has_qkv_bias: bool = True
    has_dense_bias: bool = True
    has_mlp_bias: bool = True
    rotary_low_freq_factor: float = 1.0
    rotary_high_freq_factor: float = 4.0
    rotary_trained_positions: int = 0
    sliding_window: int = 0
    full_attention_layers: tuple[int, ...] | None = None
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    has_post_attention_layernorm: bool = True
    has_lm_head_bias: bool = False
    rotary_ramp_first: float = 0.0
    rotary_ramp_last: float = 0.0
    rotary_attention_factor: float = 1.0

    def __post_init__(self) -> None:
        def set_default(name: str, value: object) -> None:
            object.__setattr__(self, name, getattr(self, name) or value)

        set_default("hidden_size", self.attention_size)
        set_default("inter_size", 4 * self.hidden_size)
        set_default("kv_head_num", self.head_num)
        set_default("end_ids", (self.end_id,))
        if not self.has_positional_encoding:
            set_default("max_pos_seq_len", _LENGTH_WITHOUT_POSITIONS)
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name in (
            "head_num",
            "size_per_head",
            "hidden_size",
            "num_layer",
            "vocab_size",
            "inter_size",
            "max_pos_seq_len",
            "tensor_para_size",
            "kv_head_num",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)}; it must be at least 1")
            if getattr(self, name) > (most := _LARGEST.get(name, _LARGEST_SIZE)):
                raise ValueError(f"config.ini: {name} is {getattr(self, name)}; it must be at most {most}")
        for name in ("rotary_trained_positions", "sliding_window"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)}; it must be at least 0")
        for name, allowed in (
            ("weight_data_type", tuple(DATA_TYPES)),
            ("activation_type", _ACTIVATIONS),
            ("layernorm_type", _LAYERNORM_TYPES),
            ("gelu_form", _GELU_FORMS),
            ("normalization_type", _NORMALIZATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)!r}; known: {', '.join(allowed)}")
        for name in (
            "rotary_base",
            "rotary_interpolation_factor",
            "rotary_low_freq_factor",
            "rotary_high_freq_factor",
            "rotary_attention_factor",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"config.ini: {name} is {getattr(self, name)}; it must be above 0")
        for name, value in (("start_id", self.start_id), *(("end_id", value) for value in self.end_ids)):
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"config.ini: {name} is {value}; the vocabulary has {self.vocab_size} tokens")

    def _check_combinations(self) -> None:
        for layer in self.full_attention_layers or ():
            if not 0 <= layer < self.num_layer:
                raise ValueError(
                    f"config.ini: full_attention_layers has {layer}; the model's {self.num_layer} layers begin at 0"
                )
        if self.apply_residual_connection_post_layernorm and self.layernorm_type != "pre_layernorm":
            raise ValueError(
                f"config.ini: apply_residual_connection_post_layernorm is True; layernorm_type must be pre_layernorm "
                f"then, not {self.layernorm_type}"
            )
        self._check_parallel_residual()
        self._check_rotation()
        if self.head_num % self.kv_head_num:
            raise ValueError(
                f"config.ini: kv_head_num is {self.kv_head_num}; it must divide the {self.head_num} heads of queries"
            )
        if self.end_ids[0] != self.end_id:
            listed = ", ".join(map(str, self.end_ids))
            raise ValueError(f"config.ini: end_ids is {listed}; it must begin with end_id, {self.end_id}")
        if len(set(self.end_ids)) != len(self.end_ids):
            raise ValueError(f"config.ini: end_ids is {', '.join(map(str, self.end_ids))}; it names a token twice")

    def _check_parallel_residual(self) -> None:
        if not self.use_parallel_residual:
            if not self.has_post_attention_layernorm:
                raise ValueError(
                    "config.ini: has_post_attention_layernorm is False; use_parallel_residual must be True"
                )
        elif self.layernorm_type != "pre_layernorm" or self.apply_residual_connection_post_layernorm:
            raise ValueError(
                "config.ini: use_parallel_residual is True; layernorm_type must be pre_layernorm then, and "
                "apply_residual_connection_post_layernorm False"
            )

    def _check_rotation(self) -> None:
        if self.rotary_embedding % 2 or not 0 <= self.rotary_embedding <= self.size_per_head:
            raise ValueError(
                f"config.ini: rotary_embedding is {self.rotary_embedding}; it must be even, and at most size_per_head "
                f"{self.size_per_head}"
            )
        if self.rotary_high_freq_factor <= self.rotary_low_freq_factor:
            raise ValueError(
                f"config.ini: rotary_high_freq_factor is {self.rotary_high_freq_factor}; it must be above "
                f"rotary_low_freq_factor {self.rotary_low_freq_factor}"
            )
        first, last = self.rotary_ramp_first, self.rotary_ramp_last
        if not (0 <= first < last < math.inf or first == last == 0):
            raise ValueError(
                f"config.ini: rotary_ramp_last is {last}; it must be above rotary_ramp_first {first}, or both 0"
            )
        if last and self.rotary_trained_positions:
            raise ValueError(
                f"config.ini: rotary_ramp_last is {last}; rotary_trained_positions must be 0 then, "
                f"not {self.rotary_trained_positions}"
            )

    @property
    def attention_size(self) -> int:
        """The width of all heads' queries together: head_num · size_per_head."""
        return self.head_num * self.size_per_head

    def window(self, layer: int) -> int:
        """The number of tokens that a query of this layer sees, itself included; 0 for all."""
        return 0 if layer in (self.full_attention_layers or ()) else self.sliding_window

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's activation multiplies two products of its input."""
        return self.activation_type == "swiglu"

    def check_tp(self, tp: int) -> None:
        """Raise ValueError unless tp divides head_num and inter_size, and divides kv_head_num or is its multiple."""
        heads, kv_heads = self.head_num, self.kv_head_num
        allowed = [
            n
            for n in range(1, heads + 1)
            if heads % n == 0 and self.inter_size % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
        ]
        if tp not in allowed:
            of_kv = f", {kv_heads} heads of keys and values" if kv_heads != heads else ""
            raise ValueError(
                f"tp {tp} does not divide this model's {heads} heads{of_kv} and inter_size {self.inter_size}; "
                f"possible: {', '.join(map(str, allowed))}"
            )

    def kv_heads_local(self, tp: int) -> int:
        """KV heads of one rank: at least one, which tp / kv_head_num ranks copy where tp is larger."""
        return max(1, self.kv_head_num // tp)

    @classmethod
    def read(cls, path: Path) -> ModelConfig:
        """Read a config.ini; ignores unknown keys, of which converters write many.

        Raises ValueError with the file and the key for a missing or malformed value.
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
        """Write config.ini with every key, so that FasterTransformer's defaults never come into play.

        Keys in _WRITTEN_IF_CHANGED appear only with another value than the default.
        """
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        defaults |= {"hidden_size": self.attention_size, "end_ids": (self.end_id,)}
        for name in _WRITTEN_IF_CHANGED:
            if values[name] == defaults[name]:
                del values[name]
        parser = configparser.ConfigParser(interpolation=None)
        parser["gpt"] = {name: _format(value) for name, value in values.items()}
        with path.open("w") as file:
            parser.write(file)


def _format(value: typing.Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(int(value) if isinstance(value, bool) else value)


def _parse(section: configparser.SectionProxy, name: str, kind: type) -> typing.Any:
    if kind is bool:
        return section.getboolean(name)
    if name == "full_attention_layers" and not section[name]:
        return ()
    if name in ("end_ids", "full_attention_layers"):
        return tuple(map(int, section[name].split(",")))
    if name == "activation_type":  # FasterTransformer's own converters write Gelu and Relu
        return section[name].lower()
    return kind(section[name])
