"""The port that has the metrics alone: over real connections."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from serving import metrics_port
from serving.flags import LogFlags, PrometheusFlags
from serving.metrics import ServerMetrics
from serving.metrics_port import MetricsPort
from serving.openai.flags import OpenAIFlags
from serving.startup import FrontEndFlags
from serving.triton.frontend import TritonFlags
from tests.support.launch import free_ports
from tests.support.scrape import scrape


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsPort]:
    monkeypatch.setattr(metrics_port, "_IDLE_TIMEOUT_S", 0.3)
    metrics = ServerMetrics("m", 256)
    metrics.count_restart()
    port = MetricsPort("127.0.0.1", free_ports(1)[0], metrics.exposition)
    port.start()
    yield port
    port.stop()


def test_it_has_the_metrics_and_nothing_else(port: MetricsPort) -> None:
    assert port.urls == [f"http://127.0.0.1:{port.port}/metrics"]
    assert scrape(port.port)["gpt_server_triton_restarts_total"] == 1
    request = urllib.request.Request(port.urls[0], headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{port.port}/", timeout=10)
    assert error.value.code == 404


def test_a_client_that_says_nothing_is_left(port: MetricsPort) -> None:
    with socket.create_connection(("127.0.0.1", port.port)) as connection:
        connection.settimeout(20)
        started = time.monotonic()
        assert connection.recv(1) == b""  # closed
        assert time.monotonic() - started >= 0.2
        assert scrape(port.port)


def test_a_port_that_is_taken_is_named(port: MetricsPort) -> None:
    with pytest.raises(RuntimeError, match=f"^prometheus_port is {port.port}; it cannot be bound "):
        MetricsPort("127.0.0.1", port.port, lambda accept: (b"", "")).start()


@pytest.mark.parametrize("address", ["::1", "999.1.1.1"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    flags = FrontEndFlags(TritonFlags(http_address=address), OpenAIFlags(), PrometheusFlags(0), LogFlags())
    with pytest.raises(ValueError, match=f"^http_address is {address}; it must be an IPv4 address or a host that has"):
        flags.check_free()


def test_its_port_is_none_of_the_others() -> None:
    with pytest.raises(ValueError, match="^prometheus_port is 65536; it must be between 0 and 65535$"):
        PrometheusFlags(65536)
    triton, openai, log = TritonFlags(), OpenAIFlags(), LogFlags()
    assert "prometheus_port" not in FrontEndFlags(triton, openai, PrometheusFlags(0), log).ports
    with pytest.raises(ValueError, match="^prometheus_port is 8002, which is metrics_port, too; they must differ$"):
        FrontEndFlags(triton, openai, PrometheusFlags(8002), log)
