"""Starts, watches and ends Triton Inference Server from rank 0, through PyTriton."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.flags import flag

if TYPE_CHECKING:  # PyTriton reads the environment as it is imported
    from pytriton.model_config import Tensor

_LOG = logging.getLogger("serving")
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "OPAL_", "PMI_", "ORTE_")
_BIND_TRIES = 3  # PyTriton's hand-shake socket loses a race now and then
_MAX_PROMPTS = 1024  # prompts in one Triton request


@dataclass(frozen=True)
class TritonFlags:
    """Where Triton listens and how it ends."""

    http_address: str = flag("0.0.0.0", "address on which HTTP, gRPC and metrics listen")
    http_port: int = flag(8000, "HTTP port")
    grpc_port: int = flag(8001, "gRPC port")
    metrics_port: int = flag(8002, "Prometheus metrics port")
    drain_timeout: float = flag(30.0, "seconds that requests in flight have to finish after SIGTERM or SIGINT")
    triton_log: str = flag("", "file for tritonserver's own log; by default it is dropped unless --verbose")

    def __post_init__(self) -> None:
        ports = (self.http_port, self.grpc_port, self.metrics_port)
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 1 and 65535")
        if len(set(ports)) < len(ports):
            raise ValueError(f"http_port, grpc_port and metrics_port are {ports}; they must differ")
        if not self.drain_timeout >= 0:
            raise ValueError(f"drain_timeout is {self.drain_timeout}; it must be 0 or more")

    def check_free(self) -> None:
        """Raise ValueError for a port that something else holds: Triton's own message is hard to find."""
        for name in ("http_port", "grpc_port", "metrics_port"):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.http_address, getattr(self, name)))
                except OSError as error:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; {self.http_address} cannot be bound there "
                        f"({os.strerror(error.errno) if error.errno else error})"
                    ) from None


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


class TritonFrontend:
    """One tritonserver with its models, bound to callables of this process."""

    def __init__(self, flags: TritonFlags, verbose: bool) -> None:
        self.flags = flags
        self.verbose = verbose
        self._triton: Any = None  # pytriton.triton.Triton, which is imported late

    @property
    def urls(self) -> list[str]:
        host = socket.gethostname() if self.flags.http_address == "0.0.0.0" else self.flags.http_address
        return [f"http://{host}:{self.flags.http_port}", f"grpc://{host}:{self.flags.grpc_port}"]

    def start(self, models: Sequence[TritonModel]) -> None:
        """Start tritonserver and bind the models. Call from the main thread: tritonserver ends with its thread."""
        _prepare_environment()
        from serving.triton.proxy import install

        install()
        for attempt in range(1, _BIND_TRIES + 1):
            try:
                self._start_once(models)
                return
            except Exception as error:  # PyTriton raises many kinds; the last one is the user's
                self.kill()
                if attempt == _BIND_TRIES:
                    raise RuntimeError(f"Triton did not start: {' '.join(str(error).split())[:500]}") from error
                _LOG.warning("Triton did not start (try %d of %d), once more", attempt, _BIND_TRIES)

    def _start_once(self, models: Sequence[TritonModel]) -> None:
        from pytriton.model_config import ModelConfig
        from pytriton.triton import Triton, TritonConfig

        flags = self.flags
        log_file = Path(flags.triton_log or ("/dev/stderr" if self.verbose else os.devnull))
        config = TritonConfig(
            http_address=flags.http_address,
            http_port=flags.http_port,
            grpc_address=flags.http_address,
            grpc_port=flags.grpc_port,
            metrics_address=flags.http_address,
            metrics_port=flags.metrics_port,
            allow_gpu_metrics=Path("/dev/nvidiactl").exists(),  # else Triton complains that it finds no GPU
            exit_timeout_secs=10,  # also how long clients of a rank 0 that dies may wait for their error
            log_verbose=0,
            log_file=log_file,
        )
        with _launcher_free_environment():
            self._triton = Triton(config=config)
            # No dynamic batcher: requests are batched by the engine, in flight.
            batched = ModelConfig(max_batch_size=_MAX_PROMPTS, batcher=None)
            streaming = ModelConfig(batching=False, decoupled=True)
            for model in models:
                config = streaming if model.decoupled else batched
                self._triton.bind(model.name, model.infer, model.inputs, model.outputs, config=config, strict=False)
            self._triton.run()

    def is_alive(self) -> bool:
        return self._triton is not None and self._triton.is_alive()

    def stop(self) -> None:
        """End tritonserver once it has sent what it has."""
        if self._triton is not None:
            self._triton.stop()

    def kill(self) -> None:
        """End tritonserver now, from any thread."""
        command = getattr(getattr(self._triton, "_triton_server", None), "_tritonserver_running_cmd", None)
        if command is not None:
            with contextlib.suppress(OSError):
                os.kill(command.pid, signal.SIGKILL)
        workspace = getattr(self._triton, "_workspace", None)
        if workspace is not None:  # a copy of tritonserver, 22 MB
            with contextlib.suppress(OSError):
                workspace.clean()


def _prepare_environment() -> None:
    """Set the variables that PyTriton and Triton's Python stub read. RuntimeError where the stub lacks its library."""
    os.environ["PYTRITON_NO_TENSORSTORE"] = "1"  # small tensors travel in the message: quicker, fewer traps
    library = f"libpython{sysconfig.get_python_version()}.so.1.0"
    folder = next((folder for folder in _library_folders() if (folder / library).exists()), None)
    if folder is None:
        raise RuntimeError(
            f"Triton's Python stub needs {library} of this interpreter, and {sys.base_prefix} has none: "
            "install a Python with a shared library (./install.sh says which)"
        )
    paths = [str(folder), *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))]
    os.environ["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(paths))


def _library_folders() -> list[Path]:
    """Folders that may hold this interpreter's libpython: those of its build, and of its place now (uv, conda)."""
    built = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    return [built, built / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix) / "lib"]


@contextlib.contextmanager
def _launcher_free_environment() -> Iterator[None]:
    """Start tritonserver out of the launcher's reach: without its variables, in a process group of its own.

    mpirun signals a rank's whole process group; tritonserver must outlive that to drain. A session of its own would
    do as well, but Linux schedules sessions against one another (autogroup): with busy cores, streams then stood
    still for 200 ms at a time.
    """
    import sh

    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_LAUNCHER_PREFIXES)}
    defaults = getattr(sh.Command, "_call_args", {})
    defaults["new_group"] = True
    try:
        yield
    finally:
        defaults["new_group"] = False
        os.environ.update(saved)
