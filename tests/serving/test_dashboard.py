"""The dashboards, ours and vLLM's, find every metric and label that they query."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import parser

from serving.metrics import ServerMetrics

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/gpt-server.json"

# What vLLM's dashboard (examples/observability/prometheus_grafana/grafana.json) queries: name → labels.
_VLLM_HISTOGRAMS = ("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds")
_VLLM_SUMS = (
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_max_num_generation_tokens",
)
VLLM = {
    **{f"vllm:{name}_bucket": {"model_name", "le"} for name in _VLLM_HISTOGRAMS},
    **{f"vllm:{name}_{part}": {"model_name"} for name in _VLLM_HISTOGRAMS for part in ("sum", "count")},
    **{f"vllm:{name}_sum": {"model_name"} for name in _VLLM_SUMS},
    "vllm:prompt_tokens_total": {"model_name"},
    "vllm:generation_tokens_total": {"model_name"},
    "vllm:num_requests_running": {"model_name"},
    "vllm:num_requests_waiting": {"model_name"},
    "vllm:kv_cache_usage_perc": {"model_name"},
    "vllm:request_prompt_tokens_bucket": {"model_name", "le"},
    "vllm:request_generation_tokens_bucket": {"model_name", "le"},
    "vllm:request_success_total": {"model_name", "finished_reason"},
}


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Each sample's name → its labels, of a server that has seen no request."""
    text = ServerMetrics("m", 2048).exposition("")[0].decode()
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def queries() -> Iterator[tuple[str, str]]:
    """(panel, query) of our dashboard, its variables' queries too."""
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def names(query: str) -> list[str]:
    return re.findall(r"\b(?:vllm:|gpt_server_|process_)\w+", query)


@pytest.mark.parametrize("name", VLLM)
def test_vllms_dashboard_finds_its_metrics(name: str, exposed: dict[str, set[str]]) -> None:
    assert VLLM[name] <= exposed[name]


@pytest.mark.parametrize(("panel", "query"), list(queries()))
def test_our_dashboard_finds_its_metrics(panel: str, query: str, exposed: dict[str, set[str]]) -> None:
    found = names(query)
    assert found
    assert [name for name in found if name not in exposed] == []
    selectors = re.findall(r"(\w[\w:]*)\{([^}]*)\}", query)
    wrong = [(name, inner) for name, inner in selectors if not set(re.findall(r"(\w+)=", inner)) <= exposed[name]]
    assert wrong == []
    for labels in re.findall(r"by \(([^)]*)\)", query):
        assert set(labels.split(", ")) <= set.union(*(exposed[name] for name in found))


def test_our_dashboard_shows_what_it_promises() -> None:
    shown = {name for _, query in queries() for name in names(query)}
    assert {
        "vllm:request_success_total",
        "gpt_server_refused_requests_total",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "gpt_server_triton_restarts_total",
    } <= shown
    board = json.loads(DASHBOARD.read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in board["panels"]}) == len(places) == 14
