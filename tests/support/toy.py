"""A model without a network, behind a real Triton: it waits, counts, and misbehaves when asked to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from serving.triton.frontend import TritonModel


class BadRequest(ValueError):
    """As that of serving/triton/errors.py: a sentence without a traceback."""

    __module__ = "builtins"
    __traceback__ = None  # type: ignore[assignment]


class ServerBusy(BadRequest):
    __module__ = "builtins"


class Toy:
    """Waits `steps` times `delay` seconds, and counts who came and who was cancelled."""

    def __init__(self) -> None:
        self.started = self.cancelled = 0
        self.is_mute = False  # whether it leaves the supervisor's questions unanswered
        self.blocks_s = 0.0  # seconds for which the next request blocks its event loop

    def models(self) -> list[TritonModel]:
        """The toy as a model and as a streaming one."""
        from pytriton.model_config import Tensor

        inputs = [
            Tensor(name="steps", dtype=np.uint32, shape=(1,), optional=True),
            Tensor(name="delay", dtype=np.float32, shape=(1,), optional=True),
            Tensor(name="error", dtype=bytes, shape=(-1,), optional=True),
            Tensor(name="request_id", dtype=bytes, shape=(1,), optional=True),
            Tensor(name="stop", dtype=np.bool_, shape=(1,), optional=True),
        ]
        outputs = [
            Tensor(name="step", dtype=np.int32, shape=(1,)),
            Tensor(name="text", dtype=bytes, shape=(1,)),
            Tensor(name="unused", dtype=bytes, shape=(-1,)),
        ]
        return [
            TritonModel("toy", self.infer, inputs, outputs),
            TritonModel("toy_streaming", self.stream, inputs, outputs, decoupled=True),
        ]

    async def infer(self, requests: list[Any]) -> list[dict[str, np.ndarray]]:
        steps = [step async for step in self._steps(requests[0])]
        return [{"step": np.array([steps[-1:]]), "text": np.array([[b"text"]], dtype=object)}]

    async def stream(self, requests: list[Any]) -> AsyncIterator[list[dict[str, np.ndarray]]]:
        async for step in self._steps(requests[0]):
            yield [{"step": np.array([step]), "text": np.array([b"text"], dtype=object)}]

    async def _steps(self, request: Any) -> AsyncIterator[int]:
        values = {name: array.reshape(-1)[0] for name, array in request.items()}
        errors = {b"bad": BadRequest("no"), b"busy": ServerBusy("later"), b"defect": RuntimeError("broken")}
        if "stop" in values:  # what the supervisor asks
            await asyncio.sleep(3600 if self.is_mute else 0)
            raise BadRequest("it is not running")
        if "error" in values:
            raise errors.get(values["error"], BadRequest("unknown"))
        self.started += 1
        try:
            seconds, self.blocks_s = self.blocks_s, 0.0
            time.sleep(seconds)
            for step in range(values["steps"]):
                await asyncio.sleep(float(values["delay"]))
                yield step
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
