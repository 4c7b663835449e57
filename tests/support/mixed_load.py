"""Requests of all kinds at once on a server with models/stories, and the memory of its processes."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from tests.support.launch import Server

Row = tuple[float, dict[str, float]]  # minutes, MB of each process
_MODEL = "stories"
_CLIENTS = 16
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


def soak(server: Server, settle_minutes: float, minutes: float) -> tuple[list[Row], dict[str, int]]:
    """Load the server for some minutes; a row at the start, settled, in the middle, at the end; counts of outcomes."""
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
            for moment in (settle_minutes, (settle_minutes + minutes) / 2, minutes):
                time.sleep(max(0.0, began + 60 * moment - time.monotonic()))
                rows.append((moment, memory(server)))
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


def grown(rows: list[Row], share: float, noise_mb: float) -> dict[str, float]:
    """process → MB by which it grew after the settling time, of those that grew by more than both bounds."""
    settled, last = rows[1][1], rows[-1][1]
    growth = {name: last[name] - settled.get(name, 0.0) for name in sorted(last)}
    return {name: megabytes for name, megabytes in growth.items() if megabytes > max(noise_mb, share * last[name])}
