"""Errors as Triton's clients see them: one sentence, with the tensors' names, and the HTTP status by its class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from engine.request import EngineBusy, ParameterError
from helpers import one_line
from serving.triton.inputs import NAMES

_LOG = logging.getLogger("serving")


class BadRequest(ValueError):
    """An error that reaches the client as its one sentence (HTTP 400).

    PyTriton sends an exception's class and traceback to the client; a class that names itself a builtin, with
    no traceback to show, leaves the sentence.
    """

    __module__ = "builtins"

    @property
    def __traceback__(self) -> None:
        return None

    @__traceback__.setter
    def __traceback__(self, traceback: Any) -> None:
        pass

    def with_traceback(self, traceback: Any) -> BadRequest:
        return self


class ServerBusy(BadRequest):
    """The request is good, and may be sent again later (HTTP 503)."""

    __module__ = "builtins"


class InternalError(BadRequest):
    """A defect of the server: logged in full there, named in one sentence here (HTTP 500)."""

    __module__ = "builtins"


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Let every error leave as one of the classes above."""
    try:
        yield
    except ParameterError as error:
        raise BadRequest(" ".join(error.sentence(NAMES).split())) from None
    except EngineBusy as error:
        raise ServerBusy(one_line(error)) from None
    except ValueError as error:
        raise BadRequest(one_line(error)) from None
    except Exception as error:
        _LOG.exception("a request failed")
        raise InternalError(f"internal error: {one_line(error)}") from None
