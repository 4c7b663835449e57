"""Programmatic dependent launch (PDL): a kernel starts while its predecessor runs, and waits before it reads.

Rules for a kernel that is launched with `options`:
- It calls `start_dependents` once, first. From then on its successor may start.
- Every program calls `wait_for_predecessors` before it reads what other kernels of the step wrote, and before its
  first write. Weights, and what was written before the step, may be read earlier. After the wait all predecessors are
  complete, because each of them has waited too.
- The first kernel of a step is launched without the options: kernels.embed, or a later stage's copy of its residual.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

try:
    import triton
except ImportError:  # a CPU-only torch comes without it
    triton = None
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an old Triton comes without PDL
    gdc_launch_dependents = gdc_wait = None


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether the GPU has PDL: compute capability 9.0 or later."""
    return gdc_wait is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch: the kernel's constexpr `pdl`, and Triton's own option."""
    return {"pdl": True, "launch_pdl": True} if has_dependent_launch(device) else {"pdl": False}


if triton is not None:

    @triton.jit
    def start_dependents():
        """The successor may start."""
        gdc_launch_dependents()

    @triton.jit
    def wait_for_predecessors():
        """All predecessors are complete, and what they wrote is there."""
        gdc_wait()
