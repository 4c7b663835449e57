"""fp8 (e4m3, finite values only): the cast that saturates, in torch and in kernels, and the GPUs that have the type."""

from __future__ import annotations

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # its largest value


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether the device computes with fp8: a CPU, or a GPU of compute capability 8.9 or later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def to_fp8(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x / scales in fp8, rounded to nearest; larger values become ±448, NaN stays. The two shapes broadcast."""
    return (x.float() / scales).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


if triton is not None:

    @triton.jit
    def cast_fp8(x, scale):
        """`to_fp8` in a kernel, with one division for each scale. Without ALL, a NaN becomes ±448."""
        return tl.clamp(x.to(tl.float32) * (1.0 / scale), -448.0, 448.0, tl.PropagateNan.ALL).to(tl.float8e4nv)

    @triton.jit
    def query_for_fp8(q, scale):
        """(q, scale) for products with fp8 numbers: bf16 becomes fp16, and each row's largest value goes into scale.

        q: [rows, dims]; scale: a number, which becomes [rows, 1]. fp16 holds fp8 exactly, and a GPU converts two
        numbers with one instruction; bf16 takes several.
        """
        if q.dtype == tl.bfloat16:
            wide = q.to(tl.float32)
            size = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)[:, None]
            return (wide / size).to(tl.float16), scale * size
        else:
            return q, scale
