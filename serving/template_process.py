"""Renders a chat template in a process with limits: memory for the process, time for each rendering. Run by chat.py.

    python -I template_process.py MEMORY SECONDS

The first line of stdin is the template. Each further line holds the template's variables; a line of stdout answers:
{"text": …} or {"error": kind, "reason": …}. All lines are JSON. A rendering that takes too long ends the process.

A template comes with a checkpoint, so it is untrusted: its loops and strings may grow without bound. Jinja's sandbox
keeps it from Python's internals only. The environment is that of transformers' apply_chat_template
(utils/chat_template_utils.py); transformers itself is not imported, because that takes seconds.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE, SYNTAX, MEMORY, TIME, OTHER = "template", "syntax", "memory", "time", "other"  # kinds of errors
_MAX_CHARACTERS = 16 << 20  # of a rendered text
_MAX_REASON = 300  # characters


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an answer for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Jinja's call for the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Takes no names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name of the template's
        self, args = args[0], args[1:]
        for name in (values := dict(*args, **kwargs)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r:.40}")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    return environment


def _answer(source: str, line: bytes, cache: list[jinja2.Template]) -> dict[str, str]:
    try:
        if not cache:
            cache.append(_environment().from_string(source))
        text = cache[0].render(**json.loads(line))
        return {"text": text} if len(text) <= _MAX_CHARACTERS else {"error": MEMORY, "reason": ""}
    except jinja2.TemplateSyntaxError as error:
        return {"error": SYNTAX, "reason": _short(error)}
    except jinja2.TemplateError as error:
        return {"error": TEMPLATE, "reason": _short(error)}
    except MemoryError:
        return {"error": MEMORY, "reason": ""}
    except Exception as error:  # of an expression: its words may quote a message
        return {"error": OTHER, "reason": type(error).__name__}


def _short(error: Exception) -> str:
    return " ".join(str(error)[: 4 * _MAX_REASON].split())[:_MAX_REASON]


def main(memory: int, seconds: float) -> None:
    """Answer until stdin ends. memory: bytes of the address space; seconds: of the processor, for each rendering."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold prompts
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    source = json.loads(sys.stdin.buffer.readline())
    cache: list[jinja2.Template] = []
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, whatever runs in it
        reply = json.dumps(_answer(source, line, cache)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
