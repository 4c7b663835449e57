"""deploy/slurm/serve.sbatch on a real two-node Slurm: answers, graceful and forced ends, a missing --mpi=pmix."""

from __future__ import annotations

import contextlib
import glob
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.support.cluster import Cluster, slurm_cluster, why_not
from tests.support.engines import hf_greedy
from tests.support.launch import ROOT, Ports, Server, tensor
from tests.support.ranks import has_open_mpi_4

pytestmark = [
    pytest.mark.slow("starts a private Slurm, whose packages make test-all installs"),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

MODEL = "tiny-gpt2"
TEXTS = ["the rain in", "so many more words than in the other prompt"]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
WITHOUT_GPUS = (*TWO_NODES, "--cpus-per-task=1", "--gpus-per-node=0")
# Both nodes are 127.0.0.1, with this machine's cores; on real nodes Open MPI finds its way by itself.
ONE_MACHINE = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,tcp",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_mpi_yield_when_idle": "1",  # ranks may outnumber the cores
    "OMP_NUM_THREADS": "1",
}
NUM_ROWS = 16  # of the request in flight
OPEN_MPI_4_SAYS = "OPAL ERROR: Unreachable in file ext3x_client.c"  # without --mpi=pmix; help is in openmpi-common
NO_PMIX = "2 Slurm tasks, but each is an MPI world of its own: start with srun --mpi=pmix"


# This Python's environment, as if it were activated.
ENVIRONMENT = {
    **ONE_MACHINE,
    "VIRTUAL_ENV": sys.prefix,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


@pytest.fixture(scope="module", params=["environment", "Debian"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Its jobs run with the environment's Open MPI, and with Debian's."""
    environment = dict(ENVIRONMENT)
    if request.param == "Debian":
        library = next(iter(glob.glob("/usr/lib/*/libmpi.so.40")), None)
        if library is None:
            pytest.skip("no Open MPI of Debian's: ./install.sh --slurm installs it")
        environment["MPI4PY_LIBMPI"] = library
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), kill_wait=30, environment=environment) as running:
        yield running


def is_open_mpi_4(cluster: Cluster) -> bool:
    """Whether its jobs run with Open MPI 4, which makes no worlds of their own of ranks without PMIx."""
    return "MPI4PY_LIBMPI" in cluster.environment or has_open_mpi_4()


class JobServer(Server):
    """server.py as a job of serve.sbatch; its log is the job's output."""

    def __init__(self, cluster: Cluster, log: Path, *flags: str) -> None:
        self.cluster = cluster
        self.log = log
        Ports.__init__(self)
        job = [
            f"--output={log}",
            *WITHOUT_GPUS,
            "deploy/slurm/serve.sbatch",
            *self.port_flags,
            *flags,
        ]
        self.job_id = cluster.submit(*job, cwd=ROOT)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_ready(self, timeout_s: float = 240) -> JobServer:
        deadline = time.monotonic() + timeout_s
        while "ready: model" not in self.text:
            state = self.cluster.fields("job", str(self.job_id))["JobState"]
            assert state in ("PENDING", "RUNNING"), f"the job is {state}:\n{self.text}"
            assert time.monotonic() < deadline, f"the server is not ready after {timeout_s} s:\n{self.text}"
            time.sleep(0.2)
        return self

    def ranks(self) -> dict[str, psutil.Process]:
        """The processes of the ranks, by their number."""
        found = {}
        for process in self.cluster.processes(self.job_id):
            with contextlib.suppress(psutil.Error):
                if "server.py" in "".join(process.cmdline()[1:2]) and "SLURM_PROCID" in process.environ():
                    found[process.environ()["SLURM_PROCID"]] = process
        return found

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank."""
        return self.ranks()[str(number)]


@contextlib.contextmanager
def job_server(cluster: Cluster, tmp_path: Path, folder: Path) -> Iterator[JobServer]:
    """tp 2 over both nodes, ready inside the block and gone after it."""
    flags = ["--hf-model-name", str(folder), "--tp", "2", "--model-name", MODEL]
    server = JobServer(cluster, tmp_path / "out", *flags)
    try:
        yield server.wait_ready()
    finally:
        cluster.run("scancel", str(server.job_id), timeout_s=20)  # exits 1 where the job is over
        cluster.wait_end(server.job_id, 30)


def ask_in_background(server: Server, rows: int = NUM_ROWS) -> tuple[threading.Thread, list[tuple[float, Any]]]:
    """A request that takes a second or more, and a list for when it was answered and the answer or error."""
    inputs = [tensor("prompts", "BYTES", ["word"] * rows), tensor("request_output_len", "UINT32", [250] * rows)]
    answers: list[tuple[float, Any]] = []

    def ask() -> None:
        try:
            status, answer = server.infer(MODEL, inputs)
        except (OSError, http.client.HTTPException) as error:
            status, answer = None, error
        answers.append((time.monotonic(), answer if status == 200 else (status, answer)))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.4)
    return thread, answers


def check_drain(server: JobServer, *scancel: str) -> dict[str, str]:
    """Run scancel with a request in flight, which must be answered; returns the job's fields at its end."""
    thread, answers = ask_in_background(server)
    signalled = time.monotonic()
    server.cluster.call("scancel", *scancel, str(server.job_id))
    job = server.cluster.wait_end(server.job_id, 45)
    thread.join(1)
    answered, answer = answers[0]
    assert answered > signalled
    assert isinstance(answer, dict), (answer, server.text)
    lengths = next(o for o in answer["outputs"] if o["name"] == "sequence_length")["data"]
    assert len(lengths) == NUM_ROWS and min(lengths) > 1
    assert server.text.count("SIGTERM: finishing what is in flight") == 1
    assert "Traceback" not in server.text
    return job


def check_greedy(server: Server, gpt2_source: tuple[Path, GPT2LMHeadModel]) -> None:
    folder, model = gpt2_source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    done = server.client("--model-name", MODEL, "--output-len", "32", "--json", "--prompts", *TEXTS)
    assert done.returncode == 0, done.stderr
    for text, line in zip(TEXTS, done.stdout.splitlines(), strict=True):
        prompt_ids = tokenizer.encode(text)
        assert json.loads(line)["output_ids"] == [prompt_ids + hf_greedy(model, prompt_ids, 32)]


def test_ranks_get_what_the_file_asks_for(cluster: Cluster, tmp_path: Path) -> None:
    """A stand-in for server.py shows it. Under the first serve.sbatch a rank that Slurm binds had one core: srun of
    Slurm 22.05 does not take --cpus-per-task from sbatch."""
    script = tmp_path / "server.py"
    script.write_text(
        "#!/bin/sh\n"
        'echo "rank=$SLURM_PROCID node=$SLURM_NODEID gpus=$CUDA_VISIBLE_DEVICES argc=$#"\n'
        '[ "$SLURM_PROCID" = 0 ] && scontrol show step "$SLURM_JOB_ID.0"\nexit 0\n'
    )
    script.chmod(0o755)
    job = [
        "--output=out",
        *TWO_NODES,
        "--cpus-per-task=3",
        str(ROOT / "deploy/slurm/serve.sbatch"),
        "--model-name",
        "a b",
    ]
    assert cluster.wait_end(cluster.submit(*job, cwd=tmp_path), 30)["JobState"] == "COMPLETED"
    lines = (tmp_path / "out").read_text().splitlines()
    for rank in range(2):
        assert f"rank={rank} node={rank} gpus=0,1,2,3,4,5,6,7 argc=2" in lines  # a rank picks among all of its node's
    assert "TresPerTask=cpu:3" in "".join(lines)


def test_submitted_from_elsewhere_it_says_so(cluster: Cluster, tmp_path: Path) -> None:
    job = ["--output=out", *TWO_NODES, str(ROOT / "deploy/slurm/serve.sbatch")]
    assert cluster.wait_end(cluster.submit(*job, cwd=tmp_path), 30)["ExitCode"] == "1:0"
    expected = f"serve.sbatch: no server.py in {tmp_path}: submit from the repository's root\n"
    assert (tmp_path / "out").read_text() == expected


def test_a_job_serves_on_two_nodes_and_drains_at_sigterm(
    cluster: Cluster, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    with job_server(cluster, tmp_path, converted(2)) as server:
        assert [server.rank(number).environ()["SLURM_NODEID"] for number in range(2)] == ["0", "1"]
        check_greedy(server, gpt2_source)
        job = check_drain(server, "--signal=TERM")
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), server.text
        assert "tp 2 × pp 1, float32 on cpu" in server.text


def test_plain_scancel_drains_within_killwait(
    cluster: Cluster, converted: Callable[[int], Path], tmp_path: Path
) -> None:
    with job_server(cluster, tmp_path, converted(2)) as server:
        job = check_drain(server)
        assert job["JobState"] == "CANCELLED", server.text


def test_a_dead_rank_ends_the_job(cluster: Cluster, converted: Callable[[int], Path], tmp_path: Path) -> None:
    with job_server(cluster, tmp_path, converted(2)) as server:
        thread, answers = ask_in_background(server)
        started = time.monotonic()
        server.rank(1).send_signal(signal.SIGKILL)
        job = cluster.wait_end(server.job_id, 30)
        assert time.monotonic() - started < 30
        assert (job["JobState"], job["Reason"]) == ("FAILED", "NonZeroExitCode"), server.text
        thread.join(5)
        assert not thread.is_alive()
        assert "outputs" not in answers[0][1]


def test_a_nodes_dead_daemon_drains_the_job_and_slurm_queues_it_again(
    converted: Callable[[int], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Slurm gives up the node after SlurmdTimeout (10 s here) and stops the ranks on the others. The rank on the node
    itself is out of Slurm's reach: it ends because rank 0 does."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), kill_wait=30, environment=ENVIRONMENT) as cluster:
        with job_server(cluster, tmp_path, converted(2)) as server:
            cluster.kill_node("n1")
            deadline = time.monotonic() + 90
            while (job := cluster.fields("job", str(server.job_id)))["JobState"] != "PENDING" or server.ranks():
                assert time.monotonic() < deadline, (job, server.text)
                time.sleep(0.2)
            assert job["Restarts"] == "1"
            assert "Node failure on n1" in server.text
            assert "SIGTERM: finishing what is in flight" in server.text
            assert "0 requests in flight were finished, 0 were cut off" in server.text
            assert "Traceback" not in server.text


def test_srun_without_pmix_says_so(cluster: Cluster, converted: Callable[[int], Path]) -> None:
    """Each task would be a whole MPI world: two servers, of which one loses the race for the ports.

    Open MPI 4, as Debian has it, says so itself.
    """
    flags = ["--hf-model-name", str(converted(2)), "--tp", "2"]
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=1", sys.executable, str(ROOT / "server.py"), *flags]
    done = cluster.run(*command, timeout_s=60)
    assert done.returncode == 1, done.stderr
    if is_open_mpi_4(cluster):
        assert OPEN_MPI_4_SAYS in done.stderr
        return
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "srun: " not in line]
    assert len(errors) == 2, done.stderr  # one from each task
    assert all(line.endswith(NO_PMIX) for line in errors)


def test_check_of_a_job(cluster: Cluster, converted: Callable[[int], Path], tmp_path: Path) -> None:
    """The last flag of serve.sbatch; under srun without --mpi=pmix it says so, once."""
    flags = ["--hf-model-name", str(converted(2)), "--tp", "2", "--output-dir", str(tmp_path / "new"), "--check"]
    job = [f"--output={tmp_path}/out", *WITHOUT_GPUS, "deploy/slurm/serve.sbatch", *Ports().port_flags, *flags]
    ended = cluster.wait_end(cluster.submit(*job, cwd=ROOT), 120)
    text = (tmp_path / "out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert "all is well, after " in text and "FAILED" not in text
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=1", sys.executable, str(ROOT / "server.py"), *flags]
    done = cluster.run(*command, *Ports().port_flags, timeout_s=120)
    assert done.returncode == 1, done.stderr
    if is_open_mpi_4(cluster):
        assert OPEN_MPI_4_SAYS in done.stderr
    else:
        assert [line for line in done.stdout.splitlines() if "FAILED  " in line] == [f"FAILED  world       {NO_PMIX}"]
