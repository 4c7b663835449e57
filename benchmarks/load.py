#!/usr/bin/env python3
"""Load on a server over plain HTTP: Triton's /infer, or the OpenAI API's completions, whole or as streams.

    python benchmarks/load.py --kind openai-stream --url http://localhost:9000 --concurrency 64

A process of its own, so that it shares no interpreter with the server. Random prompts, greedy choice; the last line is
JSON, with the same figures as `client.py --bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import BenchmarkFlags
from cli.bench import Trace, figures
from engine.flags import add_flags

KINDS = ("infer", "openai", "openai-stream")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="openai-stream", help="(default: openai-stream)")
    parser.add_argument("--url", default="http://localhost:9000", help="(default: http://localhost:9000)")
    parser.add_argument("--triton-model", default="benchmark", help="the model's name in Triton (default: benchmark)")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at once (default: 1)")
    parser.add_argument("--num-requests", type=int, default=100, help="requests in all (default: 100)")
    add_flags(parser, BenchmarkFlags, "load", ("input_len", "output_len"), input_len=32)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


async def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Warm up with one request, send the others, `concurrency` at once; the figures of `cli.bench`."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, flags.input_len).tolist() for _ in range(flags.num_requests)]
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(flags.url, timeout=timeout, connector=connector) as session:
        await _send(session, flags, Trace(0.0, 0), prompts[0], 0.0)
        began, traces, waiting = time.perf_counter(), [], iter(prompts)

        async def closed_loop() -> None:
            for prompt in waiting:
                trace = Trace(time.perf_counter() - began, len(prompt))
                traces.append(trace)
                await _send(session, flags, trace, prompt, began)

        await asyncio.gather(*(closed_loop() for _ in range(flags.concurrency)))
        return figures(traces, time.perf_counter() - began)


async def _send(
    session: aiohttp.ClientSession, flags: argparse.Namespace, trace: Trace, prompt: list[int], began: float
) -> None:
    """One request. A piece of a stream counts for one token, and the last piece for those that are left."""
    path, body = _request(flags, prompt)
    async with session.post(path, json=body) as answer:
        answer.raise_for_status()
        if body.get("stream"):
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    is_last = json.loads(line[6:])["choices"][0]["finish_reason"] is not None
                    tokens = flags.output_len - trace.num_tokens if is_last else 1
                    trace.responses.append((time.perf_counter() - began, tokens))
        else:
            await answer.read()
            trace.responses.append((time.perf_counter() - began, flags.output_len))
    trace.finished = time.perf_counter() - began


def _request(flags: argparse.Namespace, prompt: list[int]) -> tuple[str, dict[str, Any]]:
    """The path and the body."""
    if flags.kind != "infer":
        common = {"prompt": prompt, "max_tokens": flags.output_len, "temperature": 0, "ignore_eos": True}
        return "/v1/completions", common | ({"stream": True} if flags.kind == "openai-stream" else {})
    tensors = [
        {"name": "input_ids", "datatype": "INT32", "shape": [1, len(prompt)], "data": prompt},
        {"name": "request_output_len", "datatype": "UINT32", "shape": [1, 1], "data": [flags.output_len]},
        {"name": "ignore_eos", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
    ]
    return f"/v2/models/{flags.triton_model}/infer", {"inputs": tensors}


if __name__ == "__main__":
    main()
