"""Metrics: what known requests on a real engine count, as Prometheus reads it; vLLM's names, labels and buckets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics

from engine.metrics import Progress
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from serving.metrics import ServerMetrics
from tests.support import scrape
from tests.support.engines import finish, make_engine
from tests.support.paper_device import PaperDevice

# Of vLLM's v1/metrics/loggers.py. Ours may have further buckets between them.
TIMES = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
TOKEN_TIMES = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
TTFT = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
LENGTHS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
VLLM_BUCKETS = {
    "time_to_first_token_seconds": [*TTFT, 160, 640, 2560],
    "inter_token_latency_seconds": TOKEN_TIMES,
    "request_time_per_output_token_seconds": TOKEN_TIMES,
    "e2e_request_latency_seconds": TIMES,
    "request_queue_time_seconds": TIMES,
    "request_inference_time_seconds": TIMES,
    "request_prefill_time_seconds": TIMES,
    "request_decode_time_seconds": TIMES,
    "request_prompt_tokens": LENGTHS,
    "request_generation_tokens": LENGTHS,
    "request_max_num_generation_tokens": LENGTHS,
    "request_params_max_tokens": LENGTHS,
    "request_params_n": [1, 2, 5, 10, 20],
    "iteration_tokens_total": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
}


def samples(metrics: ServerMetrics) -> dict[str, float]:
    return scrape.samples(metrics.exposition("")[0].decode())


def test_known_requests_give_known_numbers(converted: Callable[[int], Path]) -> None:
    engine = make_engine(converted(1), max_batch_size=9, max_step_tokens=24, block_size=4)
    engine.observer = metrics = ServerMetrics("m", 256)
    metrics.watch(lambda: engine.load)
    requests = [
        Request([1] * 30, SamplingParams(7)),  # two steps for its prompt
        Request([2] * 5, SamplingParams(10, n=3, top_k=5)),
        Request([3] * 2, SamplingParams(1)),
        Request([4] * 4, SamplingParams(6, beam_width=2)),
    ]
    finish(engine, requests)
    beams = sum(len(output.token_ids) for output in requests[3].outputs)
    cancelled = [Request([5] * 3, SamplingParams(200)), Request([6] * 11, SamplingParams(200))]
    engine.submit(cancelled[0])
    for _ in range(4):
        engine.step()
    engine.submit(cancelled[1])
    found = samples(metrics)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 1)
    assert found["kv_cache_usage_perc"] == pytest.approx(5 / engine.scheduler.blocks.num_blocks)  # 1, then 4 at once
    for request in [*cancelled, cancelled[0], requests[0]]:
        engine.cancel(request)
    finish(engine, [])
    partly = len(cancelled[0].output_ids)
    assert partly == 4 and cancelled[1].output_ids == []

    found = samples(metrics)
    assert found["prompt_tokens_total"] == 30 + 5 + 2 + 4 + 3
    assert found["generation_tokens_total"] == 7 + 30 + 1 + beams + partly
    reasons = {"stop": 0, "length": 4, "abort": 2, "error": 0}
    assert {r: found[f"request_success_total{{finished_reason={r}}}"] for r in reasons} == reasons
    counts = {name: found[f"{name}_count"] for name in VLLM_BUCKETS if name != "iteration_tokens_total"}
    assert counts == {
        "time_to_first_token_seconds": 5,  # the last one was cancelled while it waited
        "inter_token_latency_seconds": 6 + 27 + partly - 1,  # beams have none
        "request_time_per_output_token_seconds": 4,  # one request has a single token
        "e2e_request_latency_seconds": 6,
        "request_queue_time_seconds": 6,
        "request_inference_time_seconds": 5,
        "request_prefill_time_seconds": 5,
        "request_decode_time_seconds": 5,
        "request_prompt_tokens": 6,
        "request_generation_tokens": 6,
        "request_max_num_generation_tokens": 6,
        "request_params_max_tokens": 6,
        "request_params_n": 6,
    }
    assert found["request_prompt_tokens_sum"] == 30 + 5 + 2 + 4 + 3 + 11
    assert found["request_generation_tokens_sum"] == found["generation_tokens_total"]
    assert found["request_max_num_generation_tokens_sum"] == 7 + 10 + 1 + 6 + partly
    assert found["request_params_max_tokens_sum"] == 7 + 10 + 1 + 6 + 200 + 200
    assert found["request_params_n_sum"] == 8
    assert found["request_prompt_tokens_bucket{le=5.0}"] == 4  # 5 itself is in
    assert found["request_prompt_tokens_bucket{le=2.0}"] == 1
    assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0


def test_the_prefix_cache_and_preemptions_are_counted() -> None:
    metrics = ServerMetrics("m", 256)
    scheduler = Scheduler(8, 100, 64, block_size=4, num_blocks=9)
    device = PaperDevice(4)
    names = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens_cached", "num_preemptions", "prompt_tokens")

    def count(*requests: Request) -> list[float]:
        for request in requests:
            scheduler.add(request)
        while (plan := scheduler.schedule()) is not None:
            metrics.count_progress(scheduler.commit(device.execute(plan)))
        found = samples(metrics)
        return [found[f"{name}_total"] for name in names]

    assert count() == [0, 0, 0, 0, 0]
    assert count(Request([1] * 10, SamplingParams(2))) == [10, 0, 0, 0, 10]
    assert count(Request([1] * 13, SamplingParams(2))) == [23, 8, 8, 0, 23]
    assert count(*(Request([i] * 12, SamplingParams(10)) for i in (2, 3))) == [47, 8, 8, 1, 47]


def test_times_add_up_and_are_the_requests_own(converted: Callable[[int], Path]) -> None:
    engine = make_engine(converted(1), max_batch_size=1, block_size=4)
    engine.observer = metrics = ServerMetrics("m", 256)
    requests = [Request([1] * 5, SamplingParams(20)) for _ in range(3)]
    finish(engine, requests)
    found = {name: found for name, found in samples(metrics).items() if name.endswith("_sum")}
    inference = found["request_inference_time_seconds_sum"]
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(
        found["request_queue_time_seconds_sum"] + inference
    )
    assert inference == pytest.approx(
        found["request_prefill_time_seconds_sum"] + found["request_decode_time_seconds_sum"]
    )
    assert found["request_decode_time_seconds_sum"] == pytest.approx(found["inter_token_latency_seconds_sum"])
    waited = [later.times.scheduled - earlier.times.finished for earlier, later in itertools.pairwise(requests)]
    assert all(seconds >= 0 for seconds in waited)  # one at a time


def test_buckets_hold_vllms() -> None:
    metrics = ServerMetrics("m", 2048)
    found = samples(metrics)
    for name, expected in VLLM_BUCKETS.items():
        bounds = [float(key.split("le=")[1][:-1]) for key in found if key.startswith(f"{name}_bucket{{")]
        assert bounds == sorted(bounds) and bounds[-1] == float("inf")
        assert set(expected) <= set(bounds), name
    assert found["inter_token_latency_seconds_bucket{le=0.0005}"] == 0


def test_a_gap_is_counted_for_each_sequence_in_its_bucket() -> None:
    metrics = ServerMetrics("m", 256)
    metrics.count_progress(Progress(num_tokens=259, gaps=[(0.0012, 256), (0.0024, 3)]))
    found = samples(metrics)
    name = "inter_token_latency_seconds"
    bounds = ("0.001", "0.0015", "0.002", "0.003", "+Inf")
    assert [found[f"{name}_bucket{{le={bound}}}"] for bound in bounds] == [0, 256, 256, 259, 259]
    assert found[f"{name}_sum"] == pytest.approx(256 * 0.0012 + 3 * 0.0024)
    assert found["generation_tokens_total"] == 259


def test_front_ends_count_refusals_and_restarts() -> None:
    metrics = ServerMetrics("m", 256)
    metrics.count_refused("triton", "busy")
    metrics.count_refused("triton", "busy")
    metrics.count_refused("openai", "invalid")
    metrics.count_restart()
    found = samples(metrics)
    name = "gpt_server_refused_requests_total"
    assert found[f"{name}{{front_end=triton,reason=busy}}"] == 2
    assert found[f"{name}{{front_end=openai,reason=invalid}}"] == 1
    assert found[f"{name}{{front_end=openai,reason=busy}}"] == 0
    assert found["gpt_server_triton_restarts_total"] == 1


# Prometheus 2 asks for OpenMetrics without a word on escaping, Prometheus 3 with one.
@pytest.mark.parametrize(
    ("accept", "kind", "parse"),
    [
        ("text/html, */*", "text/plain; version=0.0.4", parser.text_string_to_metric_families),
        ("application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.2", "application/openmetrics-text", open_metrics),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.5",
            "application/openmetrics-text",
            open_metrics,
        ),
    ],
    ids=["text", "prometheus 2", "prometheus 3"],
)
def test_names_and_labels_in_both_formats(accept: str, kind: str, parse: Callable) -> None:
    body, content_type = ServerMetrics('an "odd" name', 256).exposition(accept)
    assert content_type.startswith(kind)
    found = [sample for family in parse(body.decode()) for sample in family.samples]
    names = {sample.name for sample in found}
    assert {"vllm:iteration_tokens_total_bucket", "vllm:prompt_tokens_total", "vllm:num_requests_running"} <= names
    assert "process_resident_memory_bytes" in names
    for sample in found:
        assert sample.name.startswith(("vllm:", "gpt_server_", "process_")), sample
        if sample.name.startswith("vllm:"):
            assert (sample.labels["model_name"], sample.labels["engine"]) == ('an "odd" name', "0")
