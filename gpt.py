"""The callables behind Triton's models: arrays in, arrays out, whole or as the text comes.

serving/triton has the arrays of requests and answers and the errors; serving/generation.py runs the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
from pytriton.model_config import Tensor

from serving.generation import Generator, Run
from serving.triton import inputs, outputs
from serving.triton.errors import one_sentence
from serving.triton.frontend import TritonModel

# A stream's pause after each piece, per other stream: PyTriton and Triton take about this long for one of all
# their messages, and where they are the limit, pieces of several tokens are quicker than a queue of single ones.
_PAUSE_S = 0.0005

INPUTS = [Tensor(name=name, dtype=dtype, shape=shape, optional=True) for name, (dtype, shape) in inputs.INPUTS.items()]
OUTPUTS = [Tensor(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in outputs.OUTPUTS.items()]


class GPTModel:
    """Answers PyTriton's requests: `infer` with the whole text, `stream` with its pieces."""

    def __init__(self, generator: Generator, api_key: str = "") -> None:
        """api_key: where there is one, only a request with it, as its parameter `api_key`, may stop others."""
        self.generator = generator
        self.api_key = api_key
        self.answers = outputs.Answers(generator.encoder.end_ids, generator.encoder.vocab_size)
        self._num_streams = 0

    async def infer(self, requests: list[Any]) -> list[dict[str, np.ndarray]]:
        """PyTriton's callable: one dict of batched arrays in, one out, for each Triton request.

        Raises BadRequest, in one sentence, for the first thing that is wrong; nothing runs then.
        """
        with one_sentence():
            return list(await asyncio.gather(*map(self._answer, requests)))

    async def stream(self, requests: list[Any]) -> AsyncIterator[list[dict[str, np.ndarray]]]:
        """PyTriton's callable of the decoupled model: one prompt in, without a batch's dimension, many answers out.

        Each has a piece of the text and its token ids; the last one has everything else. Several samples or beams
        come in one answer. Raises as `infer` does.
        """
        with one_sentence():
            (request,) = requests
            arrays = {name: np.asarray(array)[None] for name, array in dict(request).items()}
            if (request_ids := inputs.stop_ids(arrays)) is not None:
                yield [outputs.unbatched(self._stop(request_ids, request))]
                return
            async with self._run(arrays, request) as run:
                if run.generations[0].request.sampling.width > 1:
                    await run.wait()
                    yield [outputs.unbatched(self.answers.whole(run.generations))]
                    return
                self._num_streams += 1
                try:
                    async for update in run.updates():
                        yield [self.answers.piece(update)]
                        if update.finish_reason is None:
                            await asyncio.sleep(_PAUSE_S * (self._num_streams - 1))
                finally:
                    self._num_streams -= 1

    async def _answer(self, request: Any) -> dict[str, np.ndarray]:
        arrays = dict(request)
        if (request_ids := inputs.stop_ids(arrays)) is not None:
            return self._stop(request_ids, request)
        async with self._run(arrays, request) as run:
            await run.wait()
            return self.answers.whole(run.generations)

    def _run(self, arrays: dict[str, np.ndarray], request: Any) -> AbstractAsyncContextManager[Run]:
        # The id that the client gave it in Triton's protocol; serving/triton/stub_model.py passes it on.
        log_id = (getattr(request, "parameters", None) or {}).get("triton_request_id", "")
        with self.generator.reporting("triton", log_id):
            rows = inputs.Rows(arrays)
        return self.generator.run(rows, front_end="triton", log_id=log_id)

    def _stop(self, request_ids: list[str], request: Any) -> dict[str, np.ndarray]:
        inputs.check_key(getattr(request, "parameters", None), self.api_key)
        self.generator.stop(request_ids)
        return outputs.stopped(len(request_ids))


def triton_models(name: str, generator: Generator, api_key: str = "") -> list[TritonModel]:
    """What Triton serves: `name`, which answers at the end, and `name_streaming`, which answers in pieces."""
    model = GPTModel(generator, api_key)
    return [
        TritonModel(name, model.infer, INPUTS, OUTPUTS),
        TritonModel(f"{name}_streaming", model.stream, INPUTS, OUTPUTS, decoupled=True),
    ]
