"""A private two-node Slurm on this machine: its own key, sockets, ports and state, below one folder.

Both nodes are this machine, on 127.0.0.1, with 16 CPUs and 8 GPUs on paper. Only root can run it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.launch import free_ports

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
# Slurm's pmix plugin loads the name without a version; where only libpmix.so.2 is there, launches hang.
_PMIX_LIBRARIES = ("/usr/lib/*/pmix2/lib/libpmix.so", "/usr/lib/*/libpmix.so", "/usr/lib*/libpmix.so")
_CALL_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
# proctrack/linuxproc signals all that a rank started, tritonserver too; proctrack/cgroup, the rule on real clusters and
# out of reach in most containers, signals ranks only. What drains here drains there.
_CONFIG = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/run/spool.%n
TmpFS={folder}/run/tmp.%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
ReturnToService=2
MpiDefault=none
KillWait={kill_wait}
SlurmdParameters=config_overrides
SlurmdTimeout=10
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=p Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What this machine lacks to run a cluster, or None."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: ./install.sh --slurm installs them"
    if not any(map(glob.glob, _PMIX_LIBRARIES)):
        return "no libpmix.so, which srun --mpi=pmix loads: ./install.sh --slurm installs it"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running cluster: how to call its programs, and what its jobs do."""

    environment: dict[str, str]  # for Slurm's programs; jobs inherit it

    def call(self, *command: str, timeout_s: float = _CALL_TIMEOUT_S) -> str:
        """What one of Slurm's client programs prints; raises CalledProcessError where it fails."""
        return self.run(*command, timeout_s=timeout_s, check=True).stdout

    def run(
        self, *command: str, timeout_s: float, check: bool = False, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client program to its end, in the cluster's environment."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=check
        )

    def submit(self, *arguments: str, cwd: Path) -> int:
        """sbatch; returns the job's id. It starts in `cwd`."""
        command = ("sbatch", "--parsable", *arguments)
        return int(self.run(*command, timeout_s=_CALL_TIMEOUT_S, check=True, cwd=cwd).stdout)

    def fields(self, kind: str, name: str) -> dict[str, str]:
        """What `scontrol show` has of a job or step: JobState, ExitCode, NodeList and so on."""
        words = self.call("scontrol", "--oneliner", "show", kind, name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_end(self, job_id: int, timeout_s: float) -> dict[str, str]:
        """The job's fields once it is over and its processes are gone."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.fields("job", str(job_id))
            if job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") and not self.processes(job_id):
                return job
            assert time.monotonic() < deadline, f"job {job_id} is {job['JobState']} after {timeout_s} s"
            time.sleep(0.1)

    def kill_node(self, name: str) -> None:
        """End a node's slurmd for good, as a crash would. The job's processes on the node live on."""
        (daemon,) = (p for p in _processes({"SLURM_CONF": self.environment["SLURM_CONF"]}) if _is_slurmd(p, name))
        daemon.kill()

    def processes(self, job_id: int) -> list[psutil.Process]:
        """The live processes of a job, whatever their parents are now."""
        return _processes({"SLURM_CONF": self.environment["SLURM_CONF"], "SLURM_JOB_ID": str(job_id)})


@contextlib.contextmanager
def slurm_cluster(folder: Path, kill_wait: int = 10, environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Nodes n0 and n1, idle inside the block; after it every daemon, job and rank is gone.

    `kill_wait` is Slurm's KillWait: the seconds between SIGTERM and SIGKILL of a cancelled job.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    cluster = Cluster({**kept, **(environment or {}), "SLURM_CONF": str(folder / "slurm.conf")})
    _configure(folder, kill_wait)
    daemons: list[subprocess.Popen] = []
    try:
        for name, command in _daemons(folder).items():
            with (folder / "log" / f"{name}.out").open("w") as log:
                daemons.append(
                    subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
                )
            if name == "munged":
                _wait_for_socket(folder / "run" / "munge.socket")
        _wait_idle(cluster)
        yield cluster
        _cancel_all(cluster)
    finally:
        _stop(daemons, cluster.environment["SLURM_CONF"])


def _configure(folder: Path, kill_wait: int) -> None:
    for name in ("run", "state", "log", "run/spool.n0", "run/spool.n1", "run/tmp.n0", "run/tmp.n1"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for number in range(8):  # a GPU is a device file whose name has its number
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, ports=free_ports(3), kill_wait=kill_wait))


def _daemons(folder: Path) -> dict[str, list[str]]:
    run = folder / "run"
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={run}/munge.socket"]
    munged += [f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed", f"--log-file={folder}/log/munged.log"]
    return {
        "munged": munged,
        "slurmctld": ["slurmctld", "-D", "-c", "-i"],
        "slurmd.n0": ["slurmd", "-D", "-N", "n0"],
        "slurmd.n1": ["slurmd", "-D", "-N", "n1"],
    }


def _wait_for_socket(path: Path) -> None:
    deadline = time.monotonic() + _CALL_TIMEOUT_S
    while not path.is_socket():
        if time.monotonic() > deadline:
            raise RuntimeError(f"munged did not make {path} within {_CALL_TIMEOUT_S:g} s")
        time.sleep(0.02)


def _wait_idle(cluster: Cluster) -> None:
    command = ("sinfo", "--noheader", "--Node", "--format=%t")
    deadline = time.monotonic() + _CALL_TIMEOUT_S
    while (done := cluster.run(*command, timeout_s=_CALL_TIMEOUT_S)).stdout.split() != ["idle", "idle"]:
        if time.monotonic() > deadline:
            folder = Path(cluster.environment["SLURM_CONF"]).parent
            logs = "".join(f"\n{path.name}: {path.read_text()[-2000:]}" for path in (folder / "log").iterdir())
            raise RuntimeError(f"the nodes are {done.stdout.split()} {done.stderr.strip()}, not idle{logs}")
        time.sleep(0.1)


def _cancel_all(cluster: Cluster) -> None:
    """Cancel what still runs and give it a moment: slurmstepd reports to daemons that must be there."""
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while (jobs := cluster.call("squeue", "--noheader", "--format=%i").split()) and time.monotonic() < deadline:
        cluster.run("scancel", *jobs, timeout_s=_CALL_TIMEOUT_S)
        time.sleep(0.2)


def _stop(daemons: list[subprocess.Popen], conf: str) -> None:
    for daemon in reversed(daemons):  # munged last: the others sign their good-byes
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for process in _processes({"SLURM_CONF": conf}):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_slurmd(process: psutil.Process, node: str) -> bool:
    """Whether it is the daemon of a node, and not a step that it started."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline() == ["slurmd", "-D", "-N", node]
    return False


def _processes(variables: dict[str, str]) -> list[psutil.Process]:
    """All live processes that were started with these environment variables."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_over = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            if not is_over and variables.items() <= process.environ().items():
                found.append(process)
    return found
