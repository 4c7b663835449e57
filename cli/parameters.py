"""Prompts with their parameters: one table of parameters for flags and JSONL lines.

This file owns the tensors' names and the limits of their values; serving/triton/inputs.py reads the same tensors. It
imports no numpy, so that --help starts fast.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_TYPES = {  # a tensor's data type: the Python type and the largest value
    "uint32": (int, 2**32 - 1),
    "uint64": (int, 2**64 - 1),
    "float32": (float, math.inf),
    "bool": (bool, 1),
    "object": (str, 0),
}


class Parameter(NamedTuple):
    """A parameter of a prompt: a flag, a key of a JSONL line, a tensor. The server has a default for an absent one."""

    name: str
    dtype: str
    help: str
    tensor: str
    least: float = 0
    choices: tuple[str, ...] = ()
    is_list: bool = False

    def check(self, value: Any) -> Any:
        """Return the value (a list for a list parameter). Raises ValueError, in one sentence."""
        kind, most = _TYPES[self.dtype]
        values = value if self.is_list and isinstance(value, list) else [value]
        for item in values:
            is_kind = isinstance(item, (int, float) if kind is float else kind)
            if not is_kind or (isinstance(item, bool) and kind is not bool):
                raise ValueError(f"{self.name} is {item!r}; it must be of type {kind.__name__}")
            if self.choices and item not in self.choices:
                raise ValueError(f"{self.name} is {item!r}; it must be one of {', '.join(self.choices)}")
            if kind is str:
                item.encode("utf-8", "surrogateescape")
            elif not self.least <= item <= most:  # also false for NaN
                raise ValueError(f"{self.name} is {item}; it must be between {self.least} and {most}")
        return values if self.is_list else value

    def add_flag(self, group: Any) -> None:
        """Add the flag to a group of argparse; the parsed flags have the attribute only if the command line sets it."""
        kind, most = _TYPES[self.dtype]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{self.help} [{self.tensor}]"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is str:
            options |= {"nargs": "+", "metavar": "TEXT"} if self.is_list else {"choices": self.choices}
        else:
            options |= {"type": number(kind, self.least, most), "metavar": "N" if kind is int else "X"}
            options |= {"nargs": "+"} if self.is_list else {}
        group.add_argument("--" + self.name.replace("_", "-"), **options)


def _parameter(name: str, dtype: str, text: str, tensor: str = "", least: float = 0, **options: Any) -> Parameter:
    return Parameter(name, dtype, text, tensor or name, least, **options)


# The number that ends a help text is the server's default.
PARAMETERS = [
    _parameter("output_len", "uint32", "most tokens to generate", "request_output_len", 1),
    _parameter("top_k", "uint32", "sample from the k likeliest tokens, 0: from all; 0", "runtime_top_k"),
    _parameter("top_p", "float32", "sample from this share of the probability; neither: greedy", "runtime_top_p"),
    _parameter("temperature", "float32", "divides the logits where --top-k or --top-p sample; 1"),
    _parameter("random_seed", "uint64", "same seed, same text; 0"),
    _parameter("n", "uint32", "samples of each prompt; 1", least=1),
    _parameter("top_p_decay", "float32", "top_p is multiplied by it after each token; 1"),
    _parameter("top_p_min", "float32", "where the decay ends; 1e-6"),
    _parameter("top_p_reset_ids", "uint32", "token after which top_p is what it was at first; none"),
    _parameter("beam_width", "uint32", "beams; above 1: beam search, no sampling; 1", least=1),
    _parameter("len_penalty", "float32", "exponent of the length in a beam's score; 1", least=-math.inf),
    _parameter("beam_search_diversity_rate", "float32", "favours unlike beams; 0", least=-math.inf),
    _parameter("early_stopping", "object", "when beam search may end; false", choices=("false", "true", "never")),
    _parameter("repetition_penalty", "float32", "divides logits of tokens that are there already; 1"),
    _parameter("presence_penalty", "float32", "taken from logits of tokens that are there already; 0", least=-math.inf),
    _parameter("frequency_penalty", "float32", "the same, for each time that one is there; 0", least=-math.inf),
    _parameter("min_length", "uint32", "no end token among the first so many; 0"),
    _parameter("stop_words", "object", "texts that end the output", is_list=True),
    _parameter("bad_words", "object", "texts that are never generated", is_list=True),
    _parameter("include_stop_words", "bool", "leave the stop word in the text", "include_stop_words_in_output"),
    _parameter("ignore_eos", "bool", "go on after the end token, to --output-len"),
    _parameter("start_id", "uint32", "token that stands for an empty prompt; none"),
    _parameter("end_id", "uint32", "tokens that end a text, each of them; the model's", is_list=True),
    _parameter("exclude_input", "bool", "answer without the prompt", "exclude_input_in_output"),
    _parameter("skip_special_tokens", "bool", "leave special tokens out of the text; yes"),
    _parameter("log_probs", "bool", "return each new token's log probability", "is_return_log_probs"),
    _parameter("num_log_probs", "uint32", "return so many likeliest tokens for each new one, and theirs"),
    _parameter("prompt_log_probs", "bool", "return the prompt's log probabilities", "is_return_prompt_log_probs"),
    _parameter("next_token_logits", "bool", "return the first new token's logits", "is_return_next_token_logits"),
    _parameter("deadline_s", "float32", "after so many seconds the text ends with what it has"),
]


DEFAULT_PROMPTS = ("Q: How are you?", "Q: How big is the universe?", "1 2 3 4 ", "a b c d ")


class Prompt(NamedTuple):
    """content: {"prompt": text}, {"input_ids": tokens} or {"messages": [{"role": …, "content": …}, …]}.

    parameters: values by the names in PARAMETERS.
    """

    content: dict[str, Any]
    parameters: dict[str, Any]


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number between two limits."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # also false for NaN
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parameters_of(flags: argparse.Namespace) -> dict[str, Any]:
    """The parameters that the command line sets."""
    return {p.name: getattr(flags, p.name) for p in PARAMETERS if hasattr(flags, p.name)}


def read_prompts(flags: argparse.Namespace) -> list[Prompt]:
    """The prompts of the flags or of the file. Raises ValueError for a bad line, in one sentence with its number."""
    given = parameters_of(flags)
    prompts = _read_file(flags, given) if flags.prompts_file else []
    prompts += [Prompt({"prompt": text}, given) for text in flags.prompts or []]
    return [_as_chat(prompt, flags.system) for prompt in prompts] if flags.chat else prompts


def _as_chat(prompt: Prompt, system: str | None) -> Prompt:
    """A prompt as a user's message; token ids and messages stay."""
    if "prompt" not in prompt.content:
        return prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    return Prompt({"messages": [*messages, {"role": "user", "content": prompt.content["prompt"]}]}, prompt.parameters)


def _read_file(flags: argparse.Namespace, given: dict[str, Any]) -> list[Prompt]:
    name, prompts = flags.prompts_file, []
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().removesuffix("\r")
            if text.strip():
                is_json = name.endswith(".jsonl")
                prompts.append(_read_object(text, given) if is_json else Prompt({"prompt": text}, given))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}:{number}: not valid UTF-8: {error.reason} at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{name}:{number}: not valid JSON: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"{name}:{number}: {error}") from None
    if not prompts:
        raise ValueError(f"{name} has no prompts")
    return prompts


def _read_object(text: str, given: dict[str, Any]) -> Prompt:
    known = {name: parameter for parameter in PARAMETERS for name in (parameter.name, parameter.tensor)}
    content: dict[str, Any] = {}
    parameters = dict(given)
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    for key, value in line.items():
        if key in ("prompt", "prompts"):
            content["prompt"] = _parameter(key, "object", "").check(value)
        elif key == "input_ids":
            is_right = isinstance(value, list) and value and all(type(v) is int and 0 <= v < 2**31 for v in value)
            if not is_right:
                raise ValueError("input_ids must be a list of tokens")
            content["input_ids"] = value
        elif key == "messages":
            if not isinstance(value, list) or not value or not all(map(_is_message, value)):
                raise ValueError("messages must be a list of objects with role and content, which are strings")
            content["messages"] = value
        elif key in known:
            parameters[known[key].name] = None if value is None else known[key].check(value)
        else:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"no parameter is called {key}" + (f" (did you mean {near[0]}?)" if near else ""))
    if len(content) != 1:
        raise ValueError("it must have one of prompt, input_ids and messages")
    return Prompt(content, parameters)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
