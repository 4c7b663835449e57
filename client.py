#!/usr/bin/env python3
"""Ask a GPT server for text.

    ./client.py --url http://host:8000 --prompts "Thank you for" "Q: Are you going for lunch?"

Exit codes: 0 - answered; 1 - the server refused or failed; 2 - wrong flags; 3 - no server within --init-timeout-s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

_UINT32 = 2**32 - 1
# Flags that become one array each, one value per prompt: flag -> (tensor, dtype). Absent flags are not sent.
_PARAMETERS = {
    "output_len": ("request_output_len", np.uint32),
    "beam_width": ("beam_width", np.uint32),
    "top_k": ("runtime_top_k", np.uint32),
    "top_p": ("runtime_top_p", np.float32),
    "temperature": ("temperature", np.float32),
    "random_seed": ("random_seed", np.uint64),
}


def main() -> int:
    """Parse flags, ask, print; returns the exit code (130 for Ctrl-C)."""
    flags = parse_flags()
    warnings.filterwarnings("ignore", module="pytriton")  # of its own defaults, which are no user's business
    from pytriton.client import ModelClient
    from pytriton.client.exceptions import PyTritonClientError, PyTritonClientTimeoutError

    client = None
    try:
        with _sign_of_life(f"waiting for {flags.model_name} at {flags.url}"):
            client = ModelClient(
                flags.url,
                flags.model_name,
                lazy_init=False,
                init_timeout_s=flags.init_timeout_s,
                inference_timeout_s=flags.inference_timeout_s,
            )
        answers = client.infer_batch(**make_inputs(flags))
    except PyTritonClientTimeoutError as error:
        if client is None:
            _complain(f"no model {flags.model_name} at {flags.url} within {flags.init_timeout_s:g} s")
            return 3
        _complain(f"no answer within {flags.inference_timeout_s:g} s ({_sentence(error)})")
        return 1
    except KeyboardInterrupt:
        return 130
    except PyTritonClientError as error:
        _complain(_sentence(error))
        return 1
    except Exception as error:  # of the HTTP and gRPC libraries, where the server goes away
        _complain(f"the connection to {flags.url} broke ({type(error).__name__}: {_sentence(error)})")
        return 1
    finally:
        if client is not None:
            client.close()
    show(flags.prompts, answers, as_json=flags.json)
    return 0


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        description="Ask a GPT server for text.",
        epilog="exit codes: 0 answered, 1 refused or failed, 2 wrong flags, 3 no server",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://localhost:8000", help="http://host:port, grpc://host:port or host")
    parser.add_argument("--model-name", default="gpt2", help="the model's name in Triton")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="PROMPT", help="texts to continue")
    parser.add_argument("--output-len", type=_number(int, 1, _UINT32), default=32, help="tokens to generate")
    parser.add_argument("--beam-width", type=_number(int, 1, _UINT32), help="beams; server's default: 1")
    parser.add_argument(
        "--top-k", type=_number(int, 0, _UINT32), help="sample from the k likeliest; server's default: 0"
    )
    parser.add_argument("--top-p", type=_number(float, 0), help="sample from this share of the probability mass")
    parser.add_argument(
        "--temperature", type=_number(float, 0), help="divides the logits where --top-k or --top-p sample; 1"
    )
    parser.add_argument(
        "--random-seed", type=_number(int, 0, 2**64 - 1), help="same seed, same text; server's default: 0"
    )
    parser.add_argument("--init-timeout-s", type=_number(float, 0), default=600.0, help="wait so long for the server")
    parser.add_argument(
        "--inference-timeout-s", type=_number(float, 0), default=600.0, help="wait so long for the text"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    return parser.parse_args(argv)


def _number(kind: type, least: float, most: float = float("inf")) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # also false for NaN
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def make_inputs(flags: argparse.Namespace) -> dict[str, np.ndarray]:
    """The request's tensors, each [prompts, 1]."""
    # surrogateescape: bytes of the command line that are no UTF-8 go out as they are, for the server to judge
    prompts = [prompt.encode("utf-8", "surrogateescape") for prompt in flags.prompts]
    inputs = {"prompts": np.array(prompts, dtype=object)[:, None]}
    for name, (tensor, dtype) in _PARAMETERS.items():
        value = getattr(flags, name)
        if value is not None:
            inputs[tensor] = np.full((len(prompts), 1), value, dtype=dtype)
    return inputs


def show(prompts: list[str], answers: dict[str, np.ndarray], as_json: bool) -> None:
    """Print each prompt's sequences: under a rule each, or as one JSON object per prompt."""
    width = min(shutil.get_terminal_size().columns, 100)
    for row, prompt in enumerate(prompts):
        sentences = [text.decode() for text in answers["sentences"][row].reshape(-1)]
        lengths = answers["sequence_length"][row].reshape(-1).tolist()
        if as_json:
            output_ids = [ids[:n] for ids, n in zip(answers["output_ids"][row].tolist(), lengths, strict=True)]
            line = {
                "prompt": prompt,
                "sentences": sentences,
                "sequence_length": lengths,
                "output_ids": output_ids,
            }
            print(json.dumps(line, ensure_ascii=False))
        else:
            for sentence in sentences:
                print("─" * width, sentence, sep="\n")
    if not as_json:
        print("─" * width)


@contextlib.contextmanager
def _sign_of_life(message: str) -> Iterator[None]:
    """While inside, show on stderr that the program waits, and how long it has."""
    is_over = threading.Event()
    is_terminal = sys.stderr.isatty()

    def tick() -> None:
        started = time.monotonic()
        while not is_over.wait(1.0 if is_terminal else 5.0):
            seconds = f"{message} … {time.monotonic() - started:.0f} s"
            print(
                f"\r{seconds}" if is_terminal else seconds,
                end="" if is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
        if is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _sentence(error: Exception) -> str:
    """The server's own sentence, out of what the client's library wraps around it."""
    text = " ".join(str(error).split())
    text = re.sub(r"^.*?Message: ", "", text)
    text = re.sub(r"^\[request id: \S*\] ", "", text)
    return re.sub(r"^(BadRequest|InternalError): ", "", text)


def _complain(sentence: str) -> None:
    print(f"client.py: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
