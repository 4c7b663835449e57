"""Two nodes on this machine: network namespaces n0 and n1, with two cables between them. Only root can make them.

A node has its own hostname, /dev/shm and hosts file. mpirun on n0 starts its daemon on n1 through a script in place of
ssh, and reaches it over one cable; the ranks' messages take the other one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.launch import Ports, Server
from tests.support.ranks import ROOT, has_open_mpi_4, mpi_environment

NODES = ("n0", "n1")
STORIES = ROOT / "models/stories"
_PROGRAMS = ("ip", "nsenter", "unshare", "mount", "sysctl")
# The cables, which have this name as an interface of each node: mpirun's, and the ranks'. The networks are of RFC 2544,
# for benchmarks, and used nowhere.
_CABLES = {"launch": "198.18.77.1{number}", "data": "198.18.78.1{number}"}
# A connection is given up after 3 s without an answer. By Linux's default of 15 it takes 15 minutes, and so long
# mpirun waits for its daemon on a node that is cut off.
_TCP_RETRIES = 3
_CALL_TIMEOUT_S = 20.0
_ENTER = """\
#!/bin/sh
# enter NODE COMMAND...: runs a command on a node
node=$1
shift
exec nsenter --net=/run/netns/{prefix}$node unshare --uts --ipc --mount sh -c '
  hostname '"$node"'
  mount -t tmpfs tmpfs /dev/shm
  mount --bind {folder}/hosts /etc/hosts
  exec "$@"' sh "$@"
"""
_AGENT = """\
#!/bin/sh
# agent [OPTION...] NODE COMMAND: as ssh does it
while [ "${{1#-}}" != "$1" ]; do shift; done
node=$1
shift
exec {folder}/enter "$node" env -i PATH="$PATH" HOME="$HOME" {mark} sh -c "$*"
"""


def why_not() -> str | None:
    """What this machine lacks to make nodes, or None."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if has_open_mpi_4():
        return "mpirun is Open MPI 4's, and these tests know 5's flags and ends"
    made = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces here: {made.stderr.strip()}" if made.returncode else None


@dataclass(frozen=True)
class Nodes:
    """The nodes, and what runs on them."""

    folder: Path
    prefix: str  # of the namespaces' names

    def on(self, node: str, *command: str) -> list[str]:
        """The command line that runs a command on a node."""
        return [str(self.folder / "enter"), node, *command]

    def mpirun(self, ranks_per_node: int, *command: str) -> list[str]:
        """The command line of a Python script on ranks of both nodes; mpirun and rank 0 are on n0."""
        hosts = ",".join(f"{node}:{ranks_per_node}" for node in NODES)
        agent = ["--prtemca", "plm_ssh_agent", str(self.folder / "agent")]
        return self.on(
            "n0",
            *("mpirun", "--allow-run-as-root", "--bind-to", "none", "-H", hosts, *agent),
            *(word for name in self._exported for word in ("-x", name)),
            *(sys.executable, *command),
        )

    _exported = ("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_btl_tcp_if_include", "OMP_NUM_THREADS")

    @property
    def environment(self) -> dict[str, str]:
        """mpirun's; `kill` finds all processes that inherit it."""
        mpi = mpi_environment()
        return {
            **os.environ,
            **mpi,
            "OMPI_MCA_btl": f"{mpi['OMPI_MCA_btl']},tcp",
            "OMPI_MCA_btl_tcp_if_include": "data",
            "PRTE_MCA_oob_tcp_if_include": "launch",
            "OMP_NUM_THREADS": "1",
            "TEST_NODES": self.prefix,
        }

    def cut(self) -> None:
        """Take both cables out."""
        for cable in _CABLES:
            self._ip("n0", "link", "set", cable, "down")

    def block_ranks(self) -> None:
        """Lose the ranks' messages, as a firewall does: they go to a device that does not exist."""
        for node, other in (NODES, NODES[::-1]):
            address = _CABLES["data"].format(number=NODES.index(other))
            self._ip(node, "neighbour", "replace", address, "lladdr", "02:00:00:00:00:01", "dev", "data")

    def set_tcp_retries(self, count: int) -> None:
        """How often the kernel sends a packet again before it gives up the connection."""
        for node in NODES:
            name = f"{self.prefix}{node}"
            _run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_retries2={count}")

    def cable_bytes(self) -> int:
        """Bytes of the ranks that have crossed, both ways, with the headers of Ethernet, IP and TCP."""
        (link,) = json.loads(self._ip("n0", "-s", "-j", "link", "show", "data"))
        return link["stats64"]["rx"]["bytes"] + link["stats64"]["tx"]["bytes"]

    def processes(self) -> list[psutil.Process]:
        """All live processes of mpirun, on both nodes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_over = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
                if not is_over and process.environ().get("TEST_NODES") == self.prefix:
                    found.append(process)
        return found

    def remaining(self, timeout_s: float = 5.0) -> list[psutil.Process]:
        """What is left of mpirun's processes: the shell of its daemon ends a moment after mpirun."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _ip(self, node: str, *command: str) -> str:
        return _run("ip", "-n", f"{self.prefix}{node}", *command)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_CALL_TIMEOUT_S).stdout


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """n0 and n1, connected inside the block; after it they are gone with all that ran on them."""
    nodes = Nodes(folder, f"t{os.getpid()}")
    launch = "".join(f"{_CABLES['launch'].format(number=number)} {node}\n" for number, node in enumerate(NODES))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{launch}")
    mark = f"TEST_NODES={nodes.prefix}"
    for name, text in (("enter", _ENTER), ("agent", _AGENT)):
        (folder / name).write_text(text.format(folder=folder, prefix=nodes.prefix, mark=mark))
        (folder / name).chmod(0o755)
    names = [nodes.prefix + node for node in NODES]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        for node in NODES:
            nodes._ip(node, "link", "set", "lo", "up")
        for cable, address in _CABLES.items():
            ends = ("netns", names[0], "type", "veth", "peer", "name", cable, "netns", names[1])
            _run("ip", "link", "add", cable, *ends)
            for number, node in enumerate(NODES):
                nodes._ip(node, "address", "add", f"{address.format(number=number)}/24", "dev", cable)
                nodes._ip(node, "link", "set", cable, "up")
        nodes.set_tcp_retries(_TCP_RETRIES)
        yield nodes
    finally:
        _end(nodes)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _end(nodes: Nodes) -> None:
    deadline = time.monotonic() + _CALL_TIMEOUT_S
    while (left := nodes.processes()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        time.sleep(0.1)


class NodesServer(Server):
    """server.py on both nodes; Triton is on n0, whose ports only n0 reaches."""

    def __init__(self, nodes: Nodes, tp: int, pp: int, *flags: str) -> None:
        self.nodes = nodes
        self.log = nodes.folder / "log"
        Ports.__init__(self)
        model = ["--hf-model-name", str(STORIES), "--output-dir", str(nodes.folder / "weights")]
        sizes = ["--tp", str(tp), "--pp", str(pp)]
        command = nodes.mpirun(tp * pp // 2, str(ROOT / "server.py"), *sizes, *model, *self.port_flags, *flags)
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=nodes.environment, start_new_session=True
            )

    def client(self, *flags: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "client.py"), "--url", self.url(), "--model-name", "stories", *flags]
        return subprocess.run(self.nodes.on("n0", *command), capture_output=True, text=True, timeout=timeout_s)


@contextlib.contextmanager
def serving_on(nodes: Nodes, tp: int, pp: int, *flags: str) -> Iterator[NodesServer]:
    server = NodesServer(nodes, tp, pp, *flags)
    try:
        yield server.wait_ready()
    finally:
        server.kill()
