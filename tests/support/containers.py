"""Containers on this machine: images built by buildah and run by podman, in a storage folder of their own.

No registry is needed: the base image is Debian 12, made by debootstrap. Only root can do this.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.ranks import ROOT

BASE = "localhost/debian:12"
_PROGRAMS = ("buildah", "podman", "runc", "debootstrap")
# A container without these limits does not start where the user's own are lower than podman's defaults.
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
_TIMEOUT_S = 900.0
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def why_not() -> str | None:
    """Why containers cannot run here, or None."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: ./install.sh --containers"
    return None if os.geteuid() == 0 else "only root can build and run containers here"


class Containers:
    """Images and containers below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._storage = ["--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", "overlay"]
        self._running: list[str] = []

    def make_base(self) -> str | None:
        """Import BASE: a Debian with nothing but what apt needs. Returns why this machine cannot, or cannot run it."""
        root = self.folder / "debian"
        if (made := self._call(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=False)).returncode:
            return f"debootstrap fails here: {(made.stdout + made.stderr)[-300:]}"
        archive = self.folder / "debian.tar"
        self._call(["tar", "cf", str(archive), "-C", str(root), "."])
        self._podman("import", str(archive), BASE)
        archive.unlink()
        shutil.rmtree(root)
        tried = self._podman("run", "--rm", "--network", "host", *_LIMITS, BASE, "true", check=False)
        return f"podman runs no container here: {tried.stderr[-300:]}" if tried.returncode else None

    def build(self, name: str, **arguments: str) -> None:
        """Build deploy/docker/Dockerfile with these build arguments."""
        config, mounts = self.pip_config()
        given = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
        self._call(
            [
                *("buildah", *self._storage, "build", "--isolation", "chroot", "--network", "host"),
                *("--format", "docker", "--file", str(ROOT / "deploy/docker/Dockerfile"), "--tag", name),
                *("--secret", f"id=pip.conf,src={config}", *mounts, *given, str(ROOT)),
            ]
        )

    def pip_config(self) -> tuple[Path, list[str]]:
        """A file of pip's settings, and options that mount what it names: this machine's packages and certificates."""
        links = [path for path in os.environ.get("PIP_FIND_LINKS", "").split() if Path(path).is_dir()]
        lines = ["[global]"]
        if Path(_CERTIFICATES).exists():
            lines.append("cert = /run/certificates.crt")
        if links:
            lines.append(f"find-links = {' '.join(links)}")
        config = self.folder / "pip.conf"
        config.write_text("\n".join(lines) + "\n")
        mounts = [f"{_CERTIFICATES}:/run/certificates.crt:ro"] * Path(_CERTIFICATES).exists()
        mounts += [f"{path}:{path}:ro" for path in links]
        return config, [word for mount in mounts for word in ("--volume", mount)]

    def run(self, name: str, image: str, *command: str, options: Sequence[str] = ()) -> None:
        """Start a container in the background, on the host's network."""
        self._running.append(name)
        self._podman("run", "--detach", "--name", name, "--network", "host", *_LIMITS, *options, image, *command)

    def run_once(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        """Run a command in a new container; returns what it printed. Fails where it does not end with 0."""
        return self._podman("run", "--rm", "--network", "host", *_LIMITS, *options, image, *command).stdout

    def compose_up(self, files: Sequence[Path], service: str, environment: dict[str, str]) -> str:
        """Start a service of compose files in the background, without a build; returns its container's name."""
        project = "composed"
        self._running.append(f"{project}_{service}_1")
        given = shlex.join([*self._storage, "--runtime", "runc"])
        names = [word for file in files for word in ("--file", str(file))]
        command = ["podman-compose", "--podman-args", given, "--project-name", project, *names]
        self._call([*command, "up", "--detach", "--no-build", service], environment={**os.environ, **environment})
        return self._running[-1]

    def execute(self, name: str, *command: str, options: Sequence[str] = ()) -> str:
        """Run a command in a running container; returns what it printed. Fails where it does not end with 0."""
        return self._podman("exec", *options, name, *command).stdout

    def is_healthy(self, name: str) -> bool:
        """Run the image's health check."""
        return self._podman("healthcheck", "run", name, check=False).returncode == 0

    def logs(self, name: str) -> str:
        """What its main process has printed."""
        answer = self._podman("logs", name, check=False)
        return answer.stdout + answer.stderr

    def wait_for(self, name: str, text: str, timeout_s: float = 180.0) -> None:
        """Wait until its log has a text."""
        deadline = time.monotonic() + timeout_s
        while text not in (log := self.logs(name)):
            is_running = self._podman("inspect", "--format", "{{.State.Running}}", name).stdout.strip() == "true"
            assert is_running and time.monotonic() < deadline, f"no {text!r} in the log:\n{log}"
            time.sleep(0.5)

    def stop(self, name: str, timeout_s: int = 60) -> int:
        """SIGTERM, and SIGKILL after the timeout; the exit code."""
        self._podman("stop", "--time", str(timeout_s), name)
        return int(self._podman("inspect", "--format", "{{.State.ExitCode}}", name).stdout)

    def size_mb(self, image: str) -> float:
        """Megabytes of an image, its base included."""
        return int(self._podman("image", "inspect", "--format", "{{.Size}}", image).stdout) / 1e6

    def close(self) -> None:
        """Kill and remove all."""
        for name in self._running:
            self._podman("rm", "--force", "--time", "0", name, check=False)
        self._podman("rmi", "--all", "--force", check=False)
        subprocess.run(["umount", f"{self.folder}/root/overlay"], capture_output=True)  # podman binds it to itself
        shutil.rmtree(self.folder, ignore_errors=True)

    def _podman(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._call(["podman", *self._storage, "--runtime", "runc", *arguments], check)

    def _call(
        self, command: list[str], check: bool = True, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
        output = (done.stdout + done.stderr)[-6000:]
        assert not check or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{output}"
        return done


@contextlib.contextmanager
def containers() -> Iterator[Containers]:
    """Containers that are gone after the block. podman takes no folder with a long path."""
    made = Containers(Path(tempfile.mkdtemp(prefix="containers-", dir="/tmp")))
    try:
        yield made
    finally:
        made.close()
