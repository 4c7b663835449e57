"""Real server.py --check: a set-up that is well, and broken ones, each named in one sentence."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.launch import ROOT, Ports, wait_for
from tests.support.nodes import Nodes, two_nodes, why_not
from tests.support.ranks import call_ranks, kill_family, mpi_environment, mpirun_command

SERVER = str(ROOT / "server.py")
STORIES = str(ROOT / "models/stories")
LIMIT_S = 50  # of the checks themselves; a busy machine starts Python slowly
WELL = {
    "world": r"2 ranks for tp 2 × pp 1",
    "ports": r"http_port \d+, grpc_port \d+, metrics_port \d+, openai_port \d+ are free on 127.0.0.1",
    "Triton": r"tritonserver and its stub for Python 3\.\d+ find all libraries",
    "hosts": rf"2 ranks on {re.escape(socket.gethostname())}",
    "folder": r"\S+/new is seen and written by all ranks",
    "devices": r"2 × CPU; a rank has [\d.]+ of [\d.]+ GB free, and its weights take 0.00\d+ GB at least",
    "all-reduce": r"MPI, 4 MiB: \d+ MB/s within a host",
}

needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def flags(folder: Path, tp: int = 2) -> list[str]:
    """Of a check, on ports of its own; the demo model."""
    where = ["--hf-model-name", STORIES, "--output-dir", str(folder), "--device", "cpu"]
    return ["--check", "--tp", str(tp), *where, *Ports().port_flags]


def lines(text: str) -> dict[str, tuple[bool, str]]:
    """check → (whether it is ok, its sentence); each has one line."""
    found = re.findall(r"^(ok|FAILED) +(\S+) +(.+)$", text, re.M)
    assert len({name for _, name, _ in found}) == len(found), text
    assert "Traceback" not in text
    return {name: (state == "ok", sentence) for state, name, sentence in found}


def failures(text: str) -> dict[str, str]:
    return {name: sentence for name, (is_ok, sentence) in lines(text).items() if not is_ok}


def check_on_ranks(num_ranks: int, *command_line: str) -> tuple[list[int], str]:
    """Each rank's code, and what rank 0 prints, on ranks that stay."""
    ends = call_ranks(num_ranks, "tests.multi.refused_start:run", *command_line)
    assert not any(text for _, text in ends[1:]), ends
    return [code for code, _ in ends], ends[0][1]


def check(command: list[str], environment: dict[str, str], stopped_rank: int = -1) -> tuple[int, str]:
    """A command's code, and what it prints. stopped_rank: the rank that gets SIGSTOP once MPI is up."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    guard = threading.Timer(4 * LIMIT_S, kill_family, [process])
    guard.start()
    try:
        assert process.stdout is not None
        text = process.stdout.readline()
        for rank in psutil.Process(process.pid).children():
            if rank.environ().get("OMPI_COMM_WORLD_RANK") == str(stopped_rank):
                rank.send_signal(signal.SIGSTOP)
        text += process.stdout.read()
        code = process.wait()
    finally:
        guard.cancel()
        kill_family(process)
    print(f"code {code} after {time.monotonic() - started:.1f} s\n{text}")
    took = re.search(r"^(?:all is well|\d+ FAILED), after ([\d.]+) s$", text, re.M)
    assert took and float(took[1]) < LIMIT_S, text
    return code, text


def test_all_is_well(tmp_path: Path) -> None:
    codes, text = check_on_ranks(2, *flags(tmp_path / "new"))
    assert codes == [0, 0], text
    found = lines(text)
    assert list(found) == list(WELL)
    for name, (is_ok, sentence) in found.items():
        assert is_ok and re.fullmatch(WELL[name], sentence), sentence
    assert re.fullmatch(r"all is well, after [\d.]+ s", text.splitlines()[-1])
    assert not any(tmp_path.iterdir())


def test_a_wrong_world_size_says_the_right_command(tmp_path: Path) -> None:
    codes, text = check_on_ranks(1, *flags(tmp_path))
    assert codes == [1]
    failed = failures(text)
    assert list(failed) == ["world"]
    assert failed["world"].startswith("tp × pp takes 2 ranks and 1 were started: mpirun -n 2 ")


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        codes, text = check_on_ranks(2, *flags(tmp_path), "--grpc-port", str(port))
    assert codes == [1, 1]
    reason = f"grpc_port is {port}; 127.0.0.1 cannot be bound there (Address already in use)"
    assert failures(text) == {"ports": f"{reason}: end what uses it, or give another port"}
    assert text.splitlines()[-1].startswith("1 FAILED, after ")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.touch()
    codes, text = check_on_ranks(2, *flags(folder))
    assert codes == [1, 1]
    expected = rf"rank 0 on \S+ cannot write to {folder} \(File exists\): give a folder where all ranks may write with "
    assert re.match(expected, failures(text)["folder"]), text


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    library = tmp_path / "libth_transformer.so"
    library.write_text("no library")
    codes, text = check_on_ranks(2, *flags(tmp_path / "new"), "--lib-path", str(library))
    assert codes == [1, 1]
    assert re.match(rf"rank 0 on \S+: lib_path is {library}, which torch cannot load: ", failures(text)["library"])
    codes, text = check_on_ranks(2, *flags(tmp_path / "new"), "--lib-path", str(tmp_path / "none"))
    assert re.search("there is no such file", failures(text)["library"])


def test_torchs_groups_are_measured(tmp_path: Path) -> None:
    """gloo, with the code of NCCL's pairs."""
    (code, text), other = call_ranks(2, "tests.multi.pairs:run", str(tmp_path))
    assert (code, other) == (0, (0, "")), text
    assert re.fullmatch(r"gloo, 4 MiB: \d+ MB/s within a host", lines(text)["all-reduce"][1])


@pytest.mark.slow("starts its own mpirun, and waits until a rank has not come")
def test_a_pair_of_torchs_groups_that_does_not_meet_is_named(tmp_path: Path) -> None:
    command = mpirun_command(2, str(ROOT / "tests/multi/pairs.py"), str(tmp_path))
    code, text = check(command, {**os.environ, **mpi_environment(), "PYTHONPATH": str(ROOT)})
    host = socket.gethostname()
    pair = f"rank 0 on {host} with rank 1 on {host}"
    assert failures(text) == {"all-reduce": f"{pair}: no answer over gloo within 4 s: look at GLOO_SOCKET_IFNAME"}
    assert code == 1


@pytest.mark.slow("starts its own mpirun")
@needs_namespaces
def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    """Rank 1 has another file system there: a mount of its own."""
    folder = tmp_path / "weights"
    folder.mkdir()
    command_line = [sys.executable, SERVER, *flags(folder)]
    elsewhere = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {folder} && exec "$@"', "sh"]
    command = [*mpirun_command(1)[:-1], *command_line, ":", "-n", "1", *elsewhere, *command_line]
    code, text = check(command, {**os.environ, **mpi_environment()})
    host = socket.gethostname()
    lost = f"rank 1 on {host} does not see what rank 0 on {host} wrote to {folder}"
    assert failures(text) == {"folder": f"{lost}: put --output-dir on a file system that all hosts share"}
    assert code != 0
    assert not any(folder.iterdir())


@pytest.mark.slow("starts its own mpirun, and waits until a rank has not answered")
def test_a_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    command = mpirun_command(3, SERVER, *flags(tmp_path, 3))
    code, text = check(command, {**os.environ, **mpi_environment()}, stopped_rank=1)
    host = socket.gethostname()
    (sentence,) = failures(text).values()
    where = f"(?:{host}|an unknown host)"  # whether it still could say so
    assert re.match(rf"rank 1 on {where} does not answer rank 0 on {host} within \d+ s: look at its host", sentence)
    assert code == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow("starts its own mpirun")
def test_a_rank_that_is_stopped_takes_its_file_away(tmp_path: Path) -> None:
    """Rank 0 gets SIGSTOP, so that rank 1 waits for it with its file written; then rank 1 gets SIGTERM."""
    command = mpirun_command(2, SERVER, *flags(tmp_path))
    environment = {**os.environ, **mpi_environment()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ok      world")
        ranks = {rank.environ()["OMPI_COMM_WORLD_RANK"]: rank for rank in psutil.Process(process.pid).children()}
        ranks["0"].send_signal(signal.SIGSTOP)
        wait_for(lambda: any(tmp_path.glob(".check-*-1")))
        ranks["1"].send_signal(signal.SIGTERM)
        wait_for(lambda: not any(tmp_path.glob(".check-*-1")))
    finally:
        kill_family(process)


@pytest.mark.slow("starts its own mpirun")
@needs_namespaces
def test_no_libpython_is_named(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    hiding = str(ROOT / "tests/support/without_libpython.py")
    command = ["unshare", "--mount", *mpirun_command(1, hiding, str(scratch), SERVER, *flags(tmp_path / "new", 1))]
    code, text = check(command, {**os.environ, **mpi_environment()})
    (sentence,) = failures(text).values()
    assert re.match(
        r"Triton's Python stub needs libpython3\.\d+\.so\.1\.0 of this interpreter, and \S+ has none: ", sentence
    )
    assert code != 0
    shutil.rmtree(scratch)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path) as made:
        yield made


@pytest.mark.slow("starts mpirun over two nodes")
@needs_namespaces
def test_two_nodes_are_well(nodes: Nodes) -> None:
    code, text = check(nodes.mpirun(2, SERVER, *flags(nodes.folder / "new", 4)), nodes.environment)
    assert code == 0
    found = lines(text)
    assert found["hosts"] == (True, "2 ranks on n0, 2 ranks on n1")
    rates = r"MPI, 4 MiB: \d+ to \d+ MB/s within a host; \d+ MB/s between n0 and n1"
    assert found["all-reduce"][0] and re.fullmatch(rates, found["all-reduce"][1])


@pytest.mark.slow("starts mpirun over two nodes, and waits until one has not answered")
@needs_namespaces
def test_a_node_that_mpi_does_not_reach_is_named(nodes: Nodes) -> None:
    """As behind a firewall: mpirun reaches it, the ranks' messages do not. The folder still says which host it is."""
    nodes.block_ranks()
    command = nodes.mpirun(1, SERVER, *flags(nodes.folder / "new"))
    code, text = check(command, nodes.environment)
    (sentence,) = failures(text).values()
    assert re.match(r"rank 1 on n1 does not answer rank 0 on n0 within 10 s: look at its host", sentence)
    assert code != 0
