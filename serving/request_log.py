"""One log line for each request of a front end, at its end. It has no prompt and no output, unless --log-prompts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from engine.request import CANCELLED, EngineBusy, EngineStopping
from serving.flags import LogFlags
from serving.generation import Run
from serving.metrics import ServerMetrics
from serving.request import Chat

_LOG = logging.getLogger("requests")
_MAX_ID_LEN, _MAX_ERROR_LEN = 128, 300  # a client chooses the id, and words of some errors


class RequestLog:
    """A serving.generation.RequestObserver: logs each request, and counts the refused ones."""

    def __init__(self, flags: LogFlags, metrics: ServerMetrics) -> None:
        self._has_prompts = flags.log_prompts
        self._metrics = metrics

    def ended(self, run: Run) -> None:
        """Log a request that ran. Its times are seconds since it came."""
        requests = [generation.engine_request for generation in run.generations]
        outputs = [output for request in requests for output in request.outputs]
        fields: dict[str, Any] = {
            "id": run.log_id[:_MAX_ID_LEN],
            "front_end": run.front_end,
            "prompts": len(requests),
            "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
            "output_tokens": sum(len(output.token_ids) for output in outputs),
            "queue_s": _first(run.arrived, (request.times.scheduled for request in requests)),
            "first_token_s": _first(run.arrived, (request.times.first_token for request in requests)),
            "total_s": round(time.monotonic() - run.arrived, 4),
            "finish_reasons": list(dict.fromkeys(output.finish_reason or CANCELLED for output in outputs)),
        }
        if self._has_prompts:
            fields["prompt_texts"] = [_text(generation.request.prompt) for generation in run.generations]
            fields["output_texts"] = [generation.texts() for generation in run.generations]
        _LOG.info("request", extra={"fields": fields})

    def refused(self, front_end: str, log_id: str, error: Exception) -> None:
        """Log and count a request that did not run. A defect is named by its class: its text may hold the prompt's."""
        reason = _reason(error)
        message = getattr(error, "for_log", error)  # a front end's own error may have one without the client's words
        sentence = type(error).__name__ if reason == "error" else " ".join(str(message).split())[:_MAX_ERROR_LEN]
        self._metrics.count_refused(front_end, reason)
        fields = {"id": log_id[:_MAX_ID_LEN] or None, "front_end": front_end, "reason": reason, "error": sentence}
        _LOG.info("refused", extra={"fields": fields})


def _reason(error: Exception) -> str:
    """One of serving.metrics.REFUSALS. A front end's own error may have an HTTP status."""
    status = getattr(error, "status", 0)
    if status:
        return {429: "busy", 503: "stopping"}.get(status, "invalid" if status < 500 else "error")
    for kind, reason in ((EngineStopping, "stopping"), (EngineBusy, "busy"), (ValueError, "invalid")):
        if isinstance(error, kind):
            return reason
    return "error"


def _first(arrived: float, times: Iterable[float]) -> float | None:
    """Seconds from `arrived` to the first of the times that were reached, if any."""
    reached = [moment for moment in times if moment]
    return round(min(reached) - arrived, 4) if reached else None


def _text(prompt: Any) -> Any:
    if isinstance(prompt, Chat):
        return prompt.messages
    if isinstance(prompt, (str, bytes)):
        return prompt if isinstance(prompt, str) else prompt.decode(errors="replace")
    return [int(token_id) for token_id in prompt]
