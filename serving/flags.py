"""Flags of what all front ends share: the log and the metrics. Light to import: every rank reads them."""

from __future__ import annotations

from dataclasses import dataclass

from engine.flags import flag


@dataclass(frozen=True)
class LogFlags:
    """How and how much the server logs."""

    log_format: str = flag("text", "format of the log's lines; json: an object per line", choices=("text", "json"))
    log_prompts: bool = flag(False, "log each request's prompts and outputs as well; without it they are never logged")


@dataclass(frozen=True)
class PrometheusFlags:
    """Where Prometheus finds the server's metrics, beside the OpenAI port."""

    prometheus_port: int = flag(
        0, "port that has the server's metrics alone, at /metrics; 0: off (the OpenAI port has them, too)"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.prometheus_port <= 65535:
            raise ValueError(f"prometheus_port is {self.prometheus_port}; it must be between 0 and 65535")
