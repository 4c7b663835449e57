"""One life of Triton: tritonserver in a workspace of its own, its models bound to callables of this process."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytriton.constants import PYTRITON_HOME
from pytriton.decorators import TritonContext
from pytriton.model_config import ModelConfig
from pytriton.models.model import Model
from pytriton.server.triton_server_config import TritonServerConfig
from pytriton.triton import DEFAULT_PROTECTED_ENDPOINTS, TRITON_ACCESS_HEADER, TRITONSERVER_DIST_DIR
from pytriton.utils.distribution import get_libs_path, get_stub_path

from serving.triton.launcher import PLACEHOLDER
from serving.triton.process import TritonProcess
from serving.triton.proxy import install
from serving.triton.workspace import Workspace

if TYPE_CHECKING:
    from serving.triton.frontend import TritonFlags, TritonModel

_LOG = logging.getLogger("serving")
HOME = PYTRITON_HOME  # the folder of the workspaces
MEMORY_LIMIT = 4 << 30  # bytes of data of tritonserver, and of each stub; a prompt of 400 MB takes 2 GB
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "OPAL_", "PMI_", "ORTE_")
_MAX_PROMPTS = 1024  # prompts in one Triton request
_START_TIMEOUT_S = 120.0
_FIRST_SHARED_MEMORY, _MORE_SHARED_MEMORY = 4 << 20, 1 << 20  # bytes of each stub: as PyTriton has it
_EXIT_MARGIN_S = 5.0  # the engine ends what is left after drain_timeout; then its clients get their errors


class TritonInstance:
    """Starts, and ends for good. All but `kill` belong to one thread, with which tritonserver ends."""

    def __init__(self, flags: TritonFlags, models: Sequence[TritonModel], verbose: bool) -> None:
        """Start tritonserver; returns once all models are ready. Raises RuntimeError or OSError."""
        os.environ["PYTRITON_NO_TENSORSTORE"] = "1"  # small tensors travel in the message: quicker, fewer traps
        install()
        self.flags = flags
        self.models: list[Model] = []
        self.process: TritonProcess | None = None
        self.workspace = Workspace(HOME)
        try:
            self._start(models, verbose)
        except BaseException:
            self.kill()
            self.close()
            raise

    def _start(self, models: Sequence[TritonModel], verbose: bool) -> None:
        path = self.workspace.path
        # No dynamic batcher: requests are batched by the engine, in flight.
        batched = ModelConfig(max_batch_size=_MAX_PROMPTS, batcher=None)
        streaming = ModelConfig(batching=False, decoupled=True)
        for model in models:
            config = streaming if model.decoupled else batched
            context = TritonContext()
            made = Model(
                model.name, 1, model.infer, model.inputs, model.outputs, config, self.workspace, context, strict=False
            )
            _generate(made, self.workspace)
            self.models.append(made)
        program = _copy_program(path / "tritonserver")
        token = secrets.token_urlsafe(32)
        restricted = f"{','.join(DEFAULT_PROTECTED_ENDPOINTS)}:{TRITON_ACCESS_HEADER}={token}"
        command = [str(program / "bin/tritonserver"), *self._arguments(program, verbose)]
        self.process = TritonProcess(command, restricted, triton_environment(), path, MEMORY_LIMIT, verbose)
        if not self.process.is_secret_hidden:
            _LOG.warning("ptrace is not allowed here: other users of this machine can read Triton's access token")
        self._wait_ready()
        self.process.find_stubs()
        self.workspace.close_to_others()
        for made in self.models:
            made.setup()

    def _arguments(self, program: Path, verbose: bool) -> list[str]:
        flags, config = self.flags, TritonServerConfig()
        backend = {
            "shm-region-prefix-name": self.workspace.shared_memory_prefix,
            "shm-default-byte-size": _FIRST_SHARED_MEMORY,
            "shm-growth-byte-size": _MORE_SHARED_MEMORY,
        }
        values = {
            "http_address": flags.http_address,
            "http_port": flags.http_port,
            "grpc_address": flags.http_address,
            "grpc_port": flags.grpc_port,
            "metrics_address": flags.http_address,
            "metrics_port": flags.metrics_port,
            "allow_gpu_metrics": Path("/dev/nvidiactl").exists(),  # else Triton complains that it finds no GPU
            "exit_timeout_secs": int(flags.drain_timeout + _EXIT_MARGIN_S),
            "log_verbose": 0,
            "model_repository": self.workspace.model_store,
            "model_control_mode": "none",  # nobody can load another model, token or not
            "backend_directory": program / "backends",
            "cache_directory": program / "caches",
            "backend_config": [f"python,{name}={value}" for name, value in backend.items()],
            "http-restricted-api": PLACEHOLDER,
            "grpc-restricted-protocol": PLACEHOLDER,
        }
        if flags.triton_log:
            values["log_file"] = Path(flags.triton_log).absolute()
        if flags.grpc_certfile:
            values |= {
                "grpc_use_ssl": True,
                "grpc_server_cert": Path(flags.grpc_certfile).absolute(),
                "grpc_server_key": Path(flags.grpc_keyfile).absolute(),
            }
        arguments: list[str] = []
        for name, value in values.items():
            config[name] = value  # refuses a name that tritonserver does not have
            for one in value if isinstance(value, list) else [value]:
                arguments += [f"--{name.replace('_', '-')}", str(one)]
        return arguments

    def _wait_ready(self) -> None:
        assert self.process is not None
        url = f"http://{self.flags.local_address}:{self.flags.http_port}/v2/health/ready"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            code = self.process.exit_code()
            if code is not None:
                raise RuntimeError(f"tritonserver ended with code {code}{_last_error(self.process.last_lines)}")
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:  # not yet
                time.sleep(0.05)
        raise RuntimeError(f"tritonserver is not ready after {_START_TIMEOUT_S:g} s")

    def kill(self) -> None:
        """End tritonserver now, and remove its workspace; from any thread, more than once."""
        if self.process is not None:
            self.process.kill()
        self.workspace.remove()

    def close(self) -> None:
        """Cancel what came through this Triton, and end the threads of its models; tritonserver has ended."""
        self.cancel_all()
        for model in self.models:
            for connector in model._requests_respones_connectors:
                connector.close()  # all first: each takes up to a second
        for model in self.models:
            model.clean()

    def cancel_all(self) -> None:
        """Cancel every request that came through this Triton: nobody waits for its answer."""
        for loop, tasks in self._running():
            loop.call_soon_threadsafe(_cancel, loop, tasks)

    def _running(self) -> list[tuple[asyncio.AbstractEventLoop, dict[Any, asyncio.Task] | None]]:
        """The loops of this process that serve Triton, each with those of its tasks that are requests; None: all."""
        found = []
        for model in self.models:
            found += [(handler._loop, None) for handler in model._inference_handlers]
            clients = [connector._requests_server_client for connector in model._requests_respones_connectors]
            found += [(client.loop, client._handle_requests_tasks) for client in clients]
        return [(loop, tasks) for loop, tasks in found if loop is not None]

    @property
    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """The event loops of this process through which each request comes."""
        return [loop for loop, _ in self._running()]

    @property
    def has_all_threads(self) -> bool:
        """Whether the threads of this process that serve Triton are alive."""
        return all(model.is_alive() for model in self.models)


def _generate(model: Model, workspace: Workspace) -> None:
    """Write a model's files. Clients can read its configuration, so the workspace's path does not stand there."""
    parameters = model._get_triton_model_config().backend_parameters
    parameters["workspace-path"] = "."  # tritonserver's own folder, and the stub's
    model.generate_model(workspace.model_store)
    parameters["workspace-path"] = str(workspace.short_path)


def _cancel(loop: asyncio.AbstractEventLoop, tasks: dict[Any, asyncio.Task] | None) -> None:
    """On the loop itself: cancel tasks. In a handler's loop all are requests; a connector ends once it has no `tasks`.

    A task that is cancelled before it has begun, or twice, does not remove itself from there.
    """
    if tasks is None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
    else:
        for task in tasks.values():
            task.cancel()
        tasks.clear()


def _last_error(lines: Sequence[str]) -> str:
    """tritonserver's last error message, without the date before it; where it has none, its last line."""
    errors = [line.partition("] ")[2] for line in lines if line[:1] == "E" and "] " in line]
    last = (errors or [line for line in lines if line.strip()])[-1:]
    return "".join(f" ({line.strip()})" for line in last)


def _copy_program(folder: Path) -> Path:
    """tritonserver with the stub of this Python, 22 MB: the two must lie together."""
    stub = "triton_python_backend_stub"
    shutil.copytree(TRITONSERVER_DIST_DIR, folder, ignore=shutil.ignore_patterns("python_backend_stubs", stub))
    shutil.copy(get_stub_path(sysconfig.get_python_version()), folder / "backends/python" / stub)
    return folder


def triton_environment() -> dict[str, str]:
    """tritonserver's environment, without the launcher's variables. RuntimeError where the stub lacks its library."""
    library = f"libpython{sysconfig.get_python_version()}.so.1.0"
    folder = next((folder for folder in _library_folders() if (folder / library).exists()), None)
    if folder is None:
        raise RuntimeError(
            f"Triton's Python stub needs {library} of this interpreter, and {sys.base_prefix} has none: "
            "install a Python with a shared library (./install.sh says which)"
        )
    paths = [str(folder), *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")), str(get_libs_path())]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)},
        "LD_LIBRARY_PATH": ":".join(dict.fromkeys(paths)),
        "PATH": f"{sys.exec_prefix}/bin:{os.environ.get('PATH', '')}",  # where the stub finds its Python
    }


def _library_folders() -> list[Path]:
    """Folders that may hold this interpreter's libpython: those of its build, and of its place now (uv, conda)."""
    built = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    return [built, built / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix) / "lib"]
