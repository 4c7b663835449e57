"""GPU kernels in the Triton language, one a file: the kernel, a checked wrapper and its reference in plain torch.

They know tensors and nothing of the engine. The language is triton-lang's, no kin of the Triton that serves.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether kernels run there: a GPU of compute capability 8.0 or later (the first with bf16), and Triton installed.

    Elsewhere their wrappers do the references' work.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
