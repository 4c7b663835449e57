"""The heads in the output of a query_key_value linear: where each is, and their rotation; in torch and in kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

CosSin = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [tokens, 1, rotary_embedding / 2] fp32


class HeadLayout(NamedTuple):
    """The heads of a row of query_key_value's output on one rank.

    Not grouped: all queries, all keys, all values. Grouped: for each KV head its queries, its key, its value.
    Consecutive heads / kv_heads query heads share a KV head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    is_grouped: bool

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def places(self) -> dict[str, int]:
        """Constants of kernels, in heads: a KV head's step, its key's and its value's place."""
        if self.is_grouped:
            return {"group_stride": self.group + 2, "key_base": self.group, "value_base": self.group + 1}
        return {"group_stride": 1, "key_base": self.heads, "value_base": 2 * self.heads}

    def query_and_key(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of [tokens, …]: of the queries and of the keys, [tokens, …, head_dim] each."""
        if not self.is_grouped:
            query, key, _ = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        else:
            grouped = qkv.unflatten(-1, (-1, self.group + 2, self.head_dim))
            query, key, _ = grouped.split([self.group, 1, 1], 2)
        return query, key

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[tokens, …] → queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim]."""
        if not self.is_grouped:
            query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(1)
            return query, key, value
        grouped = qkv.unflatten(-1, (-1, self.group + 2, self.head_dim))  # [tokens, kv_heads, group + 2, head_dim]
        query, key, value = grouped.split([self.group, 1, 1], 2)
        return query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2)


def rotate(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Turn each pair (i, i + rotary_embedding / 2) of the heads' first elements; x: [tokens, heads, head_dim].

    These are the pairs of GPT-NeoX, Megatron and Hugging Face (GPT-J pairs neighbours).
    """
    cosines, sines = cos_sin
    half = cosines.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1).to(x.dtype)


def rotated_heads(
    qkv: torch.Tensor, layout: HeadLayout, cos_sin: CosSin | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`HeadLayout.split`, queries and keys rotated where the model has rotary positions."""
    query, key, value = layout.split(qkv)
    if cos_sin is not None:
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
    return query, key, value


if triton is not None:

    @triton.jit
    def load_rotated(heads, cosines, sines, d, is_element, half: tl.constexpr):
        """Heads, rotated as `rotate` does: [dims], or [heads or tokens, dims].

        heads: pointers to each one's first element; d: the elements' places within a head; cosines, sines: pointers to
        each token's first, [half] fp32. They broadcast with d.
        """
        x = tl.load(heads + d, mask=is_element, other=0.0)
        if half > 0:
            is_turned = is_element & (d < 2 * half)
            partner = tl.load(heads + tl.where(d < half, d + half, d - half), mask=is_turned, other=0.0).to(tl.float32)
            place = tl.where(d < half, d, d - half)
            cosine = tl.load(cosines + place, mask=is_turned, other=1.0)
            sine = tl.load(sines + place, mask=is_turned, other=0.0)
            x = (x.to(tl.float32) * cosine + tl.where(d < half, -partner, partner) * sine).to(x.dtype)
        return x
