"""Chats → prompts: messages through the model's chat template, for all front ends.

The template runs in a process of its own (template_process.py), which has limits of time and memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.request import ParameterError
from serving.template_process import MEMORY, OTHER, SYNTAX, TEMPLATE, TIME

_LOG = logging.getLogger("serving")
_PROGRAM = Path(__file__).with_name("template_process.py")
MEMORY_LIMIT = 256 << 20  # bytes of the address space of the template's process
TIME_LIMIT_S = 2.0  # of the processor, for a rendering; most take less than a millisecond
_EXIT_TIMEOUT_S = 5.0
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_TRIAL = [{"role": "user", "content": "a"}]
_REASONS = {
    MEMORY: f"take the chat template more than {MEMORY_LIMIT >> 20} MiB",
    TIME: f"take the chat template more than {TIME_LIMIT_S:g} s",
    SYNTAX: "cannot be taken: the chat template of this server is not valid",
}
_QUOTED = (TEMPLATE, SYNTAX)  # kinds with a reason of the template's own


class TemplateFailure(ParameterError):
    """Messages that the template refuses, or a template that cannot be used.

    kind: of template_process. for_log: the sentence without the template's own words, which may quote a message.
    """

    def __init__(self, kind: str, reason: str = "", index: int | None = None) -> None:
        self.kind = kind
        rest = _REASONS.get(kind, "do not fit the chat template")
        self.for_log = f"messages {rest}"
        super().__init__("messages", f"{rest} ({reason})" if reason and kind in _QUOTED else rest, index=index)


class ChatTemplate:
    """A model's chat template. template: in place of the tokenizer's own, which may have none."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.text = template or _own_template(tokenizer)
        self._process = _TemplateProcess(self.text) if self.text else None

    def check(self, name: str) -> None:
        """Render a chat of one word. Raises ValueError for a template that takes too much time or memory for it.

        A template that refuses this chat may take others. One that is not valid serves no chats; the log says so.
        name: of the tokenizer's folder, for messages.
        """
        if self._process is None:
            return
        try:
            self.render(_TRIAL)
        except TemplateFailure as error:
            if error.kind in (MEMORY, TIME):
                limit = _REASONS[error.kind].removeprefix("take the chat template ")
                raise ValueError(f"{name}: a chat of one word takes the chat template {limit}") from None
            if error.kind == SYNTAX:
                _LOG.warning("%s: %s", name, error)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
        index: int | None = None,
    ) -> str:
        """The prompt's text, with the special tokens that the template writes.

        As transformers' apply_chat_template. continue_final_message: the last message goes on, where the prompt ends.
        variables: of the template. index: the prompt that an error names. Raises TemplateFailure; ParameterError where
        there is no template.
        """
        if self._process is None:
            raise ParameterError(
                "messages",
                "is set; the model has no chat template: start the server with --chat-template FILE",
                index=index,
            )
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        content = given[-1].get("content") if given else None
        if continue_final_message:
            if not isinstance(content, str):
                raise TemplateFailure(OTHER, index=index)
            given[-1]["content"] = content + _TAG
        reply = self._process.answer(
            {
                "tools": None,
                "documents": None,
                **self._tokenizer.special_tokens_map,
                **(variables or {}),
                "messages": given,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        if "text" not in reply:
            raise TemplateFailure(reply["error"], reply["reason"], index)
        return _cut(reply["text"], str(content)) if continue_final_message else reply["text"]


def parse_messages(text: str, index: int | None = None) -> list[dict[str, Any]]:
    """A JSON list of objects that have a role and a content. Raises ParameterError."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        raise ParameterError("messages", "is not valid JSON", index=index) from None
    if not isinstance(messages, list) or not messages:
        raise ParameterError("messages", "must be a JSON list of at least one message", index=index)
    for number, message in enumerate(messages):
        is_right = isinstance(message, dict)
        if not is_right or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            rest = f"has message {number} without role and content; both must be strings"
            raise ParameterError("messages", rest, index=index)
    return messages


def _own_template(tokenizer: Any) -> str | None:
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict):  # by name
        return templates.get("default")
    return templates or None


def _cut(text: str, content: str) -> str:
    """A rendered chat up to the end of its last message, which has the tag at its end."""
    tag = _TAG.strip()
    if tag not in text or content.strip() not in text:
        raise TemplateFailure(OTHER)
    end = text.rindex(tag)
    return text[:end] if text[end : end + len(_TAG)] == _TAG else text[:end].rstrip()


class _TemplateProcess:
    """Renders one template, one text at a time, from any thread; starts its process when it is needed."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, variables: dict[str, Any]) -> dict[str, str]:
        """The process's answer: text, or error and reason."""
        line = json.dumps(variables).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            reply = b""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            answer = json.loads(reply) if reply else {}
            if not answer or answer.get("error") == MEMORY:
                self._process = None  # the next text gets a new one
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0 if reply else _EXIT_TIMEOUT_S)
                kind = TIME if process.returncode == -signal.SIGPROF else OTHER
                answer = answer or {"error": kind, "reason": ""}
                _end(process)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", str(_PROGRAM), str(MEMORY_LIMIT), str(TIME_LIMIT_S)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # mpirun signals a rank's whole group
        )
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._template).encode() + b"\n")
        self._process = process
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            pipe.close()
