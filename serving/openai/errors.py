"""Errors as OpenAI's clients see them: an HTTP status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.request import EngineBusy, EngineStopping, ParameterError
from helpers import one_line

_LOG = logging.getLogger("serving")
_RETRY_AFTER_S = 1

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}  # others: invalid_request_error


class OpenAIError(Exception):
    """An answer that is an error. param: the field that is wrong; code: a word that programs compare.

    for_log: what the log gets, where the message may quote a prompt.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, for_log: str | None = None
    ) -> None:
        super().__init__(message)
        self.for_log = for_log or message
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After where the same request may succeed soon: OpenAI's clients wait so long and try again."""
        return {"Retry-After": str(_RETRY_AFTER_S)} if self.status in (429, 503) else {}


def bad_field(name: str, rest: str, for_log: str | None = None) -> OpenAIError:
    """The error for a field: its name, then the rest of the sentence."""
    return OpenAIError(400, f"{name} {rest}", name, for_log=for_log)


@contextlib.contextmanager
def refusals(names: Mapping[str, str]) -> Iterator[None]:
    """Turn what refuses a request into OpenAIError. names: the engine's field → the API's."""
    try:
        yield
    except ParameterError as error:
        name = names.get(error.field, error.field)
        if name != "prompt":  # the index is a prompt's: after `stop` or `messages` it would be read as an item's
            error.index = None
        raise OpenAIError(400, error.sentence(names), name) from None
    except EngineStopping as error:
        raise OpenAIError(503, one_line(error), code="server_stopping") from None
    except EngineBusy as error:
        raise OpenAIError(429, one_line(error), code="queue_full") from None
    except ValueError as error:
        raise OpenAIError(400, one_line(error)) from None


@contextlib.contextmanager
def defects() -> Iterator[None]:
    """Turn everything else into OpenAIError 500, with a line in the log. It has no message: that may quote a prompt."""
    try:
        yield
    except (OpenAIError, ConnectionError):  # the latter: the client went away
        raise
    except EngineStopping as error:
        raise OpenAIError(503, one_line(error), code="server_stopping") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        _LOG.error("a request failed: %s at %s", type(error).__name__, places)
        raise OpenAIError(500, f"internal error: {type(error).__name__}", code="internal_error") from None
