"""Stored tensors → bytes to write: transposed, cast and checked by threads, ahead of the thread that writes.

Owns the fast ways to do this on a CPU. It knows neither checkpoints nor files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from weights.reader import TORCH_DTYPES

_NUM_THREADS = min(4, len(os.sched_getaffinity(0)))  # more outrun the one that writes
_NUM_AHEAD = 2 * _NUM_THREADS
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Item = TypeVar("Item")
Result = TypeVar("Result")


def cast(tensor: torch.Tensor, dtype: torch.dtype, origin: str) -> torch.Tensor:
    """The elements in the tensor's order, contiguous; a transposed view comes as a matrix [in, everything else].

    Such a view is copied and cast as it is stored, along its rows, and transposed last, as a whole matrix of one
    data type: torch does that in blocks, and a cast with strides element by element, at a fifth of the rate.
    Raises ValueError, naming the `origin`, for a value that is not finite or beyond the data type.
    """
    is_transposed = tensor.ndim > 1 and tensor.stride(0) == 1
    tensor = (tensor.movedim(0, -1) if is_transposed else tensor).contiguous()
    if tensor.dtype == torch.float64:  # in two steps, as FasterTransformer's converters do
        tensor = tensor.to(torch.float32)
    result = tensor.to(dtype)
    if not all(torch.isfinite(bound) for bound in result.aminmax()):
        bad = tensor[~torch.isfinite(tensor)]
        if bad.numel():
            raise ValueError(f"{origin} holds the value {bad[0]:g}; every weight must be finite")
        value, largest = tensor.flatten()[tensor.abs().argmax()], torch.finfo(dtype).max
        raise ValueError(f"{origin} holds the value {value:g}, and {_NAMES[dtype]} ends at {largest:g}")
    return result.flatten(0, -2).t().contiguous() if is_transposed else result


@contextmanager
def computed_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Iterator[Result]]:
    """The function's results in order, a few of them computed ahead by threads, one to a core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else each of the threads would start more for every operation
    try:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            yield _in_order(pool, function, items)
    finally:
        torch.set_num_threads(num_threads)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > _NUM_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
