"""A patch of PyTriton's proxy model, so that requests of a non-decoupled model run side by side.

Stock PyTriton 0.7.0 lets one batch at a time through a callable: Triton's `execute` blocks until the callable
has answered, and so a short request waits for every long one before it. The proxy below answers through
Triton's response sender instead, as decoupled models do, and `execute` returns at once. Errors then reach the
client as the one sentence that they are, without the proxy's traceback around them.

The patch rewrites the text of PyTriton's proxy/model.py on its way to Triton. It fits the exact version that it
names and the exact lines that it replaces; where they differ it does nothing, says so, and stock behaviour stays.
"""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path

import pytriton.proxy
from pytriton.models.model import Model

_LOG = logging.getLogger("serving")
_VERSION = "0.7.0"

_HANDLER = '''
class InFlightResponsesHandler(DecoupledResponsesHandler):
    """Answers each request of a non-decoupled model exactly once, through its response sender."""

    async def handle_responses(self, scope, responses_queue, responses_future):
        requests_id = scope["requests_id"]
        loop = asyncio.get_running_loop()
        triton_requests = self._requests_map[requests_id]
        senders = [request.get_response_sender() for request in triton_requests]
        error = "the server is stopping"
        responses = None
        try:
            eos = False
            while not eos:
                flags, payload = await responses_queue.get()
                eos = flags & PyTritonResponseFlags.EOS
                try:
                    if flags & PyTritonResponseFlags.ERROR:
                        error = payload.decode("utf-8").strip()
                    elif payload:
                        unwrapped = self._serializer_deserializer.deserialize_responses(payload)
                        responses = [
                            _wrap_response(response, request.requested_output_names(), self._model_outputs_dict)
                            for request, response in zip(triton_requests, unwrapped)
                        ]
                        self._serializer_deserializer.free_responses_resources(payload)
                finally:
                    responses_queue.task_done()
        finally:
            if responses is None:
                is_users = error.startswith("BadRequest: ")  # gpt.py's class: HTTP 400; the rest stays 500
                code = pb_utils.TritonError.INVALID_ARG if is_users else pb_utils.TritonError.INTERNAL
                responses = [pb_utils.InferenceResponse(error=pb_utils.TritonError(error, code)) for _ in senders]
            for sender, response in zip(senders, responses):
                await loop.run_in_executor(
                    None, sender.send, response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                )
            self._requests_map.pop(requests_id)
            responses_future.set_result(None)


'''

_REPLACEMENTS = (
    (
        "class TritonInferenceHandlerConfigGenerator:",
        _HANDLER.lstrip("\n") + "class TritonInferenceHandlerConfigGenerator:",
    ),
    (
        "handler_class = DecoupledResponsesHandler if self._decoupled_model else BatchResponsesHandler",
        "handler_class = DecoupledResponsesHandler if self._decoupled_model else InFlightResponsesHandler",
    ),
    ("            if not self._decoupled_model:\n                handle_responses_concurrent_future", None),
)


def patch_proxy(source: str) -> str | None:
    """The proxy's source with in-flight answers, or None where a line to replace is not there exactly once."""
    for old, new in _REPLACEMENTS:
        if source.count(old) != 1:
            return None
        source = source.replace(old, new if new is not None else old.replace("not self._decoupled_model", "False"))
    return source


def install() -> bool:
    """Let every model bound from now on use the patched proxy; returns whether the patch fits."""
    if getattr(Model.get_proxy_model_files, "is_patched", False):
        return True
    version = importlib.metadata.version("nvidia-pytriton")
    original = Model.get_proxy_model_files
    source = (Path(pytriton.proxy.__file__).parent / "model.py").read_text()
    patched = patch_proxy(source) if version == _VERSION else None
    if patched is None:
        _LOG.warning(
            "PyTriton %s is not the version that the in-flight patch fits (%s): requests will run one batch at a time",
            version,
            _VERSION,
        )
        return False

    def get_proxy_model_files(self: Model) -> dict[str, bytes]:
        files = original(self)
        files[f"file:{self.model_version}/model.py"] = patched.encode()
        return files

    get_proxy_model_files.is_patched = True
    Model.get_proxy_model_files = get_proxy_model_files
    return True
