"""The model of Triton's Python stub: each request runs and answers on its own.

Nothing imports this file. proxy.py appends its text to that of PyTriton's proxy/model.py on the way to Triton, so the
names under TYPE_CHECKING are those of that text, and the last class named TritonPythonModel is the one that Triton
takes. Annotations are strings where Triton makes the names only after this text is imported.
"""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # PyTriton's text has these
    import asyncio
    import os
    import threading

    import triton_python_backend_utils as pb_utils
    from pytriton.proxy.communication import PyTritonResponseFlags
    from pytriton.proxy.model import TritonPythonModel, _wrap_response

_CANCEL = b"cancel "  # as in proxy.py
_POLL = -1  # instead of a message's flags: time to ask whether the client is still there
_POLL_S = 0.1
_MAX_POLLS = 1000  # a second, of all requests together: each costs Triton and the stub about 60 µs
_MAX_WORDS = 16384  # stop and bad words of a request, as in serving/tokenization.py
_MAX_BYTES = 16 << 20  # of a request's inputs, as --max-request-bytes has it by default
_CODES = {"BadRequest": "INVALID_ARG", "ServerBusy": "UNAVAILABLE"}  # HTTP 400 and 503; all else is INTERNAL, 500
_FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL, which pb_utils lacks while this text is imported


def _error_response(text: str) -> "pb_utils.InferenceResponse":
    """The error whose sentence is the last line of an exception's text. The traceback above is not the client's."""
    sentence = text.strip().rpartition("\n")[2]
    code = getattr(pb_utils.TritonError, _CODES.get(sentence.partition(": ")[0], "INTERNAL"))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence, code))


def _num_bytes(array: Any) -> int:
    """Bytes of an input, of all its texts where it has texts."""
    return sum(map(len, array.flat)) if array.dtype == object else array.nbytes


def _end_with_parent(parent: int) -> None:
    """End this process once tritonserver has died: is_cancelled() would then wait for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


class TritonPythonModel(TritonPythonModel):  # type: ignore[no-redef]  # replaces PyTriton's
    """Each request runs and answers on its own, however long others take, and ends when its client leaves."""

    def initialize(self, args: dict[str, str]) -> None:
        """Triton's call at start-up: takes over the answers and the requests of PyTriton's server."""
        super().initialize(args)
        self._server = self._requests_server._server
        self._server._handle_responses_fn = self._answer
        self._stock_wrap_request = self._requests_server._wrap_request
        self._requests_server._wrap_request = self._wrap_request
        self._poll_task: asyncio.Task[None] | None = None
        self._poll_s = _POLL_S
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def execute(self, triton_requests: list[Any]) -> None:
        """Triton's call for each batch: starts the requests and returns at once."""
        self._server.wait_till_running()
        for request in triton_requests:
            coroutine = self._start(request, request.get_response_sender())
            asyncio.run_coroutine_threadsafe(coroutine, self._server.server_loop)

    async def _start(self, request: Any, sender: Any) -> None:
        self._poll_task = self._poll_task or asyncio.create_task(self._poll())
        self._id_counter += 1  # four bytes last for as long as any request does
        requests_id = (self._id_counter % 2**32).to_bytes(4, "big")
        self._requests[requests_id] = (request, sender)
        try:
            await self._requests_server._send_requests(requests_id, [request])
        except Exception as error:
            if requests_id not in self._server._responses_queues:  # else the answer is on its way
                del self._requests[requests_id]
                sender.send(_error_response(str(error)), _FINAL)

    def _wrap_request(self, triton_request: Any, *args: Any) -> Any:
        """Add Triton's id of the request, which PyTriton leaves out, as the parameter triton_request_id.

        Drop empty lists of strings: they mean the same as none, and PyTriton's serializer fails on them. Refuse too
        many words: the server's process would take 0.2 s only to read them. Refuse too many bytes: while it reads
        400 MB, it answers nobody for 10 s.
        """
        request = self._stock_wrap_request(triton_request, *args)
        lists = [array for name, array in request.data.items() if name in ("stop_words", "bad_words")]
        num_words = sum(int((array != b"").sum()) for array in lists)
        if num_words > _MAX_WORDS:
            sentence = f"stop_words and bad_words are {num_words} words in all; at most {_MAX_WORDS} are taken"
            raise ValueError(f"BadRequest: {sentence}")
        num_bytes = sum(map(_num_bytes, request.data.values()))
        if num_bytes > _MAX_BYTES:
            raise ValueError(f"BadRequest: the inputs have {num_bytes} bytes; at most {_MAX_BYTES} are taken")
        request.parameters["triton_request_id"] = triton_request.request_id()
        request.data = {name: array for name, array in request.data.items() if array.size or array.dtype != object}
        return request

    async def _poll(self) -> None:
        """Wake every request that has nothing else to do: one timer costs less than one for each."""
        while True:
            queues = list(self._server._responses_queues.values())
            self._poll_s = max(_POLL_S, len(queues) / _MAX_POLLS)
            await asyncio.sleep(self._poll_s)
            for queue in queues:
                if queue.empty():
                    queue.put_nowait((_POLL, b""))

    async def _answer(self, scope: dict[str, Any], responses_queue: "asyncio.Queue", responses_future: Any) -> None:
        """Pass a request's responses on to Triton, the final flag last whatever happens.

        Only here is the sender asked whether its client has gone: to ask during or after the final flag ends Triton.
        The callable is told again and again, for it may not have begun when it is told first.
        """
        requests_id = scope["requests_id"]
        request, sender = self._requests[requests_id]
        loop = asyncio.get_running_loop()
        polled = loop.time()
        response = None if self._decoupled_model else _error_response("there is no answer")
        try:
            while True:
                flags, payload = await responses_queue.get()
                if flags == _POLL or loop.time() - polled > self._poll_s:
                    polled = loop.time()
                    if sender.is_cancelled():
                        await self._server._socket.send_multipart([_CANCEL + requests_id, b""])
                if flags == _POLL:
                    continue
                if flags & PyTritonResponseFlags.ERROR:
                    response = _error_response(payload.decode("utf-8"))
                elif payload:
                    response = self._response(request, payload)
                    if self._decoupled_model:
                        sender.send(response, 0)
                        response = None
                if flags & PyTritonResponseFlags.EOS:
                    break
        except Exception as error:
            response = _error_response(str(error))
        finally:
            del self._requests[requests_id]
            sender.send(response, _FINAL)

    def _response(self, request: Any, payload: bytes) -> "pb_utils.InferenceResponse":
        try:
            responses = self._serializer_deserializer.deserialize_responses(payload)
            return _wrap_response(responses[0], request.requested_output_names(), self._model_outputs)
        finally:
            self._serializer_deserializer.free_responses_resources(payload)
