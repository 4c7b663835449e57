"""Answers to all prompts: records, the screen, the file of --output.

It knows the outputs' names and a Transport, which sends requests and repeats them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cli.parameters import Prompt
from cli.terminal import complain, complaint, sign_of_life
from cli.transport import Failure, Transport, as_text, make_inputs


async def answer(
    flags: argparse.Namespace, prompts: list[Prompt], transport: Transport, writer: ResultWriter | None
) -> int:
    """Send all prompts, --concurrency at once; returns the exit code. Raises OSError if a file cannot be written."""
    screen = Screen(flags, len(prompts)) if flags.stream or not writer else None
    on_piece = screen.show_piece if screen and flags.stream else lambda index, response: None
    numbered = iter(enumerate(prompts))
    started, num_done, num_failed = time.monotonic(), 0, 0

    async def worker() -> None:
        nonlocal num_done, num_failed
        for index, prompt in numbered:
            try:
                responses = await transport.send(make_inputs(prompt), functools.partial(on_piece, index))
                record = make_record(prompt, responses)
            except Failure as error:
                record = {**prompt.content, "error": str(error)}
            if transport.is_stopping and ("error" in record or "cancelled" in record.get("finish_reason", [])):
                return
            num_done += 1
            num_failed += "error" in record
            if screen:
                screen.show(index, record)
            if writer:
                writer.add(index, record)
            if transport.is_stopping:
                return

    def progress() -> str:
        rate = num_done / (time.monotonic() - started)
        left = f"{(len(prompts) - num_done) / rate:.0f} s left" if num_done else "…"
        bar = "█" * (20 * num_done // len(prompts))
        return f"{bar:░<20} {num_done}/{len(prompts)} prompts, {num_failed} failed, {rate:.3g}/s, {left}"

    is_quiet = flags.prompts or (screen and sys.stdout.isatty())
    try:
        with contextlib.nullcontext() if is_quiet else sign_of_life(progress):
            await asyncio.gather(*(worker() for _ in range(min(flags.concurrency, len(prompts)))))
    finally:
        if screen:
            screen.close()
        if writer:
            writer.close()
    if writer and num_failed:
        complain(f"{num_failed} of {len(prompts)} prompts failed; {flags.output} has the errors")
    return 1 if num_failed else 0


def make_record(prompt: Prompt, responses: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """The JSON object of a prompt, for --json and --output: the answer's tensors as lists.

    A stream of one sequence has the new tokens as output_ids; all other answers have the prompt's before them.
    """
    order = ("sequence_length", "finish_reason", "cum_log_probs", "output_ids")
    grows = ("output_ids", "output_log_probs", "top_token_ids", "top_log_probs")  # [sequences, tokens, …]
    record: dict[str, Any] = {**prompt.content, "sentences": ["".join(pieces) for pieces in _pieces(responses)]}
    for name in dict.fromkeys([*order, *(name for response in responses for name in response)]):
        parts = [response[name] for response in responses if name in response and response[name].size]
        if not parts or name == "sentences":
            continue
        array = np.concatenate(parts, axis=1) if name in grows else parts[-1]
        if name == "finish_reason":  # [sequences, 1], as all strings
            array = array.reshape(-1)
        if array.dtype.kind == "f":
            is_finite, array = np.isfinite(array), array.astype(object)
            array[~is_finite] = None  # JSON has no infinity
        record[name] = [as_text(value) for value in array.tolist()]
    if "output_ids" in record:
        lengths = record.get("sequence_length", [None] * len(record["output_ids"]))
        record["output_ids"] = [ids[:length] for ids, length in zip(record["output_ids"], lengths, strict=True)]
    return record


def _pieces(responses: list[dict[str, np.ndarray]]) -> Iterator[tuple[str, ...]]:
    """The pieces of each sequence's text."""
    return zip(*([as_text(piece) for piece in r["sentences"].reshape(-1)] for r in responses), strict=True)


class Screen:
    """Prints answers in the prompts' order: the current prompt's at once, the later ones' in their turn."""

    def __init__(self, flags: argparse.Namespace, num_prompts: int) -> None:
        self.flags = flags
        self.num_prompts = num_prompts
        self._rule = "─" * min(shutil.get_terminal_size().columns, 100) + "\n"
        self._turn = 0
        self._begun: set[int] = set()
        self._held: dict[int, list[tuple[Any, str]]] = {}
        self._is_done: set[int] = set()

    def show_piece(self, index: int, response: dict[str, np.ndarray]) -> None:
        """One response of a stream."""
        texts = ["".join(pieces) for pieces in _pieces([response])]
        if self.flags.json:
            ids = response["output_ids"].tolist() if "output_ids" in response else []
            self._print_json(index, {"index": index, "pieces": texts, "output_ids": ids})
            return
        rule = "" if index in self._begun else self._rule
        self._begun.add(index)
        self._print(index, rule + f"\n{self._rule}".join(texts))

    def show(self, index: int, record: dict[str, Any]) -> None:
        """A whole answer, or the end of a stream."""
        if self.flags.json:
            self._print_json(index, record)
        elif self.flags.stream:
            self._print(index, "\n" if index in self._begun else "")
        else:
            for text in record.get("sentences", []):
                self._begun.add(index)
                self._print(index, f"{self._rule}{text}\n")
        if "error" in record:
            where = f"prompt {index + 1}: " if self.num_prompts > 1 else ""
            self._print(index, complaint(where + record["error"]), sys.stderr)
        self._is_done.add(index)
        while self._turn in self._is_done:
            self._turn += 1
            self._print_held(self._turn)

    def close(self) -> None:
        """Print the answers that still wait, and the last rule."""
        for index in sorted({*self._held, *self._begun}):
            self._print_held(index)
            if index in self._begun - self._is_done:
                print(flush=True)
        if self._begun and not self.flags.json:
            print(end=self._rule, flush=True)

    def _print_json(self, index: int, line: dict[str, Any]) -> None:
        self._print(index, json.dumps(line, ensure_ascii=False) + "\n")

    def _print(self, index: int, text: str, file: Any = None) -> None:
        self._held.setdefault(index, []).append((file or sys.stdout, text))
        if index == self._turn:
            self._print_held(index)

    def _print_held(self, index: int) -> None:
        for file, text in self._held.pop(index, []):
            try:
                print(text, end="", file=file, flush=True)
            except BrokenPipeError:  # the reader has gone (`| head`): as Ctrl-C
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                signal.raise_signal(signal.SIGINT)


class ResultWriter:
    """The file of --output: each answer is appended at once; `close` sorts the lines into the prompts' order."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.path = Path(flags.output).resolve()
        self._lines: list[tuple[int, int, int]] = []  # index, offset, length
        if flags.prompts_file and self.path == Path(flags.prompts_file).resolve():
            raise ValueError(f"--output is --prompts-file, {flags.output}; it would be overwritten")
        try:
            self._file = self.path.open("ab")  # an old file stays until there is a first answer
        except OSError as error:
            raise ValueError(f"{flags.output} cannot be written ({error.strerror})") from None
        if not self.path.is_file():
            raise ValueError(f"{flags.output} is no regular file; --json prints what --output writes")

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Write one line; index: the prompt's number, from 0."""
        if not self._lines:
            self._file.truncate(0)
        line = json.dumps({"index": index, **record}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self._lines.append((index, sum(self._lines[-1][1:]) if self._lines else 0, len(line)))
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Close the file and sort its lines."""
        self._file.close()
        if self._lines == sorted(self._lines):
            return
        sorted_path = self.path.with_name(self.path.name + ".sorted")
        with self.path.open("rb") as source, sorted_path.open("wb") as target:
            for _, offset, length in sorted(self._lines):
                source.seek(offset)
                target.write(source.read(length))
        sorted_path.replace(self.path)
