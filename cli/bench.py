"""Latency and throughput of a running server under load: `client.py --bench`.

It builds tensors by name and sends them through a Transport; it knows neither the engine nor Triton. A closed loop
keeps --concurrency requests running. An open loop (--rate) sends requests at Poisson arrivals, independent of the
running ones, and counts time from the arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cli.terminal import sign_of_life
from cli.transport import Transport

_DEFAULT_NUM_REQUESTS = 100
_PERCENTILES = (50, 90, 99)
_KINDS = {  # of latency: the table's name for it
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token, ms",
    "gap_ms": "between responses, ms",
    "latency_ms": "whole answer, ms",
}


@dataclass
class Trace:
    """One request. Times are seconds since the benchmark began; responses: (time, new tokens)."""

    started: float
    num_prompt_tokens: int
    responses: list[tuple[float, int]] = field(default_factory=list)
    finished: float | None = None  # None: failed, or cancelled
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.responses)

    @property
    def latency(self) -> float:
        """Seconds from the start to the end of a finished request."""
        assert self.finished is not None, self
        return self.finished - self.started

    @property
    def ttft(self) -> float:
        """Seconds to the response with the first token."""
        return next(when for when, tokens in self.responses if tokens) - self.started

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first response's tokens; None if no more came."""
        times = [(when, tokens) for when, tokens in self.responses if tokens]
        num_later = sum(tokens for _, tokens in times[1:])
        return (times[-1][0] - times[0][0]) / num_later if num_later else None


def make_requests(flags: argparse.Namespace, given: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Endless inputs: random tokens below --bench-vocab, uniform random lengths; the same --seed gives the same inputs.

    given: tensors of the command line, part of each request.
    """
    rng = np.random.default_rng([flags.seed, 0])
    (prompt_least, prompt_most), (output_least, output_most) = flags.bench_prompt_len, flags.bench_output_len
    while True:
        prompt_len = rng.integers(prompt_least, prompt_most, endpoint=True)
        output_len = rng.integers(output_least, output_most, endpoint=True)
        yield {
            "ignore_eos": np.array([True]),
            **given,
            "input_ids": rng.integers(0, flags.bench_vocab, prompt_len, dtype=np.int32),
            "request_output_len": np.array([output_len], dtype=np.uint32),
        }


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds, a Poisson process of `rate` per second; the same seed gives the same times."""
    rng = np.random.default_rng([seed, 1])
    now = 0.0
    while True:
        now += rng.exponential(1 / rate)
        yield now


class Bench:
    """Sends the requests and keeps their traces."""

    def __init__(
        self, flags: argparse.Namespace, transport: Transport, requests: Iterator[dict[str, np.ndarray]]
    ) -> None:
        self.flags = flags
        self.transport = transport
        self.requests = requests
        self.traces: list[Trace] = []
        self.began = time.perf_counter()
        self._limit = flags.num_requests or (None if flags.duration else _DEFAULT_NUM_REQUESTS)

    def now(self) -> float:
        """Seconds since the benchmark began."""
        return time.perf_counter() - self.began

    @property
    def progress(self) -> str:
        num_over = sum(trace.finished is not None or trace.error is not None for trace in self.traces)
        total = f" of {self._limit}" if self._limit else ""
        return f"benchmark: {num_over}{total} requests over, {len(self.transport.running)} running"

    async def run(self) -> None:
        """Send requests, and wait for the last one to end."""
        if self.flags.rate:
            await self._open_loop(self.flags.rate)
        else:
            await asyncio.gather(*(self._closed_loop() for _ in range(self.flags.concurrency)))

    async def _closed_loop(self) -> None:
        while not self._is_over(self.now()):
            await self._send(self.now())

    async def _open_loop(self, rate: float) -> None:
        tasks = []
        for arrival in arrivals(rate, self.flags.seed):
            if self._is_over(arrival):
                break
            await asyncio.sleep(arrival - self.now())
            if self.transport.is_stopping:
                break
            tasks.append(asyncio.ensure_future(self._send(arrival)))
            await asyncio.sleep(0)  # its trace is there before the next one is counted
        await asyncio.gather(*tasks)

    def _is_over(self, start: float) -> bool:
        is_late = self.flags.duration is not None and start >= self.flags.duration
        return self.transport.is_stopping or is_late or (self._limit is not None and len(self.traces) >= self._limit)

    async def _send(self, start: float) -> None:
        inputs = next(self.requests)
        trace = Trace(start, len(inputs["input_ids"]))
        self.traces.append(trace)
        reasons: list[Any] = []

        def on_response(response: dict[str, np.ndarray]) -> None:
            trace.responses.append((self.now(), _num_new_tokens(response, trace.num_prompt_tokens)))
            reasons.extend(np.ravel(response.get("finish_reason", ())))

        try:
            await self.transport.attempt(inputs, on_response)
        except Exception as error:  # a Failure; anything else counts as one, too
            trace.error = str(error) or type(error).__name__
            return
        if not trace.num_tokens:
            trace.error = "an answer without tokens"
        elif not {"cancelled", b"cancelled"} & set(reasons):
            trace.finished = self.now()


def _num_new_tokens(response: dict[str, np.ndarray], num_prompt_tokens: int) -> int:
    """Count new tokens: one sequence comes as new tokens only, several sequences with prompt and padding."""
    output_ids = response.get("output_ids", np.zeros((1, 0)))
    if len(output_ids) == 1:
        return output_ids.size
    return int(response["sequence_length"].sum()) - len(output_ids) * num_prompt_tokens


async def run(flags: argparse.Namespace, transport: Transport, given: dict[str, np.ndarray]) -> int:
    """Warm up, send the requests, report; returns the exit code. given: tensors of the command line."""
    requests = make_requests(flags, given)
    warmup = [transport.attempt(next(requests), lambda response: None) for _ in range(flags.bench_warmup)]
    with sign_of_life("warming up"):
        await asyncio.gather(*warmup)
    bench = Bench(flags, transport, make_requests(flags, given))
    with sign_of_life(lambda: bench.progress):
        await bench.run()
    # Latency counts all requests sent within --duration, to their ends; throughput counts the duration alone.
    seconds = flags.duration if flags.duration and not transport.is_stopping else bench.now()
    found = figures(bench.traces, min(seconds, bench.now()))
    print(table(found))
    for error, count in collections.Counter(trace.error for trace in bench.traces if trace.error).items():
        print(f"failed: {count} × {error}")
    print(json.dumps({"benchmark": "client", **_configuration(flags, given), **found}))
    if flags.plot:
        plot(bench.traces, found, flags.plot, f"{flags.model_name} at {flags.url}, {_describe(flags)}")
    return 0 if found["num_finished"] and not found["num_failed"] else 1


def figures(traces: list[Trace], seconds: float) -> dict[str, Any]:
    """Latencies of the requests that finished; throughput of the first `seconds`, those that failed included."""
    done = [trace for trace in traces if trace.finished is not None]
    per_kind = {
        "ttft_ms": [trace.ttft for trace in done],
        "tpot_ms": [trace.tpot for trace in done if trace.tpot is not None],
        "gap_ms": [b - a for trace in done for (a, _), (b, _) in itertools.pairwise(trace.responses)],
        "latency_ms": [trace.latency for trace in done],
    }
    num_tokens = sum(tokens for trace in traces for when, tokens in trace.responses if when <= seconds)
    return {
        "num_requests": len(traces),
        "num_finished": len(done),
        "num_failed": sum(trace.error is not None for trace in traces),
        "seconds": seconds,
        "requests_per_s": sum(trace.finished is not None and trace.finished <= seconds for trace in done) / seconds,
        "output_tokens_per_s": num_tokens / seconds,
        **{kind: summary(values) for kind, values in per_kind.items()},
    }


def summary(values: list[float]) -> dict[str, float]:
    """Mean, percentiles and maximum, in thousandths; empty without values."""
    if not values:
        return {}
    points = {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
    found = {"mean": float(np.mean(values)), **points, "max": max(values)}
    return {name: 1e3 * value for name, value in found.items()}


def table(found: dict[str, Any]) -> str:
    """The figures as lines of text."""
    columns = ["mean", *(f"p{p}" for p in _PERCENTILES), "max"]
    lines = [f"{'':<28}" + "".join(f"{column:>10}" for column in columns)]
    for kind, name in _KINDS.items():
        cells = (f"{found[kind][column]:>10.1f}" if found[kind] else f"{'-':>10}" for column in columns)
        lines.append(f"{name:<28}" + "".join(cells))
    lines.append(
        f"{found['requests_per_s']:.2f} requests/s, {found['output_tokens_per_s']:.1f} output tokens/s "
        f"in {found['seconds']:.1f} s; {found['num_finished']} of {found['num_requests']} requests finished, "
        f"{found['num_failed']} failed"
    )
    return "\n".join(lines)


def _configuration(flags: argparse.Namespace, given: dict[str, np.ndarray]) -> dict[str, Any]:
    names = "url model_name bench_prompt_len bench_output_len bench_vocab rate concurrency duration num_requests seed"
    chosen = {name: getattr(flags, name) for name in names.split()}
    if flags.rate:
        del chosen["concurrency"]
    values = {name: a.tolist() for name, a in given.items() if a.dtype != object and name != "request_output_len"}
    return {**chosen, "parameters": values}


def _describe(flags: argparse.Namespace) -> str:
    load = f"{flags.rate:g} requests/s (Poisson)" if flags.rate else f"{flags.concurrency} requests at once"
    spans = ("–".join(map(str, dict.fromkeys(span))) for span in (flags.bench_prompt_len, flags.bench_output_len))
    return f"{load}, {next(spans)} tokens in, {next(spans)} out"


def plot(traces: list[Trace], found: dict[str, Any], path: str, title: str) -> None:
    """One page: histograms of the latencies, and throughput and running requests over time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    done = [trace for trace in traces if trace.finished is not None]
    tpots = [(trace, trace.tpot) for trace in done if trace.tpot is not None]
    values = {
        "ttft_ms": [trace.ttft for trace in done],
        "tpot_ms": [tpot for _, tpot in tpots],
        "latency_ms": [trace.latency for trace in done],
    }
    for panel, (kind, seconds) in zip(axes[0], values.items(), strict=True):
        panel.hist(1e3 * np.array(seconds), bins=40, color="#8fb3d9")
        for name, color in zip(("p50", "p90", "p99"), ("#1b7837", "#e08214", "#b2182b"), strict=True):
            when = found[kind].get(name, 0.0)
            panel.axvline(when, color=color, label=f"{name}: {when:.1f} ms")
        panel.set(title=_KINDS[kind], xlabel="ms", ylabel="requests")
        panel.legend()
    _plot_time(axes[1], traces, done)
    figure.suptitle(
        f"{title}\n{found['requests_per_s']:.2f} requests/s, {found['output_tokens_per_s']:.0f} output tokens/s; "
        f"{found['num_finished']} of {found['num_requests']} requests finished, {found['num_failed']} failed"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_time(panels: Any, traces: list[Trace], done: list[Trace]) -> None:
    """Throughput, requests running and time to first token, over the time of the benchmark."""
    events = np.array([response for trace in traces for response in trace.responses]).reshape(-1, 2)
    end = max([*events[:, 0], 1e-3])
    edges = np.linspace(0, end, 61)
    width = edges[1]
    tokens, _ = np.histogram(events[:, 0], edges, weights=events[:, 1])
    panels[0].stairs(tokens / width, edges, fill=True, color="#8fb3d9")
    panels[0].set(title="throughput", ylabel=f"output tokens/s, in {1e3 * width:.0f} ms")
    starts = np.array([trace.started for trace in traces])
    ends = np.array([trace.responses[-1][0] if trace.responses else trace.started for trace in traces])
    firsts = np.array([trace.started + trace.ttft if trace.num_tokens else end for trace in traces])
    times = np.linspace(0, end, 600)
    running = (starts <= times[:, None]) & (times[:, None] < ends)
    waiting = running & (times[:, None] < firsts)
    panels[1].fill_between(times, running.sum(1), color="#8fb3d9", label="generating")
    panels[1].fill_between(times, waiting.sum(1), color="#e08214", label="before their first token")
    panels[1].set(title="requests at once", ylabel="requests")
    panels[1].legend()
    sizes = panels[2].scatter(
        [trace.started for trace in done],
        [1e3 * trace.ttft for trace in done],
        c=[trace.num_prompt_tokens for trace in done],
        s=12,
    )
    panels[2].figure.colorbar(sizes, ax=panels[2], label="prompt tokens")
    panels[2].set(title="time to first token, by start", ylabel="ms", ylim=(0, None))
    for panel in panels:
        panel.set_xlabel("seconds")
