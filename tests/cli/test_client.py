"""client.py itself: flags, exit codes, signals, against a stand-in for the server (tests/e2e has the real one)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import client
from cli.output import ResultWriter
from tests.support.launch import ROOT, free_ports, wait_for
from tests.support.standin_server import StandinServer, standin, write


@pytest.fixture
def server() -> Iterator[StandinServer]:
    with standin() as it:
        yield it


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output-len", "0"],
        ["--output-len", "x"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--presence-penalty", "nan"],
        ["--top-k", "1.5"],
        ["--random-seed", "-1"],
        ["--random-seed", str(2**64)],
        ["--top-k", str(2**32)],
        ["--early-stopping", "maybe"],
        ["--url", "https://host"],
        ["--url", "host:port"],
        ["--bench-prompt-len", "9:3"],
        ["--concurrency", "0"],
        ["--system", "Be kind."],
    ],
)
def test_bad_flags_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        client.parse_flags(["--prompts", "a", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("host", "http://host:8000"),
        ("127.0.0.1:81", "http://127.0.0.1:81"),
        ("grpc://host", "grpc://host:8001"),
        ("http://[::1]:9/", "http://[::1]:9"),
    ],
)
def test_url_gets_scheme_and_port(text: str, url: str) -> None:
    assert client.parse_flags(["--bench", "--url", text]).url == url


def test_one_thing_is_asked() -> None:
    for arguments in (["--bench", "--prompts", "a"], ["--prompts", "a", "--prompts-file", "b"]):
        with pytest.raises(SystemExit):
            client.parse_flags(arguments)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_four_default_prompts(server: StandinServer, stream: list[str]) -> None:
    code, out, err = server.ask("--output-len", "2", "--concurrency", "1", *stream)
    prompts = ["Q: How are you?", "Q: How big is the universe?", "1 2 3 4 ", "a b c d "]
    rule = out.splitlines()[0]
    assert (code, err) == (0, "")
    assert out == "".join(f"{rule}\n{prompt} w0 w1\n" for prompt in prompts) + f"{rule}\n"
    assert [inputs["prompts"].item().decode() for inputs in server.model.asked] == prompts


def test_default_prompts_are_not_added_to_others(server: StandinServer, tmp_path: Path) -> None:
    assert not client.parse_flags(["--bench"]).prompts
    assert not client.parse_flags(["--prompts-file", "f"]).prompts
    assert server.ask("--prompts", "mine", "--output-len", "1")[0] == 0
    assert server.ask("--prompts-file", write(tmp_path / "p.txt", "file"), "--output-len", "1")[0] == 0
    assert [inputs["prompts"].item() for inputs in server.model.asked] == [b"mine", b"file"]


def test_help_needs_no_numpy() -> None:
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import client; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd="/")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_full_disk_ends_it_in_one_sentence(
    server: StandinServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    server.model.token_s = 0.05
    monkeypatch.setattr(ResultWriter, "add", full)
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "output_len": 1}, {"prompt": "b", "output_len": 10000})
    code, _, err = server.ask("--prompts-file", path, "--output", str(tmp_path / "o"))
    assert (code, err) == (1, "client.py: [Errno 28] No space left on device\n")
    assert len(server.model.stopped) == 1


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_ctrl_c_cancels_and_keeps_what_is_finished(server: StandinServer, tmp_path: Path, stream: list[str]) -> None:
    server.model.token_s = 0.05
    lines = [{"prompt": f"{n}", "output_len": 10000 if n % 2 else 1} for n in range(7)] + [{"prompt": "waits"}] * 50
    output = tmp_path / "o.jsonl"
    path = write(tmp_path / "p.jsonl", *lines)
    process = server.start("--prompts-file", path, "--output", str(output), "--output-len", "10000", *stream)
    wait_for(lambda: len(server.model.running) == 8 and output.stat().st_size and "6" in output.read_text())
    running = list(server.model.running)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - started < 1.5
    assert sorted(server.model.stopped) == sorted(running)
    wait_for(lambda: not server.model.running)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["index"], record["sentences"]) for record in records] == [(n, [f"{n} w0"]) for n in (0, 2, 4, 6)]


def test_a_second_ctrl_c_ends_at_once(server: StandinServer) -> None:
    server.model.token_s, server.model.heeds_stops = 30.0, False
    process = server.start("--prompts", "a")
    wait_for(lambda: server.model.running)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.model.stopped)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert time.monotonic() - started < 0.5
    process.communicate()
    server.release()


def test_a_reader_who_leaves_is_as_ctrl_c(server: StandinServer) -> None:
    server.model.token_s = 0.05
    process = server.start("--prompts", "a", "--stream", "--output-len", "10000")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 130
    assert len(server.model.stopped) >= 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_without_a_server_exit_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("http", "grpc"):
        url = f"{kind}://127.0.0.1:{free_ports(1)[0]}"
        monkeypatch.setattr(sys, "argv", ["client.py", "--url", url, "--prompts", "x", "--init-timeout-s", "0.5"])
        assert client.main() == 3
        assert capsys.readouterr().err == f"client.py: no model gpt2 at {url} within 0.5 s\n"
