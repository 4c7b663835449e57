#!/usr/bin/env python3
"""Ask a GPT server for text, or measure how quickly it answers.

    ./client.py --url http://host:8000 --prompts "Thank you for" "Q: Are you going for lunch?"
    ./client.py --prompts "Once upon a time" --stream --output-len 200 --top-k 40 --random-seed 7
    ./client.py --prompts-file prompts.jsonl --output answers.jsonl --concurrency 32
    ./client.py --url grpc://host --bench --rate 4 --duration 60 --plot load.png

Exit codes: 0 - all answered; 1 - the server refused a prompt or failed; 2 - wrong flags or prompts file; 3 - no
server within --init-timeout-s; 130 - Ctrl-C (143 - SIGTERM): running requests are cancelled on the server, finished
answers are kept in --output.

The names of the tensors stand in PARAMETERS, for flags and JSONL lines alike; gpt.py has the other end of them. All
requests are asynchronous tasks of one thread. The load test is in benchmarks/load.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np  # where it is needed at run time it is imported late: --help comes at once

_TYPES = {  # of a tensor: what a value of it must be, and at most
    "uint32": (int, 2**32 - 1),
    "uint64": (int, 2**64 - 1),
    "float32": (float, math.inf),
    "bool": (bool, 1),
    "object": (str, 0),
}
_CLEAR_LINE = "\r\033[K"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between the tries of one request
_STOP_TIMEOUT_S = 1.0


class Parameter(NamedTuple):
    """What a user may set for a prompt: a flag, a key of a JSONL line, a tensor. What is absent is not sent."""

    name: str
    dtype: str
    help: str
    tensor: str
    least: float = 0
    choices: tuple[str, ...] = ()
    is_list: bool = False

    def check(self, value: Any) -> Any:
        """The value (of a list parameter: a list), or ValueError in one sentence."""
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
        """The flag of argparse; its attribute is there only where the command line has it."""
        kind, most = _TYPES[self.dtype]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{self.help} [{self.tensor}]"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is str:
            options |= {"nargs": "+", "metavar": "TEXT"} if self.is_list else {"choices": self.choices}
        else:
            options |= {"type": _number(kind, self.least, most), "metavar": "N" if kind is int else "X"}
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
    _parameter("start_id", "uint32", "token that begins a text; the model's"),
    _parameter("end_id", "uint32", "token that ends a text; the model's"),
    _parameter("exclude_input", "bool", "answer without the prompt", "exclude_input_in_output"),
    _parameter("skip_special_tokens", "bool", "leave special tokens out of the text; yes"),
    _parameter("log_probs", "bool", "return each new token's log probability", "is_return_log_probs"),
    _parameter("num_log_probs", "uint32", "return so many likeliest tokens for each new one, and theirs"),
    _parameter("prompt_log_probs", "bool", "return the prompt's log probabilities", "is_return_prompt_log_probs"),
    _parameter("next_token_logits", "bool", "return the first new token's logits", "is_return_next_token_logits"),
    _parameter("deadline_s", "float32", "after so many seconds the text ends with what it has"),
]


class Prompt(NamedTuple):
    """asked: {"prompt": text} or {"input_ids": tokens}; parameters: values by the names in PARAMETERS."""

    asked: dict[str, Any]
    parameters: dict[str, Any]


def main() -> int:
    """Parse flags, ask, print; returns the exit code."""
    flags = parse_flags()
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if flags.plot and not _is_installed("matplotlib"):
            raise ValueError("--plot needs matplotlib, which is not installed (pip install matplotlib)")
        if flags.plot and Path(flags.plot).suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--plot is {flags.plot}; it must end in .png, .pdf or .svg")
        prompts = read_prompts(flags)
        journal = Journal(flags) if flags.output else None
    except ValueError as error:
        _complain(str(error))
        return 2
    try:
        return asyncio.run(run(flags, prompts, journal))
    except KeyboardInterrupt:  # while modules are loaded
        return 130


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        description="Ask a GPT server for text, or measure how quickly it answers.",
        epilog="exit codes: 0 all answered; 1 a prompt was refused or failed; 2 wrong flags or prompts file; 3 no "
        "server; 130 Ctrl-C (143 SIGTERM): running requests are cancelled on the server, finished answers are kept in "
        "--output; a second Ctrl-C ends at once",
        formatter_class=_Formatter,
    )
    what = parser.add_argument_group("what to ask (one of these)").add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", nargs="+", metavar="PROMPT", help="texts to continue")
    what.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a text per line; FILE.jsonl: an object per line with prompt (or input_ids) and any parameter below, by "
        "its flag's name with underscores or its tensor's name, which goes before the flag; -: texts from stdin",
    )
    what.add_argument("--bench", action="store_true", help="measure latency and throughput under load")
    group = parser.add_argument_group("the server")
    group.add_argument("--url", type=_url, default="http://localhost:8000", help="http://host:port, grpc://… or host")
    group.add_argument("--model-name", default="gpt2", help="the model's name in Triton")
    group.add_argument("--init-timeout-s", type=_number(float, 0), default=600.0, help="wait so long for the server")
    group.add_argument("--inference-timeout-s", type=_number(float, 0), default=600.0, help="wait so long for a text")
    group.add_argument(
        "--retries",
        type=_number(int, 0),
        default=5,
        help="tries more where the server is busy or the connection breaks",
    )
    group = parser.add_argument_group("answers")
    group.add_argument("--stream", action="store_true", help="print text as it is generated, in the prompts' order")
    group.add_argument("--json", action="store_true", help="print one JSON object per prompt (--stream: per piece too)")
    group.add_argument(
        "--output", metavar="FILE.jsonl", help="write one JSON object per prompt there, in the prompts' order"
    )
    group.add_argument("--concurrency", type=_number(int, 1), default=8, help="requests at once")
    group = parser.add_argument_group("parameters of each prompt, and their [tensors]")
    for parameter in PARAMETERS:
        parameter.add_flag(group)
    parser.set_defaults(output_len=32)
    group = parser.add_argument_group(
        "load test (--bench)", "random tokens as prompts, --ignore-eos, --concurrency requests at once or --rate"
    )
    group.add_argument("--bench-prompt-len", type=_span, default="128", metavar="A[:B]", help="tokens, drawn evenly")
    group.add_argument("--bench-output-len", type=_span, default="64", metavar="A[:B]", help="tokens, drawn evenly")
    group.add_argument(
        "--bench-vocab",
        type=_number(int, 1, 2**31),
        default=256,
        help="prompts' tokens are below it; any model has these",
    )
    group.add_argument("--bench-warmup", type=_number(int, 0), default=2, help="requests before, not counted")
    group.add_argument("--rate", type=_number(float, 1e-6), help="Poisson arrivals per second, whatever is running")
    group.add_argument("--duration", type=_number(float, 1e-3), help="seconds in which requests are sent")
    group.add_argument("--num-requests", type=_number(int, 1), help="end after so many; 100 without --duration")
    group.add_argument("--seed", type=_number(int, 0), default=0, help="of prompts, lengths and arrivals")
    group.add_argument("--plot", metavar="FILE.png", help="one page of plots (needs matplotlib)")
    return parser.parse_args(argv)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def _number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # also false for NaN
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text} is no A or A:B with 1 <= A <= B")
    return least, most


def _url(text: str) -> str:
    """With its scheme and port."""
    match = re.fullmatch(r"(?:(http|grpc)://)?(\[[^]]+\]|[^/:]+)(?::(\d+))?/?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no http://host:port, grpc://host:port or host")
    scheme = match[1] or "http"
    return f"{scheme}://{match[2]}:{match[3] or {'http': 8000, 'grpc': 8001}[scheme]}"


def _is_installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def parameters_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Those that the command line sets."""
    return {p.name: getattr(flags, p.name) for p in PARAMETERS if hasattr(flags, p.name)}


def read_prompts(flags: argparse.Namespace) -> list[Prompt]:
    """What the flags or the file ask for; ValueError, in one sentence with the line's number, for a bad line."""
    given = parameters_of(flags)
    if not flags.prompts_file:
        return [Prompt({"prompt": text}, given) for text in flags.prompts or []]
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
        except ValueError as error:
            raise ValueError(f"{name}:{number}: {error}") from None
    if not prompts:
        raise ValueError(f"{name} has no prompts")
    return prompts


def _read_object(text: str, given: dict[str, Any]) -> Prompt:
    known = {name: parameter for parameter in PARAMETERS for name in (parameter.name, parameter.tensor)}
    asked, parameters = {}, dict(given)
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    for key, value in line.items():
        if key in ("prompt", "prompts"):
            asked["prompt"] = _parameter(key, "object", "").check(value)
        elif key == "input_ids":
            is_right = isinstance(value, list) and value and all(type(v) is int and 0 <= v < 2**31 for v in value)
            if not is_right:
                raise ValueError("input_ids must be a list of tokens")
            asked["input_ids"] = value
        elif key in known:
            parameters[known[key].name] = None if value is None else known[key].check(value)
        else:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"no parameter is called {key}" + (f" (did you mean {near[0]}?)" if near else ""))
    if len(asked) != 1:
        raise ValueError("it must have either prompt or input_ids")
    return Prompt(asked, parameters)


def make_inputs(prompt: Prompt) -> dict[str, np.ndarray]:
    """A request's tensors, without the batch dimension."""
    import numpy as np

    # surrogateescape: bytes of the command line that are no UTF-8 go out as they are, for the server to judge
    inputs = {}
    if "prompt" in prompt.asked:
        inputs["prompts"] = np.array([prompt.asked["prompt"].encode("utf-8", "surrogateescape")], dtype=object)
    if "input_ids" in prompt.asked:
        inputs["input_ids"] = np.array(prompt.asked["input_ids"], dtype=np.int32)
    for parameter in PARAMETERS:
        value = prompt.parameters.get(parameter.name)
        if value is not None and value != []:  # a tensor without elements hangs Triton's Python backend
            values = [v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v for v in _listed(value)]
            inputs[parameter.tensor] = np.array(values, dtype=parameter.dtype)
    return inputs


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Failure(Exception):
    """The server's refusal, or what went wrong on the way to it, in one sentence."""


class Busy(Failure):
    """The server has no room now; worth another try."""


class Gone(Failure):
    """The connection broke, or there is none; worth another try."""


OnResponse = Callable[[dict[str, Any]], None]


class HttpConnection:
    """Triton's HTTP protocol: binary tensors, and server-sent events for streams."""

    def __init__(self, url: str) -> None:
        import aiohttp
        from tritonclient.http import InferInput
        from tritonclient.http.aio import InferenceServerClient

        self.url = url
        self.input_class = InferInput
        self.broken = (aiohttp.ClientError, OSError)
        # No limits: one on connections would keep a `stop` waiting behind the requests that it is to stop.
        self.client = InferenceServerClient(url.removeprefix("http://"), conn_limit=0, conn_timeout=None)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    def arrays(self, result: Any) -> dict[str, np.ndarray]:
        """Of tritonclient's result."""
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    async def stream(self, model: str, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        """Ask; `on_response` gets the arrays of each response as it comes. Raises what the libraries raise."""
        from tritonclient.utils import InferenceServerException

        body = {name: [_text(value) for value in array.tolist()] for name, array in inputs.items()}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
        num_alternatives = int(inputs["num_log_probs"][0]) if "num_log_probs" in inputs else 1
        async with self._session.post(f"{self.url}/v2/models/{model}/generate_stream", data=data) as answer:
            if answer.status != 200:
                text = (await answer.text(errors="replace")).removeprefix("data: ")
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    text = json.loads(text)["error"]
                raise InferenceServerException(text or answer.reason, str(answer.status))
            rest = b""
            async for chunk in answer.content.iter_any():
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    response = json.loads(event.removeprefix(b"data: "))
                    if "error" in response:
                        raise InferenceServerException(response["error"])
                    on_response(_arrays(response, num_alternatives))

    async def close(self) -> None:
        await self._session.close()
        await self.client.close()


class GrpcConnection:
    """Triton's gRPC protocol; the same methods."""

    def __init__(self, url: str) -> None:
        import grpc
        from tritonclient.grpc import InferInput
        from tritonclient.grpc.aio import InferenceServerClient

        self.url = url
        self.input_class = InferInput
        self.broken = (grpc.RpcError,)
        options = {
            "grpc.max_send_message_length": -1,
            "grpc.max_receive_message_length": -1,
            "grpc.initial_reconnect_backoff_ms": 200,  # gRPC's own would wait for up to two minutes
            "grpc.max_reconnect_backoff_ms": 1000,
        }
        self.client = InferenceServerClient(url.removeprefix("grpc://"), channel_args=list(options.items()))

    def arrays(self, result: Any) -> dict[str, np.ndarray]:
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    async def stream(self, model: str, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        async def request() -> Any:
            yield {"model_name": model, "inputs": _tensors(self.input_class, inputs)}

        answer = self.client.stream_infer(request())
        try:
            async for result, error in answer:
                if error:
                    raise error
                on_response(self.arrays(result))
        finally:
            answer.cancel()

    async def close(self) -> None:
        await self.client.close()


def _tensors(input_class: type, inputs: dict[str, np.ndarray]) -> list[Any]:
    from tritonclient.utils import np_to_triton_dtype

    made = [(a, input_class(name, a.shape, np_to_triton_dtype(a.dtype))) for name, a in inputs.items()]
    return [tensor.set_data_from_numpy(array) for array, tensor in made]


def _arrays(response: dict[str, Any], num_alternatives: int) -> dict[str, np.ndarray]:
    """The arrays of a server-sent event, where Triton makes flat lists of them and values of single elements."""
    import numpy as np

    num_sequences = len(_listed(response["sentences"]))
    shapes = {"output_ids": (num_sequences, -1), "output_log_probs": (num_sequences, -1)}
    shapes |= dict.fromkeys(("top_token_ids", "top_log_probs"), (num_sequences, -1, num_alternatives))
    arrays = {name: np.array(_listed(value)) for name, value in response.items() if not name.startswith("model_")}
    return {name: array.reshape(shapes.get(name, (-1,))) for name, array in arrays.items() if array.size}


@contextlib.contextmanager
def _failures(connection: HttpConnection | GrpcConnection) -> Iterator[None]:
    """The libraries' exceptions as Failure, Busy and Gone."""
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as error:
        text, status = error.message(), str(error.status())
    except connection.broken as error:
        is_grpc = hasattr(error, "details")
        text = error.details() if is_grpc else f"{type(error).__name__}: {error}"
        status = str(error.code()) if is_grpc else "UNAVAILABLE"
    except ValueError as error:  # something that is no Triton answers
        text, status = f"the answer cannot be read ({type(error).__name__}: {error})", ""
    else:
        return
    if status == "503" or "ServerBusy: " in text:
        raise Busy(_sentence(text))
    if "UNAVAILABLE" in status:
        raise Gone(f"the connection to {connection.url} broke ({_sentence(text)})")
    raise Failure(_sentence(text))


def _sentence(text: str) -> str:
    """The server's own sentence, out of what libraries wrap around it."""
    text = " ".join(text.split())
    text = re.sub(r"^.*?Message: ", "", text)
    text = re.sub(r"^\[request id: \S*\] ", "", text)
    return re.sub(r"^(BadRequest|ServerBusy|InternalError): ", "", text)


class Asker:
    """Sends requests, each under an id of its own; tries again what is worth it; cancels what runs."""

    def __init__(self, connection: HttpConnection | GrpcConnection, flags: argparse.Namespace) -> None:
        self.connection = connection
        self.flags = flags
        self.is_streaming = flags.stream or flags.bench
        self.running: dict[str, None] = {}  # ids
        self.is_stopping = False
        self._is_gone = False

    async def is_ready(self) -> bool:
        """Wait for the model; False where it is not there within --init-timeout-s."""
        model = self.flags.model_name + ("_streaming" if self.is_streaming else "")
        deadline = time.monotonic() + self.flags.init_timeout_s
        with _sign_of_life(f"waiting for {model} at {self.flags.url}"):
            while True:
                left = max(deadline - time.monotonic(), 0.1)
                with contextlib.suppress(Failure, asyncio.TimeoutError), _failures(self.connection):
                    if await asyncio.wait_for(self.connection.client.is_model_ready(model), left):
                        return True
                if time.monotonic() > deadline:
                    return False
                await asyncio.sleep(0.2)

    async def ask(self, inputs: dict[str, np.ndarray], on_response: OnResponse) -> list[dict[str, np.ndarray]]:
        """All responses to a prompt, each shown to `on_response` first; raises Failure."""
        responses: list[dict[str, np.ndarray]] = []

        def take(response: dict[str, np.ndarray]) -> None:
            responses.append(response)
            on_response(response)

        for tries in range(1, self.flags.retries + 2):
            try:
                await self.attempt(inputs, take)
                self._is_gone = False
                return responses
            except (Busy, Gone) as error:
                is_gone = isinstance(error, Gone)
                # A server that stayed away for all tries of one prompt gets one try for each further prompt.
                if responses or self.is_stopping or tries > self.flags.retries or (is_gone and self._is_gone):
                    self._is_gone = is_gone and not responses
                    raise
            pause = min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")

    async def attempt(self, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        """One try; raises Failure."""
        import numpy as np

        request_id = uuid.uuid4().hex
        inputs = {**inputs, "request_id": np.array([request_id.encode()], dtype=object)}
        self.running[request_id] = None
        try:
            await asyncio.wait_for(self._send(inputs, on_response), self.flags.inference_timeout_s)
        except asyncio.TimeoutError:
            await self._stop(request_id)
            raise Failure(f"no answer within {self.flags.inference_timeout_s:g} s") from None
        finally:
            del self.running[request_id]

    async def _send(self, inputs: dict[str, np.ndarray], on_response: OnResponse) -> None:
        with _failures(self.connection):
            if self.is_streaming:
                await self.connection.stream(self.flags.model_name + "_streaming", inputs, on_response)
            else:
                on_response(await self._infer(inputs))

    async def _infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ask the model that does not stream; its arrays have a batch dimension."""
        tensors = _tensors(self.connection.input_class, {name: array[None] for name, array in inputs.items()})
        result = await self.connection.client.infer(self.flags.model_name, tensors)
        return {name: array[0] for name, array in self.connection.arrays(result).items()}

    async def _stop(self, request_id: str) -> None:
        import numpy as np

        inputs = {"request_id": np.array([request_id.encode()], dtype=object), "stop": np.array([True])}
        with contextlib.suppress(Failure, asyncio.TimeoutError), _failures(self.connection):
            await asyncio.wait_for(self._infer(inputs), _STOP_TIMEOUT_S)

    async def stop_all(self) -> None:
        """Cancel what runs on the server; more than once, for one that has not arrived there yet."""
        self.is_stopping = True
        while self.running:
            await asyncio.gather(*map(self._stop, list(self.running)), asyncio.sleep(0.2))


async def run(flags: argparse.Namespace, prompts: list[Prompt], journal: Journal | None) -> int:
    """Do what the flags say, to the end or to a signal; the exit code."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()

    def on_signal(number: int) -> None:
        if signalled.done():
            os._exit(128 + number)
        signalled.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    connection = (GrpcConnection if flags.url.startswith("grpc:") else HttpConnection)(flags.url)
    asker = Asker(connection, flags)
    work = asyncio.ensure_future(_work(flags, prompts, asker, journal))
    await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
    is_done = work.done()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asker.stop_all(), _STOP_TIMEOUT_S)  # nothing runs where the work is done
    await asyncio.wait({work}, timeout=0.1)  # it keeps what it has
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await connection.close()
    return work.result() if is_done else 128 + signalled.result()


async def _work(flags: argparse.Namespace, prompts: list[Prompt], asker: Asker, journal: Journal | None) -> int:
    if not await asker.is_ready():
        _complain(f"no model {flags.model_name} at {flags.url} within {flags.init_timeout_s:g} s")
        return 3
    try:
        if not flags.bench:
            return await answer(flags, prompts, asker, journal)
        from benchmarks import load

        return await load.run(flags, asker, make_inputs(Prompt({}, parameters_of(flags))), _sign_of_life)
    except (Failure, OSError) as error:  # of the load test's warm-up; of a file that is written
        _complain(str(error))
        return 1


async def answer(flags: argparse.Namespace, prompts: list[Prompt], asker: Asker, journal: Journal | None) -> int:
    """Ask for all prompts, --concurrency at once; the exit code."""
    screen = Screen(flags, len(prompts)) if flags.stream or not journal else None
    on_piece = screen.show_piece if screen and flags.stream else lambda index, response: None
    numbered = iter(enumerate(prompts))
    started, num_done, num_failed = time.monotonic(), 0, 0

    async def worker() -> None:
        nonlocal num_done, num_failed
        for index, prompt in numbered:
            try:
                responses = await asker.ask(make_inputs(prompt), functools.partial(on_piece, index))
                record = make_record(prompt, responses)
            except Failure as error:
                record = {**prompt.asked, "error": str(error)}
            if asker.is_stopping and ("error" in record or "cancelled" in record.get("finish_reason", [])):
                return
            num_done += 1
            num_failed += "error" in record
            if screen:
                screen.show(index, record)
            if journal:
                journal.add(index, record)
            if asker.is_stopping:
                return

    def progress() -> str:
        rate = num_done / (time.monotonic() - started)
        left = f"{(len(prompts) - num_done) / rate:.0f} s left" if num_done else "…"
        bar = "█" * (20 * num_done // len(prompts))
        return f"{bar:░<20} {num_done}/{len(prompts)} prompts, {num_failed} failed, {rate:.3g}/s, {left}"

    is_quiet = flags.prompts or (screen and sys.stdout.isatty())
    try:
        with contextlib.nullcontext() if is_quiet else _sign_of_life(progress):
            await asyncio.gather(*(worker() for _ in range(min(flags.concurrency, len(prompts)))))
    finally:
        if screen:
            screen.close()
        if journal:
            journal.close()
    if journal and num_failed:
        _complain(f"{num_failed} of {len(prompts)} prompts failed; {flags.output} has the errors")
    return 1 if num_failed else 0


def make_record(prompt: Prompt, responses: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What --json and --output say of a prompt: the answer's tensors as lists.

    A stream of one sequence has the new tokens as output_ids; all other answers have the prompt's before them.
    """
    import numpy as np

    order = ("sequence_length", "finish_reason", "cum_log_probs", "output_ids")
    grows = ("output_ids", "output_log_probs", "top_token_ids", "top_log_probs")  # [sequences, tokens, …]
    record: dict[str, Any] = {**prompt.asked, "sentences": ["".join(pieces) for pieces in _pieces(responses)]}
    for name in dict.fromkeys([*order, *(name for response in responses for name in response)]):
        parts = [response[name] for response in responses if name in response and response[name].size]
        if not parts or name == "sentences":
            continue
        array = np.concatenate(parts, axis=1) if name in grows else parts[-1]
        if array.dtype.kind == "f":
            array = np.where(np.isfinite(array), array, None)  # JSON has no infinity
        record[name] = [_text(value) for value in array.tolist()]
    if "output_ids" in record:
        lengths = record.get("sequence_length", [None] * len(record["output_ids"]))
        record["output_ids"] = [ids[:length] for ids, length in zip(record["output_ids"], lengths, strict=True)]
    return record


def _pieces(responses: list[dict[str, np.ndarray]]) -> Iterator[tuple[str, ...]]:
    """The pieces of each sequence's text."""
    return zip(*([_text(piece) for piece in r["sentences"].reshape(-1)] for r in responses), strict=True)


def _text(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


class Screen:
    """Prints answers in the prompts' order: one prompt's as they come, those after it when it is their turn."""

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
            self._print(index, _complaint(where + record["error"]), sys.stderr)
        self._is_done.add(index)
        while self._turn in self._is_done:
            self._turn += 1
            self._print_held(self._turn)

    def close(self) -> None:
        """Print what still waits for its turn, and the last rule."""
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
            except BrokenPipeError:  # nobody reads on (`| head`): as with Ctrl-C
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                signal.raise_signal(signal.SIGINT)


class Journal:
    """--output: each answer is appended as soon as it is there; at the end the file is put into the prompts' order."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.path = Path(flags.output).resolve()
        self._places: list[tuple[int, int, int]] = []  # index, offset, length
        if flags.prompts_file and self.path == Path(flags.prompts_file).resolve():
            raise ValueError(f"--output is --prompts-file, {flags.output}; it would be overwritten")
        try:
            self._file = self.path.open("ab")  # an old file stays until there is a first answer
        except OSError as error:
            raise ValueError(f"{flags.output} cannot be written ({error.strerror})") from None
        if not self.path.is_file():
            raise ValueError(f"{flags.output} is no regular file; --json prints what --output writes")

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Write one line; index: the prompt's place, from 0."""
        if not self._places:
            self._file.truncate(0)
        line = json.dumps({"index": index, **record}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self._places.append((index, sum(self._places[-1][1:]) if self._places else 0, len(line)))
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Sort the lines."""
        self._file.close()
        if self._places == sorted(self._places):
            return
        sorted_path = self.path.with_name(self.path.name + ".sorted")
        with self.path.open("rb") as source, sorted_path.open("wb") as target:
            for _, offset, length in sorted(self._places):
                source.seek(offset)
                target.write(source.read(length))
        sorted_path.replace(self.path)


@contextlib.contextmanager
def _sign_of_life(message: str | Callable[[], str]) -> Iterator[None]:
    """While inside, show on stderr what goes on, and for how long: each second on a terminal, else less often."""
    is_over = threading.Event()
    is_terminal = sys.stderr.isatty()
    started = time.monotonic()

    def tick() -> None:
        while not is_over.wait(1.0 if is_terminal else min(max(5.0, (time.monotonic() - started) / 5), 60.0)):
            text = message() if callable(message) else message
            text = f"{text}, {time.monotonic() - started:.0f} s"
            print(
                _CLEAR_LINE + text if is_terminal else text,
                end="" if is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
        if is_terminal:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _complain(sentence: str) -> None:
    print(_complaint(sentence), end="", file=sys.stderr)


def _complaint(sentence: str) -> str:
    return f"{_CLEAR_LINE if sys.stderr.isatty() else ''}client.py: {sentence}\n"


if __name__ == "__main__":
    sys.exit(main())
