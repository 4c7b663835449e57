"""Gumbel noise as a function of (random_seed, position, token id): SplitMix64 as a counter-based generator. Stateless.

The functions in plain torch are the definition. Kernels that choose tokens use those in Triton's language below.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea, Flood 2014)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def as_int64(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - 2**64 if value >= 2**63 else value


def row_states(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[rows] int64: the bits of the generator's state for each (random_seed, position), both [rows] int64."""
    state = _mix(seeds + as_int64(_GOLDEN))
    return _mix(state + as_int64(_GOLDEN) * (positions + 1))


def gumbel(row_state: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[rows, 1] int64 states, token ids [tokens] or [rows, tokens] → standard Gumbel noise [rows, tokens] fp64."""
    bits = _mix(row_state + as_int64(_GOLDEN) * (token_ids + 1))
    uniform = (((bits >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53  # in (0, 1)
    return -torch.log(-torch.log(uniform))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function: int64 products wrap to the same bits as uint64's."""
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * as_int64(factor)
    return z ^ _shifted(z, _LAST_SHIFT)


def _shifted(z: torch.Tensor, shift: int) -> torch.Tensor:
    """z >> shift with zeros from the left: torch's shift of a negative number brings ones."""
    return (z >> shift) & (2 ** (64 - shift) - 1)


if triton is not None:
    # Triton takes a literal above 2^63 as a uint64.
    _STEP = tl.constexpr(_GOLDEN)
    _SHIFT_1, _FACTOR_1 = tl.constexpr(_MIX[0][0]), tl.constexpr(_MIX[0][1])
    _SHIFT_2, _FACTOR_2 = tl.constexpr(_MIX[1][0]), tl.constexpr(_MIX[1][1])
    _SHIFT_3 = tl.constexpr(_LAST_SHIFT)
    _TINY = tl.constexpr(2.0**-53)

    @triton.jit
    def _mixed(z):
        z = (z ^ (z >> _SHIFT_1)) * _FACTOR_1
        z = (z ^ (z >> _SHIFT_2)) * _FACTOR_2
        return z ^ (z >> _SHIFT_3)

    @triton.jit
    def row_state_of(seed, position):
        """A row's state, uint64, for its seed and position, both int64."""
        state = _mixed(seed.to(tl.uint64, bitcast=True) + _STEP)
        return _mixed(state + (position + 1).to(tl.uint64) * _STEP)

    @triton.jit
    def noise_bits(row_state, token_ids):
        """64 random bits, uint64, per token id."""
        return _mixed(row_state + (token_ids + 1).to(tl.uint64) * _STEP)

    @triton.jit
    def exact_gumbel(bits):
        """fp64, as `gumbel`."""
        uniform = ((bits >> 11).to(tl.float64) + 0.5) * _TINY
        return -tl.log(-tl.log(uniform))

    @triton.jit
    def rough_gumbel(bits):
        """fp32, within 2e-4 of `gumbel`.

        u is the uniform number. Near 1, -log u is a polynomial of 1 - u, which is small and known to fp32's precision.
        The polynomial's relative error is (1 - u)²/3 ≤ 8e-5, and the noise, -log(-log u), has that as absolute error.
        """
        is_high = bits.to(tl.int64, bitcast=True) < 0  # u ≥ 1/2
        least = (tl.where(is_high, ~bits, bits) >> 11).to(tl.float32) * _TINY + 0.5 * _TINY  # of u and 1 - u
        negative_log = -tl.log(tl.where(is_high, 1.0 - least, least))
        negative_log = tl.where(is_high & (least < 0.015625), least + 0.5 * least * least, negative_log)
        return -tl.log(negative_log)
