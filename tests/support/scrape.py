"""Reads metrics as Prometheus does, with prometheus_client's parser."""

from __future__ import annotations

import urllib.request

from prometheus_client import parser


def samples(text: str) -> dict[str, float]:
    """name{labels but the model's and the engine's} → value; vLLM's prefix is left out."""
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sorted(sample.labels.items()) if key not in ("model_name", "engine")}
            inner = ",".join(f"{key}={value}" for key, value in labels.items())
            found[sample.name.removeprefix("vllm:") + (f"{{{inner}}}" if inner else "")] = sample.value
    return found


def scrape(port: int) -> dict[str, float]:
    """`samples` of a server on this machine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return samples(answer.read().decode())
