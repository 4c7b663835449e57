"""The keys and values of one layer: in the computation's dtype, or in fp8 with a scale for each KV head."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.fp8 import to_fp8


class LayerCache(NamedTuple):
    """Keys and values of one layer. A storage format adds its fields here; signatures stay.

    Scales are powers of two, so a stored number times its scale is exact, in bf16 too.
    """

    keys: torch.Tensor  # [num_locs, kv_heads, head_dim], in the computation's dtype or in fp8
    values: torch.Tensor  # as keys
    key_scales: torch.Tensor | None = None  # of fp8: [kv_heads] fp32; a key is the stored number times its head's scale
    value_scales: torch.Tensor | None = None  # as key_scales

    def write(self, key: torch.Tensor, value: torch.Tensor, kv_locs: torch.Tensor) -> None:
        """Store new tokens: key and value [tokens, kv_heads, head_dim], at kv_locs [tokens] int64. fp8 saturates."""
        if self.key_scales is not None and self.value_scales is not None:
            key, value = to_fp8(key, self.key_scales[:, None]), to_fp8(value, self.value_scales[:, None])
        self.keys[kv_locs] = key
        self.values[kv_locs] = value

    def read(self, kv_locs: slice | torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tokens, kv_heads, head_dim] at kv_locs, as stored; fp8 becomes dtype."""
        keys, values = self.keys[kv_locs], self.values[kv_locs]
        if self.key_scales is None or self.value_scales is None:
            return keys, values
        key_scales, value_scales = self.key_scales.to(dtype)[:, None], self.value_scales.to(dtype)[:, None]
        return keys.to(dtype) * key_scales, values.to(dtype) * value_scales
