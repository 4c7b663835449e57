"""The front ends of rank 0, made from their flags."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

from engine.judge import Result, attempt
from serving.flags import LogFlags, PrometheusFlags
from serving.generation import Generator
from serving.openai.flags import OpenAIFlags
from serving.triton.frontend import TritonFlags, TritonModel
from serving.triton.supervisor import TritonSupervisor

if TYPE_CHECKING:  # imported late: the other ranks save its imports
    from serving.metrics import ServerMetrics

_LOG = logging.getLogger("serving")


class FrontEnd(Protocol):
    """Takes requests from clients and hands them to the engine, in threads of its own."""

    @property
    def urls(self) -> list[str]: ...
    def start(self) -> None: ...  # returns once it takes requests; raises RuntimeError where it cannot
    def refuse(self) -> None: ...  # returns once no load balancer takes it for ready; what is in flight goes on
    def stop(self) -> None: ...  # ends it once its clients have their answers; the engine has ended
    def kill(self) -> None: ...  # ends it now, from any thread


@dataclass(frozen=True)
class FrontEndFlags:
    """The flags of all front ends and of what they share. Raises ValueError for ports that are not different."""

    triton: TritonFlags
    openai: OpenAIFlags
    metrics: PrometheusFlags
    log: LogFlags

    def __post_init__(self) -> None:
        ports = self.ports
        for name, port in ports.items():
            other = next(other for other in ports if ports[other] == port)
            if other != name:
                raise ValueError(f"{name} is {port}, which is {other}, too; they must differ")

    @classmethod
    def parts(cls) -> dict[str, type[Any]]:
        """The name of each part → its dataclass."""
        return get_type_hints(cls)

    @property
    def ports(self) -> dict[str, int]:
        """The name of each port's flag → the port."""
        ports = {name: getattr(self.triton, name) for name in ("http_port", "grpc_port", "metrics_port")}
        others = {"openai_port": self.openai.openai_port, "prometheus_port": self.metrics.prometheus_port}
        return ports | {name: port for name, port in others.items() if port}

    def check_free(self) -> None:
        """Raise ValueError for a port that something else holds, or an address that is none of IPv4.

        Triton's own messages are hard to find.
        """
        address = self.triton.http_address
        for name, port in self.ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except socket.gaierror as error:
                    sentence = f"http_address is {address}; it must be an IPv4 address or a host that has one"
                    raise ValueError(f"{sentence} ({error.strerror})") from None
                except OSError as error:
                    reason = os.strerror(error.errno) if error.errno else error
                    sentence = f"{name} is {port}; {address} cannot be bound there ({reason})"
                    raise ValueError(f"{sentence}: end what uses it, or give another port") from None

    def checks(self) -> list[Callable[[], Result]]:
        """What --check asks of the host of rank 0: free ports, and Triton's libraries."""

        def ports() -> str:
            self.check_free()
            listed = ", ".join(f"{name} {port}" for name, port in self.ports.items())
            return f"{listed} are free on {self.triton.http_address}"

        def triton() -> str:
            from serving.triton.check import find_libraries  # PyTriton takes a second

            return find_libraries()

        return [
            lambda: attempt("ports", ports),
            lambda: attempt("Triton", triton),
        ]


def make_front_ends(
    generator: Generator,
    models: Sequence[TritonModel],
    name: str,
    root: str,
    flags: FrontEndFlags,
    metrics: ServerMetrics,
    verbose: bool,
) -> list[FrontEnd]:
    """Triton with its models, and what has a port: the OpenAI API, the metrics alone.

    name: the model's; root: its Hub id or path.
    """
    address = flags.triton.http_address
    front_ends: list[FrontEnd] = [TritonSupervisor(flags.triton, models, verbose, metrics.count_restart)]
    if flags.metrics.prometheus_port:
        from serving.metrics_port import MetricsPort

        front_ends.append(MetricsPort(address, flags.metrics.prometheus_port, metrics.exposition))
    if flags.openai.openai_port:
        from serving.openai.frontend import OpenAIFrontend  # the other ranks save its imports
        from serving.openai.model import ServedModel

        served = ServedModel(name, root, generator.encoder)
        front_ends.append(OpenAIFrontend(flags.openai, address, generator, served, metrics.exposition))
        if not flags.openai.key and not (address == "localhost" or address.startswith("127.")):
            _LOG.warning("all who reach this machine may use the model: give --api-key, or a narrower --http-address")
    return front_ends
