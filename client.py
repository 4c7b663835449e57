#!/usr/bin/env python3
"""Ask a GPT server for text, or measure its latency and throughput.

    ./client.py                                             # four default prompts to http://localhost:8000
    ./client.py --url http://host:8000 --prompts "Thank you for" "Q: Are you going for lunch?"
    ./client.py --chat --prompts "Who was the first on the moon?" --stream
    ./client.py --prompts "Once upon a time" --stream --output-len 200 --top-k 40 --random-seed 7
    ./client.py --prompts-file prompts.jsonl --output answers.jsonl --concurrency 32
    ./client.py --url grpc://host --bench --rate 4 --duration 60 --plot bench.png

Exit codes: 0 - all answered; 1 - the server refused a prompt or failed; 2 - wrong flags or prompts file; 3 - no
server within --init-timeout-s; 130 - Ctrl-C (143 - SIGTERM): running requests are cancelled on the server, finished
answers are kept in --output.

This file owns flags, signals and exit codes; cli/ has the rest: parameters.py, transport.py, output.py, bench.py. All
requests are asynchronous tasks of one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli.parameters import DEFAULT_PROMPTS, PARAMETERS, Prompt, number, parameters_of, read_prompts
from cli.terminal import complain, sign_of_life

if TYPE_CHECKING:  # modules with numpy are imported late: --help starts fast
    from cli.output import ResultWriter
    from cli.transport import Transport


def main() -> int:
    """Parse flags, ask, print; returns the exit code."""
    flags = parse_flags()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from cli.output import ResultWriter

        try:
            _check_plot(flags)
            prompts = read_prompts(flags)
            writer = ResultWriter(flags) if flags.output else None
        except ValueError as error:
            complain(str(error))
            return 2
        return asyncio.run(run(flags, prompts, writer))
    except KeyboardInterrupt:  # before `run` listens to signals
        return 130


def _check_plot(flags: argparse.Namespace) -> None:
    if flags.plot and not _is_installed("matplotlib"):
        raise ValueError("--plot needs matplotlib, which is not installed (pip install matplotlib)")
    if flags.plot and Path(flags.plot).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot is {flags.plot}; it must end in .png, .pdf or .svg")


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 for a wrong one."""
    parser = argparse.ArgumentParser(
        description="Ask a GPT server for text, or measure its latency and throughput.",
        epilog="exit codes: 0 all answered; 1 a prompt was refused or failed; 2 wrong flags or prompts file; 3 no "
        "server; 130 Ctrl-C (143 SIGTERM): running requests are cancelled on the server, finished answers are kept in "
        "--output; a second Ctrl-C ends at once",
        formatter_class=_Formatter,
    )
    _add_prompt_flags(parser)
    group = parser.add_argument_group("the server")
    group.add_argument("--url", type=_url, default="http://localhost:8000", help="http://host:port, grpc://… or host")
    group.add_argument("--model-name", default="gpt2", help="the model's name in Triton")
    group.add_argument(
        "--api-key", help="the server's key, with which cancelled requests are stopped (or in SERVER_API_KEY)"
    )
    group.add_argument("--init-timeout-s", type=number(float, 0), default=600.0, help="seconds to wait for the server")
    group.add_argument("--inference-timeout-s", type=number(float, 0), default=600.0, help="seconds to wait for a text")
    group.add_argument(
        "--retries",
        type=number(int, 0),
        default=5,
        help="further tries if the server is busy or the connection breaks",
    )
    group = parser.add_argument_group("answers")
    group.add_argument("--stream", action="store_true", help="print text as it is generated, in the prompts' order")
    group.add_argument("--json", action="store_true", help="print one JSON object per prompt (--stream: per piece too)")
    group.add_argument(
        "--output", metavar="FILE.jsonl", help="write one JSON object per prompt there, in the prompts' order"
    )
    group.add_argument("--concurrency", type=number(int, 1), default=8, help="requests at once")
    group = parser.add_argument_group("parameters of each prompt, and their [tensors]")
    for parameter in PARAMETERS:
        parameter.add_flag(group)
    parser.set_defaults(output_len=32)
    _add_bench_flags(parser)
    flags = parser.parse_args(argv)
    if flags.chat and flags.bench:
        parser.error("argument --chat: not allowed with argument --bench")
    if flags.system is not None and not flags.chat:
        parser.error("argument --system: needs --chat")
    if not (flags.prompts or flags.prompts_file or flags.bench):
        flags.prompts = list(DEFAULT_PROMPTS)
    return flags


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts (one of these; default: four short prompts)")
    work = group.add_mutually_exclusive_group()
    work.add_argument("--prompts", nargs="+", metavar="PROMPT", help="texts to continue")
    work.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a text per line; FILE.jsonl: an object per line with prompt, input_ids or messages, and any parameter "
        "below, by its flag's name with underscores or its tensor's name, which goes before the flag; -: texts from "
        "stdin",
    )
    work.add_argument("--bench", action="store_true", help="measure latency and throughput under load")
    group.add_argument(
        "--chat",
        action="store_true",
        help="prompts are a user's messages: the server puts them into the model's chat template, and the text is the "
        "answer alone",
    )
    group.add_argument("--system", metavar="TEXT", help="with --chat: a system message before each prompt")


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "benchmark (--bench)", "random tokens as prompts, --ignore-eos, --concurrency requests at once or --rate"
    )
    group.add_argument("--bench-prompt-len", type=_span, default="128", metavar="A[:B]", help="tokens, drawn evenly")
    group.add_argument("--bench-output-len", type=_span, default="64", metavar="A[:B]", help="tokens, drawn evenly")
    group.add_argument(
        "--bench-vocab",
        type=number(int, 1, 2**31),
        default=256,
        help="prompts' tokens are below it; any model has these",
    )
    group.add_argument("--bench-warmup", type=number(int, 0), default=2, help="requests before, not counted")
    group.add_argument("--rate", type=number(float, 1e-6), help="Poisson arrivals per second, whatever is running")
    group.add_argument("--duration", type=number(float, 1e-3), help="seconds in which requests are sent")
    group.add_argument("--num-requests", type=number(int, 1), help="end after so many; 100 without --duration")
    group.add_argument("--seed", type=number(int, 0), default=0, help="of prompts, lengths and arrivals")
    group.add_argument("--plot", metavar="FILE.png", help="one page of plots (needs matplotlib)")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text} is no A or A:B with 1 <= A <= B")
    return least, most


def _url(text: str) -> str:
    """The URL with its scheme and port."""
    match = re.fullmatch(r"(?:(http|grpc)://)?(\[[^]]+\]|[^/:]+)(?::(\d+))?/?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no http://host:port, grpc://host:port or host")
    scheme = match[1] or "http"
    return f"{scheme}://{match[2]}:{match[3] or {'http': 8000, 'grpc': 8001}[scheme]}"


async def run(flags: argparse.Namespace, prompts: list[Prompt], writer: ResultWriter | None) -> int:
    """Answer the prompts or run the benchmark, to the end or to a signal; returns the exit code."""
    from cli.transport import GrpcConnection, HttpConnection, Transport

    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()

    def on_signal(which: int) -> None:
        if signalled.done():
            os._exit(128 + which)
        signalled.set_result(which)

    for which in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(which, on_signal, which)
    connection = (GrpcConnection if flags.url.startswith("grpc:") else HttpConnection)(flags.url)
    transport = Transport(connection, flags)
    work = asyncio.ensure_future(_work(flags, prompts, transport, writer))
    await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
    is_done = work.done()
    await transport.stop_all()  # no request runs if the work is done
    await asyncio.wait({work}, timeout=0.1)  # time to write the finished answers
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await connection.close()
    return work.result() if is_done else 128 + signalled.result()


async def _work(
    flags: argparse.Namespace, prompts: list[Prompt], transport: Transport, writer: ResultWriter | None
) -> int:
    from cli import bench, output
    from cli.transport import Failure, make_inputs

    with sign_of_life(f"waiting for {transport.model} at {flags.url}"):
        is_ready = await transport.is_ready()
    if not is_ready:
        complain(f"no model {flags.model_name} at {flags.url} within {flags.init_timeout_s:g} s")
        return 3
    try:
        if flags.bench:
            return await bench.run(flags, transport, make_inputs(Prompt({}, parameters_of(flags))))
        return await output.answer(flags, prompts, transport, writer)
    except (Failure, OSError) as error:  # of the benchmark's warm-up; of a file that cannot be written
        complain(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
