"""Rotary position embedding (Su et al. 2021): the angles, position · inv_freq; kernels.heads rotates."""

from __future__ import annotations

import math

import torch

from kernels.heads import CosSin
from weights.model_config import ModelConfig


def rotary_inv_freq(config: ModelConfig) -> torch.Tensor:
    """[rotary_embedding / 2] fp32: radians per position, rotary_base^(-2i / rotary_embedding), over the interpolation
    factor. With Llama 3's scaling (transformers' _compute_llama3_parameters) or YaRN's (_compute_yarn_parameters), fast
    ones are not divided."""
    size = config.rotary_embedding
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / max(size, 1)
    inv_freq = config.rotary_base**-exponents
    divided = inv_freq / config.rotary_interpolation_factor
    if config.rotary_ramp_last:
        first, last = config.rotary_ramp_first, config.rotary_ramp_last
        share = 1 - ((torch.arange(len(inv_freq)) - first) / (last - first)).clamp(0, 1)
        return (1 - share) * divided + share * inv_freq
    if not config.rotary_trained_positions:
        return divided
    low, high = config.rotary_low_freq_factor, config.rotary_high_freq_factor
    turns = inv_freq * config.rotary_trained_positions / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * divided + share * inv_freq


def rotary_cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor, factor: float = 1.0) -> CosSin | None:
    """positions: [tokens] int64 → the cosines and sines of one step, times the factor.

    None for a model without rotary positions.
    """
    if len(inv_freq) == 0:
        return None
    angles = positions[:, None, None] * inv_freq  # [tokens, 1, rotary_embedding / 2]
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor
