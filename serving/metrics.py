"""Metrics for Prometheus, under vLLM's names, so that dashboards made for vLLM work.

The engine's thread counts in plain numbers; a scrape turns them into text. Only that thread writes the engine's
numbers, so they need no lock. A scrape during a step may see a histogram's sum a moment before its count.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics

from engine.metrics import Load, Progress
from engine.request import CANCELLED, END_ID, LENGTH, SHUTDOWN, STOP, Request

_TO_FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75]
_TO_FIRST_TOKEN += [1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560]
_PER_TOKEN = [0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075]  # vLLM has none below 0.01
_PER_TOKEN += [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
_PER_REQUEST = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2]  # vLLM has none below 0.3
_PER_REQUEST += [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
_STEP_TOKENS = [1, *(2**exponent for exponent in range(3, 15))]

# vLLM's finished_reason of each of the engine's; a request has the first of these that one of its outputs has
_REASONS = {SHUTDOWN: "abort", CANCELLED: "abort", LENGTH: "length", STOP: "stop", END_ID: "stop"}
_REASON_LABELS = ("stop", "length", "abort", "error")
REFUSALS = ("invalid", "busy", "stopping", "error")
_FRONT_ENDS = ("triton", "openai")  # a counter that begins at 0 shows its first increase

_LABELS = ("model_name", "engine")


class Histogram:
    """Counts values in buckets; bounds are inclusive, as Prometheus has them. One thread writes."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.text = text
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value that came `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def metric(self, labels: tuple[str, ...]) -> Metric:
        """What a scrape gets."""
        total, buckets = 0, []
        for bound, count in zip((*map(float, self.bounds), "+Inf"), self.counts[:], strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        family = HistogramMetricFamily(f"vllm:{self.name}", self.text, labels=_LABELS)
        family.add_metric(labels, buckets, self.sum)
        return family


class ServerMetrics:
    """All numbers of one server: an engine.metrics.Observer, and what the front ends count.

    max_seq_len: tokens of the longest sequence served, the end of the buckets of lengths.
    """

    def __init__(self, model_name: str, max_seq_len: int) -> None:
        self._labels = (model_name, "0")
        self._load: Callable[[], Load] = lambda: Load(0, 0, 0.0)
        self._num_prompt_tokens = self._num_generation_tokens = 0
        self._num_preemptions = self._num_queried = self._num_hit = 0
        self._num_finished = dict.fromkeys(_REASON_LABELS, 0)
        self._num_restarts = 0
        self._num_refused = Counter({(name, reason): 0 for name in _FRONT_ENDS for reason in REFUSALS})
        self._lock = threading.Lock()  # of the last two
        self._add_histograms(_lengths(max_seq_len))
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _add_histograms(self, lengths: Sequence[float]) -> None:
        self._histograms: list[Histogram] = []

        def add(name: str, text: str, bounds: Sequence[float]) -> Histogram:
            self._histograms.append(Histogram(name, text, bounds))
            return self._histograms[-1]

        self._step_tokens = add("iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKENS)
        self._to_first_token = add(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TO_FIRST_TOKEN
        )
        self._gaps = add("inter_token_latency_seconds", "Between two tokens of a sequence.", _PER_TOKEN)
        self._per_token = add(
            "request_time_per_output_token_seconds", "A request's time per token after the first.", _PER_TOKEN
        )
        self._total = add("e2e_request_latency_seconds", "From arrival to end.", _PER_REQUEST)
        self._queued = add("request_queue_time_seconds", "From arrival to the first step.", _PER_REQUEST)
        self._inference = add("request_inference_time_seconds", "From the first step to the last token.", _PER_REQUEST)
        self._prefill = add("request_prefill_time_seconds", "From the first step to the first token.", _PER_REQUEST)
        self._decode = add("request_decode_time_seconds", "From the first to the last token.", _PER_REQUEST)
        self._prompt_tokens = add("request_prompt_tokens", "Tokens of a prompt.", lengths)
        self._generated = add("request_generation_tokens", "Tokens of all outputs of a request.", lengths)
        self._longest = add("request_max_num_generation_tokens", "Tokens of a request's longest output.", lengths)
        self._max_tokens = add("request_params_max_tokens", "Tokens that a request allows an output.", lengths)
        self._n = add("request_params_n", "Samples that a request asks for.", [1, 2, 5, 10, 20])

    def watch(self, load: Callable[[], Load]) -> None:
        """Ask `load` for the gauges at each scrape, from the scrape's thread."""
        self._load = load

    def count_plan(self, num_tokens: int) -> None:
        """As engine.metrics.Observer has it."""
        self._step_tokens.observe(num_tokens)

    def count_progress(self, progress: Progress) -> None:
        """As engine.metrics.Observer has it."""
        self._num_generation_tokens += progress.num_tokens
        self._num_preemptions += progress.num_preempted
        self._num_queried += progress.num_queried
        self._num_hit += progress.num_hit
        for seconds, count in progress.gaps:
            self._gaps.observe(seconds, count)
        for request in progress.started:
            self._num_prompt_tokens += len(request.prompt_ids)
            self._to_first_token.observe(request.times.first_token - request.times.arrived)

    def count_finished(self, request: Request) -> None:
        """As engine.metrics.Observer has it."""
        times, sampling = request.times, request.sampling
        lengths = [len(output.token_ids) for output in request.outputs]
        reasons = [output.finish_reason for output in request.outputs]
        self._num_finished[next((label for reason, label in _REASONS.items() if reason in reasons), "error")] += 1
        self._total.observe(times.finished - times.arrived)
        self._queued.observe((times.scheduled or times.finished) - times.arrived)
        if times.first_token:
            decode_s = times.last_token - times.first_token
            self._prefill.observe(times.first_token - times.scheduled)
            self._decode.observe(decode_s)
            self._inference.observe(times.last_token - times.scheduled)
            if max(lengths) > 1:
                self._per_token.observe(decode_s / (max(lengths) - 1))
        if sampling.beam_width > 1:
            self._num_generation_tokens += sum(lengths)
        self._prompt_tokens.observe(len(request.prompt_ids))
        self._generated.observe(sum(lengths))
        self._longest.observe(max(lengths))
        self._max_tokens.observe(sampling.max_new_tokens)
        self._n.observe(sampling.n)

    def count_refused(self, front_end: str, reason: str) -> None:
        """Count a request that a front end refused. reason: one of REFUSALS."""
        with self._lock:
            self._num_refused[front_end, reason] += 1

    def count_restart(self) -> None:
        """Count a restart of Triton."""
        with self._lock:
            self._num_restarts += 1

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's call for all numbers but the process's."""
        load = self._load()
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", load.num_running),
            ("num_requests_waiting", "Requests that wait for a place.", load.num_waiting),
            ("kv_cache_usage_perc", "Share of the key-value cache's blocks in use, 0 to 1.", load.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens, computed or found in the prefix cache.", self._num_prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the prefix cache.", self._num_hit),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", self._num_queried),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", self._num_hit),
            ("generation_tokens", "Tokens generated.", self._num_generation_tokens),
            ("num_preemptions", "Times that a request lost its blocks and was computed again.", self._num_preemptions),
        ):
            yield self._counter(name, text, value)
        labels = (*_LABELS, "finished_reason")
        success = CounterMetricFamily("vllm:request_success", "Requests that ended.", labels=labels)
        for reason, count in self._num_finished.items():
            success.add_metric((*self._labels, reason), count)
        yield success
        for histogram in self._histograms:
            yield histogram.metric(self._labels)
        yield from self._own()

    def _counter(self, name: str, text: str, value: int) -> Metric:
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        counter.add_metric(self._labels, value)
        return counter

    def _own(self) -> Iterator[Metric]:
        """Numbers that vLLM does not have."""
        with self._lock:
            num_refused, num_restarts = dict(self._num_refused), self._num_restarts
        model_name = self._labels[:1]
        refused = CounterMetricFamily(
            "gpt_server_refused_requests",
            f"Requests that a front end refused, by reason: {', '.join(REFUSALS)}.",
            labels=("model_name", "front_end", "reason"),
        )
        for key, count in num_refused.items():
            refused.add_metric((*model_name, *key), count)
        yield refused
        restarts = CounterMetricFamily("gpt_server_triton_restarts", "Restarts of Triton.", labels=("model_name",))
        restarts.add_metric(model_name, num_restarts)
        yield restarts

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text for a client's Accept header: (body, content type)."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # of a header such as version=x
            encode, content_type = choose_encoder("")
        if content_type.startswith("application/openmetrics-text"):
            # Its default escaping turns the colon of vLLM's names into "_" (prometheus/client_python, issue 1177).
            body = openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8)
            return body, openmetrics.CONTENT_TYPE_LATEST
        return encode(self.registry), content_type


def _lengths(max_seq_len: int) -> list[float]:
    """1, 2, 5, 10, … up to the longest sequence."""
    series = (factor * 10**exponent for exponent in range(len(str(max_seq_len))) for factor in (1, 2, 5))
    return [length for length in series if length <= max_seq_len]
