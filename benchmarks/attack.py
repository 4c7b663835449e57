#!/usr/bin/env python3
"""Attacks on a running server, and what other clients see of them: a row for each attack.

    python benchmarks/attack.py
    python benchmarks/attack.py --only fuzz --fuzz 500

Starts a server of its own (2 ranks, models/stories, free ports, 1024 open files as many machines have it). One client
of each front end asks it for a short greedy text again and again, and compares the answer with Hugging Face's. The exit
code is 1 where

- the OpenAI client saw an error or a wrong text,
- the Triton client saw a wrong text, or an error other than during an attack that ends Triton,
- Triton was not back within 15 s,
- rank 0 kept more than 100 MB,
- a fuzzed request got an answer 500 on the OpenAI port, or none at all,
- the job ended.

An attack that ends Triton waits until at most one restart is younger than a minute: after two, the server waits before
the next one on purpose.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bystanders import Bystander, Seen, ask_openai, ask_triton
from benchmarks.common import BenchmarkFlags, report
from benchmarks.fuzzing import fuzz_grpc, fuzz_http
from engine.flags import add_flags
from tests.support import attacks, fuzz
from tests.support.attacks import Target
from tests.support.engines import demo_greedy
from tests.support.launch import Server, serving
from tests.support.ranks import ROOT
from tests.support.scrape import scrape

_MODEL = "stories"
_PROMPT = "Once upon a time there was"
_NEW_TOKENS = 12
_RECOVERY_S = 15.0
_KEPT_MB = 100.0
_WINDOW_S = 62.0  # in which the server restarts Triton twice at once
_ENDS_TRITON = ("kill", "SIGSTOP", "classification", "claimed", "endless body, Triton")  # or leaves it no memory
_SETTLE_S = 2.0  # after an attack: memory goes back, and the clients ask once more
_KEEPS_S = 20.0  # until memory that does not go back is kept

Attack = Callable[[Target], tuple[str, float]]


@dataclass(frozen=True)
class Row:
    """What came of one attack. Memory in MB, tritonserver's with its stubs."""

    attack: str
    outcome: str
    recovery_s: float
    openai: Seen
    triton: Seen
    rank_mb: tuple[float, float]  # rank 0, before and after
    triton_mb: tuple[float, float]
    problems: tuple[str, ...]


def main() -> int:
    flags = parse_flags()
    chosen = [(name, attack) for name, attack in table(flags.fuzz, flags.seed) if flags.only in name]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        options = ["--hf-model-name", str(ROOT / "models/stories"), "--tp", "2", "--output-dir", folder]
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limit))
        with serving(2, log, *options, environment=dict(OMP_NUM_THREADS="1")) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            rows = list(run(server, chosen))
            ended = server.process.poll()
        if flags.log:
            Path(flags.log).write_text(server.text)
    missing = len(chosen) - len(rows)
    if ended is not None:
        print(f"the job ended with code {ended}; {missing} attacks were not made")
    figures = [asdict(row) for row in rows]
    report(torch.device("cpu"), benchmark="attack", model=_MODEL, tp=2, fuzz=flags.fuzz, seed=flags.seed, rows=figures)
    return 1 if ended is not None or missing or any(row.problems for row in rows) else 0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=10_000, help="fuzzed requests on each port (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzed requests (default: 0)")
    add_flags(parser, BenchmarkFlags, "rows", ("only",))
    parser.add_argument("--log", default="", help="file that keeps the server's log")
    return parser.parse_args()


def table(num_fuzzed: int, seed: int) -> list[tuple[str, Attack]]:
    """The attacks, those that end Triton between others, which are the pauses that it needs."""
    from gpt import INPUTS

    triton = fuzz.triton_requests(_MODEL, [tensor.name for tensor in INPUTS])
    on_openai = partial(fuzz_http, fuzz.openai_requests(_MODEL), fuzz.OPENAI_PATHS, seed, num_fuzzed, openai=True)
    on_triton = partial(fuzz_http, triton, fuzz.triton_paths(_MODEL), seed, num_fuzzed, openai=False)
    return [
        ("kill -9 of tritonserver", attacks.kill_triton),
        ("kill -9 of a stub", attacks.kill_stub),
        ("fuzz, OpenAI port", on_openai),
        ("SIGSTOP of tritonserver", attacks.stop_triton),
        ("fuzz, Triton's HTTP port", on_triton),
        ("SIGSTOP of a stub", attacks.stop_stub),
        ("fuzz, Triton's gRPC port", partial(fuzz_grpc, seed, num_fuzzed)),
        ("classification, HTTP", attacks.classify_http),
        ("400 MB prompt, Triton", attacks.large_prompt),
        ("400 MB prompt, OpenAI", attacks.large_openai_prompt),
        ("classification, gRPC", attacks.classify_grpc),
        ("1100 half-open, Triton", partial(attacks.half_open, hold_s=5)),
        ("1100 half-open, OpenAI", partial(attacks.half_open, hold_s=5, openai=True)),
        ("claimed shape [2^31]", partial(attacks.claim_shape, exponent=31)),
        ("1024 × 256 bad words", attacks.bad_words),
        ("claimed shape [2^36]", partial(attacks.claim_shape, exponent=36)),
        ("endless body, OpenAI", partial(attacks.endless_body, openai=True)),
        ("endless body, Triton", attacks.endless_body),
    ]


def run(server: Server, chosen: list[tuple[str, Attack]]) -> Iterator[Row]:
    """Make the attacks and print their rows; ends early where the job does."""
    target = attacks.target_of(server, _MODEL)
    text = demo_greedy(_PROMPT, _NEW_TOKENS)
    bystanders = (
        Bystander(partial(ask_openai, server.openai, _PROMPT, _NEW_TOKENS), text),
        Bystander(partial(ask_triton, server.http, _MODEL, _PROMPT, _NEW_TOKENS), text),
    )
    restarts: list[float] = []
    try:
        time.sleep(_SETTLE_S)
        for name, attack in chosen:
            if name.startswith(_ENDS_TRITON):
                wait_for_quiet(restarts)
            before = num_restarts(server)
            row = made(name, attack, target, bystanders)
            if server.process.poll() is not None:
                return
            restarts += [time.monotonic()] * (num_restarts(server) - before)
            show(row)
            yield row
    finally:
        for bystander in bystanders:
            bystander.stop()


def made(name: str, attack: Attack, target: Target, bystanders: tuple[Bystander, Bystander]) -> Row:
    """Make one attack."""
    rank = psutil.Process(target.triton.ppid())
    before = rank.memory_info().rss / 1e6, attacks.resident(target.triton) / 1e6
    for bystander in bystanders:
        bystander.take()
    problems = []
    try:
        outcome, seconds = attack(target)
    except Exception as error:  # the table goes on
        outcome, seconds = f"{type(error).__name__}: {error}"[:60], 0.0
        problems.append("the attack failed")
    recovered = time.monotonic()
    time.sleep(_SETTLE_S)
    while rank.memory_info().rss / 1e6 > before[0] + _KEPT_MB and time.monotonic() < recovered + _KEEPS_S:
        time.sleep(0.5)
    seen_openai, seen_triton = (bystander.take() for bystander in bystanders)
    after = rank.memory_info().rss / 1e6, attacks.resident(target.triton) / 1e6
    checks = {
        "OpenAI client": seen_openai.num_errors or seen_openai.num_wrong or not seen_openai.num_right,
        "Triton client": seen_triton.num_wrong or not seen_triton.num_right,
        "Triton's errors": seen_triton.last_error > (recovered if name.startswith(_ENDS_TRITON) else 0.0),
        "recovery": seconds > _RECOVERY_S,
        "memory": after[0] > before[0] + _KEPT_MB,
        "outcome": "BAD" in outcome or outcome in ("not noticed", "locked out"),
    }
    problems += [problem for problem, is_there in checks.items() if is_there]
    pairs = (before[0], after[0]), (before[1], after[1])
    return Row(name, outcome, seconds, seen_openai, seen_triton, *pairs, tuple(problems))


def show(row: Row) -> None:
    """Print a row."""
    (rank_before, rank_after), (triton_before, triton_after) = row.rank_mb, row.triton_mb
    print(
        f"{row.attack:<25} {row.outcome:<34} back {row.recovery_s:5.1f} s | OpenAI {row.openai} | Triton {row.triton}"
        f" | rank 0 {rank_before:.0f} → {rank_after:.0f} MB, Triton {triton_before:.0f} → {triton_after:.0f} MB"
        + "".join(f" | WRONG: {problem}" for problem in row.problems),
        flush=True,
    )


def wait_for_quiet(restarts: list[float]) -> None:
    """Wait until a restart now would be at most the second one within a minute."""
    if len(restarts) >= 2:
        time.sleep(max(0.0, restarts[-2] + _WINDOW_S - time.monotonic()))


def num_restarts(server: Server) -> int:
    """Restarts of Triton so far."""
    return int(scrape(server.openai)["gpt_server_triton_restarts_total"])


if __name__ == "__main__":
    sys.exit(main())
