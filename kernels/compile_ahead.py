"""Compiles kernels in threads, before they are launched. One after another they take half a minute of a core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

try:
    from triton import AsyncCompileMode, JITFunction
except ImportError:  # a CPU-only torch comes without Triton, and Triton before 3.4 without the mode
    AsyncCompileMode = None


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[None]:
    """Within this, to launch a kernel is to start its compilation, and no more: its results are not computed.

    At the end all of these kernels are compiled and on the device, a GPU. Where Triton has no such mode, kernels are
    launched as always.
    """
    if AsyncCompileMode is None:
        yield
        return

    class Mode(AsyncCompileMode):
        def submit(self, key: str, compile_kernel: Callable[[], Any], finalize: Callable[[Any], None]) -> Any:
            return super().submit(key, lambda: _loaded(compile_kernel()), finalize)

    def compile_only(kernel: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

    launch = JITFunction.__getitem__
    JITFunction.__getitem__ = compile_only
    try:
        with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as threads, Mode(threads):
            yield
    finally:
        JITFunction.__getitem__ = launch


def _loaded(kernel: Any) -> Any:
    """The compiled kernel, with its launcher, which Triton compiles with the host's compiler at the first use."""
    _ = kernel.run
    return kernel
