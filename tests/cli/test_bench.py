"""client.py --bench: its arithmetic, its loops, and a run against a stand-in for the server."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client
from cli import bench
from cli.bench import Bench, Trace
from cli.parameters import Prompt, parameters_of
from cli.transport import Busy, make_inputs
from tests.support.standin_server import standin


def parse(*arguments: str) -> argparse.Namespace:
    return client.parse_flags(["--bench", *arguments])


def random_traces(num: int = 200) -> list[Trace]:
    """Each with 1 to 20 responses of 1 to 3 tokens."""
    rng = np.random.default_rng(0)
    traces = []
    for started in np.sort(rng.uniform(0, 10, num)):
        times = started + np.cumsum(rng.exponential(0.1, rng.integers(1, 21)))
        responses = [(float(when), int(rng.integers(1, 4))) for when in times]
        traces.append(Trace(float(started), 5, responses, finished=responses[-1][0] + 0.001))
    return traces


def test_figures_are_numpys() -> None:
    traces = random_traces()
    traces[3].finished, traces[4].finished, traces[4].error = None, None, "refused"  # cancelled; failed
    found = bench.figures(traces, 8.0)
    done = [trace for trace in traces if trace.finished is not None]
    ttfts = np.array([trace.responses[0][0] - trace.started for trace in done])
    expected = {"mean": ttfts.mean(), "max": ttfts.max()} | {f"p{p}": np.percentile(ttfts, p) for p in (50, 90, 99)}
    assert found["ttft_ms"] == pytest.approx({name: 1e3 * value for name, value in expected.items()})
    tpots = [
        (trace.responses[-1][0] - trace.responses[0][0]) / sum(tokens for _, tokens in trace.responses[1:])
        for trace in done
        if len(trace.responses) > 1
    ]
    assert found["tpot_ms"]["p90"] == pytest.approx(1e3 * np.percentile(tpots, 90))
    gaps = np.concatenate([np.diff([when for when, _ in trace.responses]) for trace in done])
    assert found["gap_ms"]["p99"] == pytest.approx(1e3 * np.percentile(gaps, 99))
    latencies = [trace.finished - trace.started for trace in done]
    assert found["latency_ms"]["mean"] == pytest.approx(1e3 * np.mean(latencies))
    assert (found["num_requests"], found["num_finished"], found["num_failed"]) == (200, 198, 1)
    assert found["requests_per_s"] == sum(trace.finished <= 8 for trace in done) / 8
    tokens = [tokens for trace in traces for when, tokens in trace.responses if when <= 8]
    assert found["output_tokens_per_s"] == sum(tokens) / 8


def test_a_response_may_have_several_tokens_or_none() -> None:
    trace = Trace(1.0, 5, [(1.5, 0), (2.0, 4), (2.5, 3), (4.0, 2), (4.5, 0)])
    assert (trace.ttft, trace.tpot, trace.num_tokens) == (1.0, pytest.approx(2.0 / 5), 9)
    assert Trace(0.0, 5, [(1.0, 4)]).tpot is None


def test_tokens_of_several_samples_are_counted_without_prompt_and_padding() -> None:
    response = {"output_ids": np.zeros((2, 9)), "sequence_length": np.array([9, 6])}
    assert bench._num_new_tokens(response, num_prompt_tokens=4) == 5 + 2
    assert bench._num_new_tokens({"output_ids": np.zeros((1, 3))}, 4) == 3
    assert bench._num_new_tokens({"sentences": np.array([""])}, 4) == 0


def test_no_request_that_finished_makes_no_figures() -> None:
    found = bench.figures([Trace(0.0, 5, error="refused")], 1.0)
    assert (found["ttft_ms"], found["num_failed"], found["requests_per_s"]) == ({}, 1, 0.0)
    assert "0 of 1 requests finished, 1 failed" in bench.table(found)


def test_arrivals_are_poisson_and_come_again() -> None:
    first, again, other = (list(itertools.islice(bench.arrivals(50.0, seed), 5000)) for seed in (1, 1, 2))
    assert first == again != other
    gaps = np.diff([0.0, *first])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05) and gaps.std() == pytest.approx(1 / 50, rel=0.05)


def test_requests_come_again_and_keep_the_command_lines_parameters() -> None:
    flags = parse("--bench-prompt-len", "3:9", "--bench-output-len", "4:6", "--bench-vocab", "7", "--top-k", "2")
    given = make_inputs(Prompt({}, parameters_of(flags)))
    first, again = (list(itertools.islice(bench.make_requests(flags, given), 300)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert {name: a.tolist() for name, a in one.items()} == {name: a.tolist() for name, a in other.items()}
    assert {len(inputs["input_ids"]) for inputs in first} == set(range(3, 10))
    assert {inputs["request_output_len"].item() for inputs in first} == {4, 5, 6}
    assert {token for inputs in first for token in inputs["input_ids"]} == set(range(7))
    assert all(inputs["runtime_top_k"].item() == 2 and inputs["ignore_eos"].item() for inputs in first)
    keep_eos = make_inputs(Prompt({}, parameters_of(parse("--no-ignore-eos"))))
    assert not next(bench.make_requests(flags, keep_eos))["ignore_eos"].item()


class FakeTransport:
    """Answers with two tokens, `seconds` after it was asked."""

    def __init__(self, seconds: float, failing: Callable[[int], bool] = lambda number: False) -> None:
        self.seconds, self.failing = seconds, failing
        self.running: dict[int, None] = {}
        self.is_stopping = False
        self.most = self.number = 0

    async def attempt(self, inputs: dict[str, np.ndarray], on_response: Callable[[dict[str, Any]], None]) -> None:
        number, self.number = self.number, self.number + 1
        self.running[number] = None
        self.most = max(self.most, len(self.running))
        await asyncio.sleep(self.seconds)
        del self.running[number]
        if self.failing(number):
            raise Busy("the queue is full")
        on_response({"output_ids": np.zeros((1, 2))})
        if self.is_stopping:
            on_response({"output_ids": np.zeros((1, 0)), "finish_reason": np.array([b"cancelled"], dtype=object)})


def run_bench(transport: FakeTransport, *arguments: str) -> Bench:
    flags = parse(*arguments)
    it = Bench(flags, transport, bench.make_requests(flags, {}))
    asyncio.run(it.run())
    return it


def test_a_closed_loop_keeps_so_many_running() -> None:
    transport = FakeTransport(0.02)
    it = run_bench(transport, "--concurrency", "3", "--num-requests", "10")
    assert (transport.most, len(it.traces)) == (3, 10)
    assert all(0.02 <= trace.finished - trace.started < 0.2 for trace in it.traces)


def test_an_open_loop_does_not_wait_for_answers_and_counts_from_the_arrival() -> None:
    transport = FakeTransport(0.5)
    it = run_bench(transport, "--rate", "100", "--num-requests", "20", "--seed", "3")
    assert transport.most == 20
    assert [trace.started for trace in it.traces] == list(itertools.islice(bench.arrivals(100, 3), 20))
    assert all(trace.ttft >= 0.5 for trace in it.traces)


@pytest.mark.parametrize("rate", [[], ["--rate", "40"]])
def test_a_duration_ends_the_sending(rate: list[str]) -> None:
    it = run_bench(FakeTransport(0.05), "--duration", "0.4", "--concurrency", "2", *rate)
    assert all(trace.started < 0.4 and trace.finished for trace in it.traces)
    assert 5 < len(it.traces) < 40 and it.now() < 1.0


def test_failures_and_cancelled_requests_are_no_latencies() -> None:
    it = run_bench(FakeTransport(0.01, lambda number: number % 2 == 0), "--num-requests", "6", "--concurrency", "1")
    assert [trace.error for trace in it.traces] == ["the queue is full", None] * 3
    assert [trace.finished is None for trace in it.traces] == [True, False] * 3

    async def interrupted() -> Bench:
        flags, transport = parse("--rate", "100"), FakeTransport(0.3)
        it = Bench(flags, transport, bench.make_requests(flags, {}))
        asyncio.get_running_loop().call_later(0.1, setattr, transport, "is_stopping", True)
        await it.run()
        return it

    it = asyncio.run(interrupted())
    assert it.traces and all(trace.finished is None and trace.error is None for trace in it.traces)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_bench_measures_a_server(kind: str) -> None:
    flags = "--num-requests 10 --concurrency 5 --bench-output-len 6 --bench-prompt-len 3:5 --temperature 0.5".split()
    with standin() as server:
        server.model.token_s = 0.05
        code, out, _ = server.ask("--bench", *flags, kind=kind)
        assert code == 0
        assert len(server.model.asked) == 12  # 2 of them to warm up
        assert {len(inputs["input_ids"]) for inputs in server.model.asked} <= {3, 4, 5}
    *lines, last = out.splitlines()
    found = json.loads(last)
    assert (found["num_finished"], found["concurrency"], found["bench_prompt_len"]) == (10, 5, [3, 5])
    assert found["parameters"] == {"temperature": [0.5]}
    assert 50 <= found["ttft_ms"]["p50"] < 150 and 50 <= found["tpot_ms"]["p50"] < 100
    assert 300 <= found["latency_ms"]["p50"] < 600
    assert 60 < found["output_tokens_per_s"] < 100  # 5 requests at 20 a second, less what starting takes
    assert lines[1].split()[-5:] == [f"{found['ttft_ms'][name]:.1f}" for name in ("mean", "p50", "p90", "p99", "max")]


def test_bench_without_matplotlib_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "_is_installed", lambda module: False)
    monkeypatch.setattr(sys, "argv", ["client.py", "--bench", "--plot", "x.png"])
    started = time.monotonic()
    assert client.main() == 2
    assert time.monotonic() - started < 1
    assert capsys.readouterr().err == (
        "client.py: --plot needs matplotlib, which is not installed (pip install matplotlib)\n"
    )


def test_plot_draws_a_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for traces in (random_traces(), [Trace(0.0, 5, error="refused")]):
        bench.plot(traces, bench.figures(traces, 8.0), str(tmp_path / "page.png"), "title")
        assert (tmp_path / "page.png").stat().st_size > 10_000
