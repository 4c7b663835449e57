"""GPU kernels in the Triton language, one per file: the kernel, a checked wrapper and its reference in plain torch.
CPU kernels are made of torch's operators.

Kernels know tensors only. "Triton" here is triton-lang's language, not the inference server.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether kernels run on the device: compute capability 8.0 or later (the first with bf16), and Triton installed.

    Elsewhere the wrappers call the references.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
