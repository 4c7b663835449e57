"""The rotary settings of Hugging Face's config.json → ModelConfig's rotary_… fields; YaRN's for all readers.

Format: transformers/modeling_rope_utils.py. transformers 4 wrote rope_theta, rope_scaling and partial_rotary_factor;
transformers 5 writes rope_parameters, which holds all three, and may hold them once for each type of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SUPPORTED = ("linear", "llama3", "yarn")


class RotarySettings:
    """One model's settings, checked while they are read. Errors are ValueErrors with the file and the key."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """settings: config.json's, with the family's rope_theta and partial_rotary_factor where it has none."""
        self._path = path
        self._settings = settings
        self._key = "rope_scaling" if settings["rope_scaling"] else "rope_parameters"
        self._given = self._of_all_layers(settings[self._key] or {})

    def _of_all_layers(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise ValueError(f"{self._path}: {self._key} is {given!r}; settings are expected")
        by_type = {name: value for name, value in given.items() if isinstance(value, dict)}
        if not by_type:
            return given
        (first, settings), *others = by_type.items()
        for name, value in others:
            if value != settings:
                raise ValueError(
                    f"{self._path}: {self._key} differs between {first} and {name}; "
                    f"only the same settings for all layers are supported"
                )
        self._key += f".{first}"
        return settings

    def part(self) -> float:
        """The share of a head that the position rotates."""
        name = "partial_rotary_factor"
        part = self._given.get(name)
        if part is None:
            part, label = self._settings[name], name
        else:
            label = f"{self._key}.{name}"
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ValueError(f"{self._path}: {label} is {part!r}; it must be above 0 and at most 1")
        return part

    def fields(self, head_dim: int, only_part: float | None = None) -> dict[str, Any]:
        """ModelConfig's fields. only_part: the one share of a head that the architecture computes; None: any."""
        part = self.part()
        if only_part not in (None, part):
            raise ValueError(f"{self._path}: partial_rotary_factor is {part}; only {only_part} is supported")
        kind = self._given.get("rope_type", self._given.get("type", "default"))
        fields: dict[str, Any] = {
            "rotary_embedding": int(head_dim * part),
            "rotary_base": self._positive("rope_theta", self._settings["rope_theta"]),
        }
        if kind in _SUPPORTED:
            fields["rotary_interpolation_factor"] = self._positive("factor")
        if kind == "llama3":
            fields["rotary_low_freq_factor"] = self._positive("low_freq_factor")
            fields["rotary_high_freq_factor"] = self._positive("high_freq_factor")
            fields["rotary_trained_positions"] = int(self._positive("original_max_position_embeddings"))
        elif kind == "yarn":
            fields |= self._yarn(fields)
        elif kind not in ("default", "linear"):
            supported = ", ".join(_SUPPORTED)
            raise ValueError(f"{self._path}: {self._key}.rope_type {kind!r} is not supported; supported: {supported}")
        return fields

    def _yarn(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The ramp's ends and the attention factor, as _compute_yarn_parameters has them."""
        trained = self._positive("original_max_position_embeddings", self._settings["max_position_embeddings"])
        turns = self._positive("beta_fast", 32), self._positive("beta_slow", 1)
        factor = fields["rotary_interpolation_factor"]
        attention = attention_factor(factor)
        if self._given.get("mscale") and self._given.get("mscale_all_dim"):
            attention = attention_factor(factor, self._positive("mscale"), self._positive("mscale_all_dim"))
        name, base = f"{self._path}: {self._key}.rope_theta", fields["rotary_base"]
        ramp = yarn_ramp(name, base, fields["rotary_embedding"], trained, turns, self._given.get("truncate", True))
        return ramp | {"rotary_attention_factor": self._positive("attention_factor", attention)}

    def _positive(self, name: str, default: Any = None) -> float:
        value = self._given.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{self._path}: {self._key}.{name} is {value!r}; it must be a number above 0")
        return float(value)


def yarn_ramp(
    name: str, base: float, num_rotated: int, trained: float, turns: tuple[float, float], is_rounded: bool
) -> dict[str, float]:
    """The ends of YaRN's ramp: the places of the frequencies that turn so many times in the trained positions.

    As transformers' _compute_yarn_parameters and Megatron-core's _yarn_find_correction_range have them. name: of the
    base's setting, for messages; turns: beta_fast, beta_slow. Raises ValueError for a base up to 1.
    """
    if base <= 1:
        raise ValueError(f"{name} is {base}; with YaRN it must be above 1")
    first, last = (num_rotated * math.log(trained / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in turns)
    if is_rounded:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, num_rotated - 1)
    last += 0.001 if first == last else 0
    return {"rotary_ramp_first": float(first), "rotary_ramp_last": float(last)}


def attention_factor(factor: float, scale: float = 1.0, scale_all_dim: float = 0.0) -> float:
    """YaRN's factor of rotated elements: mscale's over mscale_all_dim's, which is 1 for 0."""
    if factor <= 1:
        return 1.0
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * scale_all_dim * math.log(factor) + 1.0)
