"""Rotary position embedding (Su et al. 2021): rotates the first elements of each head by position · inv_freq."""

from __future__ import annotations

import torch

from weights.model_config import ModelConfig

CosSin = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [tokens, 1, rotary_embedding / 2] fp32


def rotary_inv_freq(config: ModelConfig) -> torch.Tensor:
    """[rotary_embedding / 2] fp32: radians per position, rotary_base^(-2i / rotary_embedding), over the interpolation
    factor."""
    size = config.rotary_embedding
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / max(size, 1)
    return config.rotary_base**-exponents / config.rotary_interpolation_factor


def rotary_cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor) -> CosSin | None:
    """positions: [tokens] int64 → the cosines and sines of one step; None for a model without rotary positions."""
    if len(inv_freq) == 0:
        return None
    angles = positions[:, None, None] * inv_freq  # [tokens, 1, rotary_embedding / 2]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Turn each pair (i, i + rotary_embedding / 2) of the heads' first elements; x: [tokens, heads, head_dim].

    These are the pairs of GPT-NeoX, Megatron and Hugging Face (GPT-J pairs neighbours).
    """
    cosines, sines = cos_sin
    half = cosines.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1).to(x.dtype)
