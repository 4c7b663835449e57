"""A request's JSON object: its fields, each read once with its type. null means the default."""

from __future__ import annotations

import json
import logging
from typing import Any, TypeVar

from serving.openai.errors import OpenAIError, bad_field

_LOG = logging.getLogger("serving")
_T = TypeVar("_T")
_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_MAX_FIELDS = 1000
_MAX_DIGITS = 30  # of an integer: long ones take long to read
_MOST_LOGGED = 100  # names of unknown fields: a client may send any number
_ignored: set[str] = set()  # names that were logged


class Fields:
    """Reads the fields of a JSON object. Raises OpenAIError for a value of a wrong type."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._taken: set[str] = set()

    @classmethod
    def parse(cls, body: bytes, max_items: int) -> Fields:
        """The fields of a request's body. max_items: that it may have, in all lists and objects together."""
        num_items = body.count(b",") + 1
        if num_items > max_items:  # to parse them would hold up everyone
            raise OpenAIError(400, f"the body has {num_items} items; at most {max_items} are taken")
        try:
            values = json.loads(body, parse_int=_parsed_int)
        except (ValueError, RecursionError) as error:
            raise OpenAIError(400, f"the body is not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise OpenAIError(400, "the body must be a JSON object")
        if len(values) > _MAX_FIELDS:
            raise OpenAIError(400, f"the body has {len(values)} fields; at most {_MAX_FIELDS} are taken")
        return cls(values)

    def any(self, name: str) -> Any:
        """A field of any type; None where it is absent."""
        self._taken.add(name)
        return self._values.get(name)

    def get(self, name: str, kind: type[_T]) -> _T | None:
        """A field of one type; None where it is absent. An integer is a number too."""
        value = self.any(name)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _as_float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise bad_field(self._prefix + name, f"must be {_KINDS[kind]}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that is true or false."""
        value = self.get(name, bool)
        return default if value is None else value

    def items(self, name: str, kind: type[_T]) -> list[_T]:
        """A list whose items have one type; empty where it is absent."""
        values = self.get(name, list) or []
        for index, value in enumerate(values):
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise bad_field(f"{self._prefix}{name}", f"has an item ({index}) that is not {_KINDS[kind]}")
        return values

    def object(self, name: str) -> Fields:
        """The fields of an object; none where it is absent."""
        return Fields(self.get(name, dict) or {}, f"{self._prefix}{name}.")

    def refuse(self, name: str, reason: str) -> None:
        """Refuse a field that would change the answer's meaning, unless it is absent or empty."""
        if self.any(name):
            raise bad_field(self._prefix + name, reason)

    def log_ignored(self, path: str) -> None:
        """Log the fields that were not read, each name once."""
        for name in self._values.keys() - self._taken:
            if name not in _ignored and len(_ignored) < _MOST_LOGGED:
                _ignored.add(name)
                _LOG.info("%s: the unknown field %.60r is ignored", path, name)


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _parsed_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits; at most {_MAX_DIGITS} are taken")
    return int(digits)
