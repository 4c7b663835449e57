#!/usr/bin/env python3
"""Memory of a server under mixed load for a long time: resident memory of each process at the start, then at intervals.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 2 --settle-minutes 1

Starts a server of its own (2 ranks, models/stories). 16 clients ask it without a pause, each time in another way: over
OpenAI's API and over Triton, whole and streamed, greedy, sampled, with beams, samples, penalties, words and
log-probabilities; some leave in the middle. The exit code is 1 where a process grew by more than 3 % and 4 MB after the
settling time, or where an answer is not what it must be.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import report
from tests.support.launch import Server, serving
from tests.support.ranks import ROOT

_MODEL = "stories"
_CLIENTS = 16
_GROWTH = 0.03
_NOISE_MB = 4.0  # of a small process, 3 % are a few pages
_LEAVES = 0.1  # share of streams that end before the answer does
_PROMPTS = ("Once upon a time", "The king", "A little girl went", "In the river there was a fish that")
# What a request may ask for, by front end; each is taken with the same chance.
_OPENAI: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "top_k": 20, "n": 3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.2, "stop": ["king"]},
    {"temperature": 0, "logprobs": 3},
)
_TRITON: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "runtime_top_k": 30, "random_seed": 5},
    {"runtime_top_p": 0.8, "repetition_penalty": 1.2},
    {"beam_width": 3},
    {"bad_words": "king"},
)


def main() -> int:
    flags = parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--hf-model-name", str(ROOT / "models/stories"), "--tp", "2", "--output-dir", folder]
        with serving(2, Path(folder, "log"), *options, environment={"OMP_NUM_THREADS": "1"}) as server:
            rows, counts = soak(server, flags)
    return show(flags, rows, counts)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (default: 30)")
    parser.add_argument("--settle-minutes", type=float, default=5.0, help="until memory is compared (default: 5)")
    return parser.parse_args()


def soak(server: Server, flags: argparse.Namespace) -> tuple[list[tuple[float, dict[str, float]]], dict[str, int]]:
    """Rows of (minutes, MB by process): at the start, settled, in the middle, at the end; and counts of outcomes."""
    counts: dict[str, int] = {}
    lock, is_over = threading.Lock(), threading.Event()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while not is_over.is_set():
            outcome = ask(server, draw)
            with lock:
                counts[outcome] = counts.get(outcome, 0) + 1

    began = time.monotonic()
    rows = [(0.0, memory(server))]
    with ThreadPoolExecutor(_CLIENTS) as pool:
        clients = [pool.submit(client, seed) for seed in range(_CLIENTS)]
        try:
            for minutes in (flags.settle_minutes, (flags.settle_minutes + flags.minutes) / 2, flags.minutes):
                time.sleep(max(0.0, began + 60 * minutes - time.monotonic()))
                rows.append((minutes, memory(server)))
        finally:
            is_over.set()
        for future in clients:
            future.result()
    return rows, counts


def ask(server: Server, draw: random.Random) -> str:
    """Make a random request, and check what can be known of its answer; returns the outcome."""
    is_streamed, is_left, num_tokens = draw.random() < 0.5, draw.random() < _LEAVES, draw.randint(1, 40)
    prompts = [draw.choice(_PROMPTS) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.5:
        body = {"prompt": prompts, "max_tokens": num_tokens, "stream": is_streamed, **draw.choice(_OPENAI)}
        url, name = f"http://127.0.0.1:{server.openai}/v1/completions", "OpenAI"
    else:
        body = {"prompts": prompts[0], "request_output_len": num_tokens, **draw.choice(_TRITON)}
        is_streamed = is_streamed and "beam_width" not in body
        kind = "_streaming/generate_stream" if is_streamed else "/generate"
        url, name = f"{server.url()}/v2/models/{_MODEL}{kind}", "Triton"
    try:
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            if is_streamed and is_left:
                answer.readline()
                return f"{name}, left"
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"{name}, ERROR {error.code}: {error.read().decode()[:200]}"
    except (OSError, http.client.HTTPException) as error:
        return f"{name}, ERROR {type(error).__name__}"
    if is_streamed:
        is_whole = ("[DONE]" if name == "OpenAI" else "data:") in text
    elif name == "OpenAI":
        is_whole = len(json.loads(text)["choices"]) == len(prompts) * body.get("n", 1)
    else:
        is_whole = "sentences" in json.loads(text)
    return f"{name}, {'streamed' if is_streamed else 'whole'}" if is_whole else f"{name}, ERROR: {text[:200]}"


def memory(server: Server) -> dict[str, float]:
    """MB of each process of the server, by a name for it; stubs in the order of their models."""
    found: dict[str, float] = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        command = process.cmdline()
        name = process.name()
        if any(word.endswith("server.py") for word in command):
            name = f"rank {process.environ()['PMIX_RANK']}"
        elif "stub" in name:
            name = f"stub of {_MODEL}{'_streaming' * (f'{_MODEL}_streaming' in ' '.join(command))}"
        elif name != "tritonserver":
            continue  # helpers of Python's, such as its resource tracker
        found[name] = found.get(name, 0.0) + process.memory_info().rss / 1e6
    return found


def show(flags: argparse.Namespace, rows: list[tuple[float, dict[str, float]]], counts: dict[str, int]) -> int:
    """Print the tables; 1 where something is wrong."""
    names = sorted(rows[-1][1])
    print(f"{'minutes':>8} " + " ".join(f"{name:>24}" for name in names))
    for minutes, found in rows:
        print(f"{minutes:>8.1f} " + " ".join(f"{found.get(name, 0.0):>24.1f}" for name in names))
    settled, last = rows[1][1], rows[-1][1]
    grown = [name for name in names if last[name] - settled.get(name, 0.0) > max(_NOISE_MB, _GROWTH * last[name])]
    for outcome, count in sorted(counts.items()):
        print(f"{count:>8} {outcome}")
    for name in grown:
        print(f"WRONG: {name} grew by {last[name] - settled.get(name, 0.0):.1f} MB after {rows[1][0]:g} minutes")
    is_wrong = bool(grown) or any("ERROR" in outcome for outcome in counts)
    report(torch.device("cpu"), benchmark="soak", model=_MODEL, minutes=flags.minutes, rows=rows, counts=counts)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
