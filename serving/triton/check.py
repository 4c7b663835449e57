"""Whether tritonserver and its Python stub would find their libraries: asks the dynamic loader, and starts nothing."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

from pytriton.triton import TRITONSERVER_DIST_DIR
from pytriton.utils.distribution import get_stub_path

from serving.triton.instance import triton_environment

_TIMEOUT_S = 10.0


def find_libraries() -> str:
    """A sentence that all are there. Raises RuntimeError for the first that is not."""
    environment = triton_environment()
    version = sysconfig.get_python_version()
    folder = Path(TRITONSERVER_DIST_DIR)
    programs = [folder / "bin/tritonserver", folder / "backends/python/libtriton_python.so", get_stub_path(version)]
    for program in programs:
        if not program.is_file():
            raise RuntimeError(f"{program} is missing: install PyTriton again (./install.sh)")
        command = ["ldd", str(program)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
        lost = [line.strip() for line in done.stdout.splitlines() if line.endswith("not found")]
        if lost or done.returncode:
            reason = lost[0] if lost else " ".join(done.stderr.split())
            raise RuntimeError(f"{program.name} cannot be loaded ({reason}): install what it needs (./install.sh)")
    return f"tritonserver and its stub for Python {version} find all libraries"
