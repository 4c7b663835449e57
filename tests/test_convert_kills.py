"""convert.py when it is killed, locked out, short of disk or of memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import convert
from tests.support.checkpoints import make_gpt2, write_weights
from tests.support.folders import config_ini, weight_files
from tests.support.launch import conversion_memory

ROOT = Path(convert.__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small good checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2(folder)
    return folder


# --- kills, locks, full disks ---


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up, as shutil.rmtree is put out of action."""


@pytest.mark.parametrize("moment", ["first bytes", "last bytes", "manifest", "between the renames", "after them"])
@pytest.mark.parametrize("is_there", [False, True])
def test_killed_at_any_moment_leaves_no_false_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, is_there: bool
) -> None:
    if is_there:
        convert.convert(source, tmp_path, 2, "fp32")
    expected = weight_files(convert.convert(source, tmp_path / "good", 2, "fp16"))

    def progress(done: int, total: int) -> None:
        if moment == "first bytes" or (moment == "last bytes" and done == total):
            raise Killed

    def sync(path: Path) -> None:
        if moment == "manifest" and path.name == "manifest.json":
            os.truncate(path, 10)
            raise Killed
        if moment == "after them" and path == tmp_path:
            raise Killed

    def rename(self: Path, target: Path) -> None:
        if moment == "between the renames" and ".tmp-" in self.name:
            raise Killed
        os.rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(convert, "_sync", sync)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            convert.convert(source, tmp_path, 2, "fp16", progress=progress)
    folder = tmp_path / "2-gpu"
    if moment == "after them":
        assert weight_files(folder) == expected
    elif is_there and moment != "between the renames":
        assert config_ini(folder)["weight_data_type"] == "fp32"
        convert.verify(folder, checksums=True)
    else:
        assert not folder.exists()
    convert.convert(source, tmp_path, 2, "bf16")
    convert.convert(source, tmp_path, 2, "fp16")
    assert weight_files(folder) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [".convert.lock", "2-gpu", "good"]


@pytest.fixture(scope="module")
def big_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """450 MB of zeros in a file with a true header, which takes no space on the disk."""
    folder = tmp_path_factory.mktemp("big")
    with torch.device("meta"):
        config = transformers.GPT2Config(vocab_size=257, n_embd=1024, n_layer=9, n_head=16, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
    config.bos_token_id = config.eos_token_id = 256
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            size = 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return folder


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for large outputs, emptied at once: pytest keeps its own for three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "convert.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signal_in_the_middle(big_source: Path, scratch: Path, number: signal.Signals) -> None:
    process = start(big_source, scratch, "--tp", 2)
    deadline = time.monotonic() + 60
    while not (files := list(scratch.glob(".2-gpu.tmp-*/*.bin"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    left = sorted(path.name for path in scratch.iterdir())
    if number == signal.SIGKILL:
        assert (process.returncode, left[0]) == (-9, f".2-gpu.tmp-{process.pid}-{left[0][-8:]}")
        assert "2-gpu" not in left
    else:
        assert (process.returncode, output, errors, left) == (128 + number, "", "", [".convert.lock"])


def test_interrupt_cleans_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.ProgressLine, "__call__", interrupt)
    assert (convert.main([str(source), str(tmp_path)]), *capsys.readouterr()) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == [".convert.lock"]


def test_two_converters_take_turns(source: Path, tmp_path: Path) -> None:
    processes = [start(source, tmp_path, "--tp", 2) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    folder = re.escape(str(tmp_path / "2-gpu"))
    assert re.fullmatch(rf"{folder}: 899,328 bytes in \d+\.\d s, \d+ MB/s\n", outputs[0])
    assert re.fullmatch(rf"{folder}: already there\n", outputs[1])
    convert.verify(tmp_path / "2-gpu", checksums=True)


def test_lock_is_waited_for(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    thread = threading.Thread(target=convert.convert, args=(source, tmp_path, 2, "fp32"))
    with (tmp_path / ".convert.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert caplog.messages == [f"{tmp_path}: waiting for another converter to finish"]
    thread.join(30)
    convert.verify(tmp_path / "2-gpu", checksums=True)


def test_file_system_without_locks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre mounted without -o flock: converted all the same, and nobody's temporary folder is deleted."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".2-gpu.tmp-1-00000000").mkdir()
    convert.verify(convert.convert(source, tmp_path, 2, "fp32"), checksums=True)
    assert (tmp_path / ".2-gpu.tmp-1-00000000").is_dir()
    assert "cannot be locked against a second converter (Function not implemented)" in caplog.text


def test_too_little_space_is_found_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(RuntimeError, match=r": the conversion needs 899,328 bytes, and 1,000 are free$"):
        convert.convert(source, tmp_path, 2, "fp32")
    assert [path.name for path in tmp_path.iterdir()] == [".convert.lock"]


def test_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes write() fail half-way as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            convert.convert(source, tmp_path, 2, "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{tmp_path}: File too large; the conversion needs 899,328 bytes"
    assert [path.name for path in tmp_path.iterdir()] == [".convert.lock"]


# --- memory ---


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
@pytest.mark.parametrize("format", ["safetensors", pytest.param("bin", marks=pytest.mark.slow("writes 450 MB first"))])
def test_memory_does_not_grow_with_the_model(big_source: Path, scratch: Path, format: str) -> None:
    """450 MB of weights, the largest 17 MB."""
    if format == "bin":
        shutil.copyfile(big_source / "config.json", scratch / "config.json")
        write_weights(scratch, load_file(big_source / "model.safetensors"), "bin")
    folder = big_source if format == "safetensors" else scratch
    # MiB: mapped pages of up to 64 + 17, chunks of 32, what torch needs
    assert conversion_memory(folder, scratch / "out", 2) < 250
