"""What Triton serves, and where: its flags and its models. supervisor.py runs it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.flags import flag

if TYPE_CHECKING:  # PyTriton reads the environment as it is imported
    from pytriton.model_config import Tensor


@dataclass(frozen=True)
class TritonFlags:
    """Where Triton listens and how it ends."""

    http_address: str = flag("0.0.0.0", "address on which HTTP, gRPC and metrics listen")
    http_port: int = flag(8000, "HTTP port")
    grpc_port: int = flag(8001, "gRPC port")
    metrics_port: int = flag(8002, "Prometheus metrics port")
    drain_timeout: float = flag(30.0, "seconds that requests in flight have to finish after SIGTERM or SIGINT")
    grpc_certfile: str = flag("", "PEM file of gRPC's TLS certificate; by default gRPC is not encrypted")
    grpc_keyfile: str = flag("", "PEM file of that certificate's private key")
    triton_log: str = flag("", "file for tritonserver's own log; by default it is dropped unless --verbose")

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 1 and 65535")
        if not self.drain_timeout >= 0:
            raise ValueError(f"drain_timeout is {self.drain_timeout}; it must be 0 or more")
        for name, other in (("grpc_certfile", "grpc_keyfile"), ("grpc_keyfile", "grpc_certfile")):
            path = getattr(self, name)
            if path and not os.path.isfile(path):
                raise ValueError(f"{name} is {path!r}, and there is no such file")
            if path and not getattr(self, other):
                raise ValueError(f"{name} is {path!r}; it needs {other}, too")

    @property
    def local_address(self) -> str:
        """The address at which this process itself finds Triton."""
        return "127.0.0.1" if self.http_address == "0.0.0.0" else self.http_address

    def is_listening(self) -> bool:
        """Whether Triton takes connections."""
        try:
            socket.create_connection((self.local_address, self.http_port), 0.2).close()
        except OSError as error:
            return not isinstance(error, ConnectionRefusedError)
        return True


@dataclass(frozen=True)
class TritonModel:
    """A name under which Triton serves a callable of this process.

    infer: an async function that returns a list with one dict of batched arrays for each request; or, decoupled, an
    async generator function that yields such lists, one for each response, of arrays without a batch dimension.
    """

    name: str
    infer: Callable
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    decoupled: bool = False
