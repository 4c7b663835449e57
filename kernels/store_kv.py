"""Writes new tokens' keys and values into the cache with one launch; torch needs one for each. Stateless."""

from __future__ import annotations

import torch

from kernels import runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None


def reference(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_locs: torch.Tensor
) -> None:
    """The same in plain torch, on any device."""
    keys[kv_locs] = key
    values[kv_locs] = value


def store_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_locs: torch.Tensor
) -> None:
    """keys[kv_locs] = key, values[kv_locs] = value; [tokens, heads, head_dim] into [num_locs, heads, head_dim].

    kv_locs: [tokens] int64; key and value may be strided in all axes but the last, keys and values are contiguous.
    """
    if not runs_on(key.device):
        return reference(key, value, keys, values, kv_locs)
    tokens, heads, head_dim = key.shape
    _kernel[(tokens,)](
        key,
        value,
        keys,
        values,
        kv_locs,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        head_dim,
        heads * head_dim,
        triton.next_power_of_2(heads * head_dim),
        num_warps=8,
    )


if triton is not None:

    @triton.jit
    def _kernel(
        key,
        value,
        keys,
        values,
        kv_locs,
        key_stride,
        key_head_stride,
        value_stride,
        value_head_stride,
        head_dim: tl.constexpr,
        size: tl.constexpr,
        block: tl.constexpr,
    ):
        """One token."""
        token = tl.program_id(0).to(tl.int64)
        offsets = tl.arange(0, block)
        is_element = offsets < size
        head, element = offsets // head_dim, offsets % head_dim
        place = tl.load(kv_locs + token) * size + offsets
        k = tl.load(key + token * key_stride + head * key_head_stride + element, mask=is_element)
        tl.store(keys + place, k, mask=is_element)
        v = tl.load(value + token * value_stride + head * value_head_stride + element, mask=is_element)
        tl.store(values + place, v, mask=is_element)
