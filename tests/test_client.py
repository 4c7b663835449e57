"""client.py against a stand-in for the server, and its flags, files and output without one (tests/e2e has the real)."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import client
from tests.launch import ROOT, free_ports
from tests.standin_server import NAME, StandinServer, standin

Ask = Callable[..., tuple[int, str, str]]
# Every tensor that the server takes and a user may set, and a flag for it.
FLAGS = {
    "request_output_len": ("--output-len 5", "uint32", [5]),
    "beam_width": ("--beam-width 2", "uint32", [2]),
    "len_penalty": ("--len-penalty -0.5", "float32", [-0.5]),
    "beam_search_diversity_rate": ("--beam-search-diversity-rate 0.5", "float32", [0.5]),
    "early_stopping": ("--early-stopping never", "object", [b"never"]),
    "n": ("--n 3", "uint32", [3]),
    "runtime_top_k": ("--top-k 0", "uint32", [0]),
    "runtime_top_p": ("--top-p 0.5", "float32", [0.5]),
    "temperature": ("--temperature 0.25", "float32", [0.25]),
    "random_seed": (f"--random-seed {2**64 - 1}", "uint64", [2**64 - 1]),
    "top_p_decay": ("--top-p-decay 0.5", "float32", [0.5]),
    "top_p_min": ("--top-p-min 0.125", "float32", [0.125]),
    "top_p_reset_ids": ("--top-p-reset-ids 7", "uint32", [7]),
    "repetition_penalty": ("--repetition-penalty 1.5", "float32", [1.5]),
    "presence_penalty": ("--presence-penalty -1", "float32", [-1]),
    "frequency_penalty": ("--frequency-penalty 2", "float32", [2]),
    "min_length": ("--min-length 4", "uint32", [4]),
    "bad_words": ("--bad-words é", "object", ["é".encode()]),
    "stop_words": ("--stop-words a b", "object", [b"a", b"b"]),
    "include_stop_words_in_output": ("--include-stop-words", "bool", [True]),
    "ignore_eos": ("--ignore-eos", "bool", [True]),
    "start_id": ("--start-id 1", "uint32", [1]),
    "end_id": ("--end-id 2", "uint32", [2]),
    "exclude_input_in_output": ("--exclude-input", "bool", [True]),
    "skip_special_tokens": ("--no-skip-special-tokens", "bool", [False]),
    "is_return_log_probs": ("--log-probs", "bool", [True]),
    "num_log_probs": ("--num-log-probs 3", "uint32", [3]),
    "is_return_prompt_log_probs": ("--prompt-log-probs", "bool", [True]),
    "is_return_next_token_logits": ("--next-token-logits", "bool", [True]),
    "deadline_s": ("--deadline-s 1.5", "float32", [1.5]),
}


@pytest.fixture(scope="module")
def one_server() -> Iterator[StandinServer]:
    with standin() as server:
        yield server


@pytest.fixture
def server(one_server: StandinServer, monkeypatch: pytest.MonkeyPatch) -> StandinServer:
    one_server.model.__init__()
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.02)
    return one_server


@pytest.fixture
def ask(server: StandinServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """client.main in this process: (exit code, stdout, stderr)."""

    def run(*flags: str, kind: str = "http") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["client.py", "--url", server.url(kind), "--model-name", NAME, *flags])
        code = client.main()
        return code, *capfd.readouterr()

    return run


def inputs_of(*arguments: str) -> dict[str, np.ndarray]:
    return client.make_inputs(client.read_prompts(client.parse_flags([*arguments, "--prompts", "a"]))[0])


def plain(inputs: dict[str, np.ndarray]) -> dict[str, tuple[str, list]]:
    return {name: (array.dtype.name, array.tolist()) for name, array in inputs.items()}


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_absent_flags_are_not_sent() -> None:
    assert plain(inputs_of()) == {"prompts": ("object", [b"a"]), "request_output_len": ("uint32", [32])}


def test_every_tensor_has_a_flag() -> None:
    assert set(FLAGS) == {parameter.tensor for parameter in client.PARAMETERS}
    arguments = " ".join(flag for flag, _, _ in FLAGS.values()).split()
    expected = {tensor: (dtype, values) for tensor, (_, dtype, values) in FLAGS.items()}
    assert plain(inputs_of(*arguments)) == {"prompts": ("object", [b"a"]), **expected}


@pytest.mark.parametrize("is_tensor_name", [False, True])
def test_every_parameter_is_a_key_of_a_line(tmp_path: Path, is_tensor_name: bool) -> None:
    line: dict = {"prompt": "a"}
    for parameter in client.PARAMETERS:
        values = [v.decode() if isinstance(v, bytes) else v for v in FLAGS[parameter.tensor][2]]
        line[parameter.tensor if is_tensor_name else parameter.name] = values if parameter.is_list else values[0]
    path = write(tmp_path / "p.jsonl", line)
    (prompt,) = client.read_prompts(client.parse_flags(["--prompts-file", path]))
    assert plain(client.make_inputs(prompt)) == plain(inputs_of(*" ".join(f for f, _, _ in FLAGS.values()).split()))


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
    for arguments in ([], ["--bench", "--prompts", "a"], ["--prompts", "a", "--prompts-file", "b"]):
        with pytest.raises(SystemExit):
            client.parse_flags(arguments)


def test_lines_of_text_are_prompts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\\n é\r\n \n  two\u2028three ".encode())
    prompts = client.read_prompts(client.parse_flags(["--prompts-file", str(path), "--top-k", "2"]))
    assert [prompt.asked["prompt"] for prompt in prompts] == ["one\\n é", "  two\u2028three "]
    assert prompts[0].parameters == {"output_len": 32, "top_k": 2}


def test_a_line_goes_before_the_flags(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "top_k": 9, "stop_words": "x"}, {"input_ids": [1, 2], "stop_words": [], "top_k": None}]
    flags = ["--prompts-file", write(tmp_path / "p.jsonl", *lines), "--top-k", "2", "--stop-words", "s"]
    first, second = map(client.make_inputs, client.read_prompts(client.parse_flags(flags)))
    assert first["runtime_top_k"].tolist() == [9] and first["stop_words"].tolist() == [b"x"]
    assert plain(second) == {"input_ids": ("int32", [1, 2]), "request_output_len": ("uint32", [32])}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", "not a JSON object"),
        ({"top_k": 1}, "it must have either prompt or input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "it must have either prompt or input_ids"),
        ({"prompt": 1}, "prompt is 1; it must be of type str"),
        ({"input_ids": []}, "input_ids must be a list of tokens"),
        ({"input_ids": [1.5]}, "input_ids must be a list of tokens"),
        ({"prompt": "a", "tempratur": 1}, "no parameter is called tempratur (did you mean temperature?)"),
        ({"prompt": "a", "zzz": 1}, "no parameter is called zzz"),
        ({"prompt": "a", "top_k": "1"}, "top_k is '1'; it must be of type int"),
        ({"prompt": "a", "top_k": True}, "top_k is True; it must be of type int"),
        ({"prompt": "a", "output_len": 0}, "output_len is 0; it must be between 1 and 4294967295"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1; it must be between 0 and inf"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos is 1; it must be of type bool"),
        ({"prompt": "a", "stop_words": ["a", 1]}, "stop_words is 1; it must be of type str"),
        ({"prompt": "a", "early_stopping": "no"}, "early_stopping is 'no'; it must be one of false, true, never"),
    ],
)
def test_a_bad_line_is_one_sentence_and_nothing_is_sent(
    ask: Ask, server: StandinServer, tmp_path: Path, line: object, expected: str
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, "", line)
    code, out, err = ask("--prompts-file", path)
    assert (code, out, err) == (2, "", f"client.py: {path}:3: {expected}\n")
    assert not server.model.asked


def test_a_file_that_cannot_be_used_exits_2(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"good\n\xff\n")
    expected = f"client.py: {tmp_path}/latin:2: not valid UTF-8: invalid start byte at byte 0\n"
    assert ask("--prompts-file", str(tmp_path / "latin")) == (2, "", expected)
    assert ask("--prompts-file", str(tmp_path / "none"))[2].endswith("cannot be read (No such file or directory)\n")
    empty = write(tmp_path / "empty", "")
    assert ask("--prompts-file", empty) == (2, "", f"client.py: {empty} has no prompts\n")
    good = write(tmp_path / "good", "a")
    assert "is --prompts-file" in ask("--prompts-file", good, "--output", good)[2]
    assert "is no regular file" in ask("--prompts-file", good, "--output", "/dev/null")[2]
    assert "cannot be written" in ask("--prompts-file", good, "--output", str(tmp_path / "no" / "where"))[2]
    assert Path(good).read_text() == "a\n"


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_text_is_printed_under_rules(ask: Ask, kind: str) -> None:
    for stream in ([], ["--stream"]):
        code, out, err = ask("--prompts", "é", "t", "--output-len", "2", *stream, kind=kind)
        lines = out.splitlines()
        assert (code, err) == (0, "")
        assert [line for line in lines if not line.startswith("─")] == ["é w0 w1", "t w0 w1"]
        assert lines[0] == lines[2] == lines[4] and set(lines[0]) == {"─"}


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("n", [1, 2])
def test_json_is_one_object_per_prompt(ask: Ask, kind: str, n: int) -> None:
    flags = ["--prompts", "a", "b", "--output-len", "2", "--n", str(n), "--top-k", "2", "--json"]
    code, out, _ = ask(*flags, kind=kind)
    expected = [
        {
            "prompt": prompt,
            "sentences": [f"{prompt} w0 w1"] * n,
            "sequence_length": [3] * n,
            "finish_reason": ["length"] * n,
            "output_ids": [[99, 0, 1]] * n,
        }
        for prompt in ("a", "b")
    ]
    assert (code, [json.loads(line) for line in out.splitlines()]) == (0, expected)
    _, out, _ = ask(*flags, "--stream", kind=kind)
    lines = [json.loads(line) for line in out.splitlines()]
    if n == 1:  # the new tokens only
        expected = [{**record, "output_ids": [[0, 1]]} for record in expected]
        assert lines[:2] == [
            {"index": 0, "pieces": ["a w0"], "output_ids": [[0]]},
            {"index": 0, "pieces": [" w1"], "output_ids": [[1]]},
        ]
    assert [line for line in lines if "prompt" in line] == expected


def test_alternatives_of_an_event_get_their_shape_back() -> None:
    response = {"model_name": "x", "sentences": ["a", "b"], "output_ids": [1, 2], "top_token_ids": list(range(6))}
    arrays = client._arrays(response, num_alternatives=3)
    assert arrays["output_ids"].tolist() == [[1], [2]]
    assert arrays["top_token_ids"].tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert client._arrays({"sentences": "a", "output_ids": 7}, 1)["output_ids"].tolist() == [[7]]


def test_a_record_joins_responses_and_has_no_infinity() -> None:
    responses = [
        {"sentences": np.array(["a b"]), "output_ids": np.array([[1]]), "output_log_probs": np.array([[-np.inf]])},
        {"sentences": np.array([" c"]), "output_ids": np.array([[2, 3]]), "output_log_probs": np.array([[-1.0, -2.0]])},
        {"sentences": np.array([""]), "output_ids": np.zeros((1, 0)), "output_log_probs": np.zeros((1, 0))},
    ]
    record = client.make_record(client.Prompt({"input_ids": [5]}, {}), responses)
    assert record == {
        "input_ids": [5],
        "sentences": ["a b c"],
        "output_ids": [[1, 2, 3]],
        "output_log_probs": [[None, -1.0, -2.0]],
    }


def test_padding_is_cut_at_the_sequence_length() -> None:
    response = {
        "sentences": np.array([["x"], ["y"]]),
        "sequence_length": np.array([3, 2]),
        "output_ids": np.array([[1, 2, 3], [4, 5, 0]]),
    }
    record = client.make_record(client.Prompt({"prompt": "p"}, {}), [response])
    assert record["output_ids"] == [[1, 2, 3], [4, 5]]


def test_pieces_appear_as_they_come_one_prompt_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    screen = client.Screen(client.parse_flags(["--prompts", "a", "b", "--stream"]), 2)

    def printed(index: int, piece: str) -> str:
        screen.show_piece(index, {"sentences": np.array([piece])})
        return capsys.readouterr().out.replace("─", "").lstrip("\n")

    assert [printed(1, "b0"), printed(0, "a0"), printed(1, " b1"), printed(0, " a1")] == ["", "a0", "", " a1"]
    screen.show(0, {})
    assert capsys.readouterr().out.replace("─", "") == "\n\nb0 b1"
    assert printed(1, " b2") == " b2"
    screen.show(1, {"error": "it ended"})
    screen.close()
    out, err = capsys.readouterr()
    assert (out.replace("─", ""), err) == ("\n\n", "client.py: prompt 2: it ended\n")


def test_stream_flushes_each_piece(server: StandinServer) -> None:
    server.model.token_s = 0.3
    process = start(server, "--prompts", "a", "--stream", "--output-len", "4")
    assert process.stdout.readline().startswith("─")
    assert process.stdout.read(len("a w0 w1")) == "a w0 w1"
    assert len(server.model.running) == 1  # it goes on
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.splitlines()[0], err) == (0, " w2 w3", "")


def start(server: StandinServer, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "client.py"), "--url", server.url(), "--model-name", NAME, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize("trouble", ["busy", "reset"])
def test_busy_and_broken_connections_are_tried_again(
    ask: Ask, server: StandinServer, kind: str, stream: list[str], trouble: str
) -> None:
    code, out, _ = ask("--prompts", f"{trouble} 3", "--output-len", "1", *stream, kind=kind)
    assert (code, out.splitlines()[1]) == (0, f"{trouble} 3 w0")
    assert server.model.tries == {f"{trouble} 3": 4}
    first, second, third = np.diff(server.model.times)
    assert 0.01 <= first and 0.02 <= second and 0.04 <= third  # half of the pause, or more, is by chance


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_refusals_and_defects_are_not(ask: Ask, server: StandinServer, kind: str, stream: list[str]) -> None:
    code, out, err = ask("--prompts", "bad", "good", "broken", "--output-len", "1", *stream, kind=kind)
    assert (code, out.splitlines()[1]) == (1, "good w0")
    assert err.splitlines() == [
        "client.py: prompt 1: prompts[0] is bad",
        "client.py: prompt 3: internal error: it broke",
    ]
    assert server.model.tries == {"bad": 1, "good": 1, "broken": 1}


def test_retries_end(ask: Ask, server: StandinServer) -> None:
    expected = (1, "", "client.py: the queue is full\n")
    assert ask("--prompts", "busy 9", "--retries", "2") == expected
    assert server.model.tries == {"busy 9": 3}


def test_a_stranger_behind_the_url_is_named(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_json(*args: object) -> dict:
        return json.loads("<html>")

    monkeypatch.setattr(client, "_arrays", no_json)
    code, _, err = ask("--prompts", "a", "--stream")
    sentence = "the answer cannot be read (JSONDecodeError: Expecting value: line 1 column 1 (char 0))"
    assert (code, err) == (1, f"client.py: {sentence}\n")


def test_a_full_disk_ends_it_in_one_sentence(
    ask: Ask, server: StandinServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    server.model.token_s = 0.05
    monkeypatch.setattr(client.Journal, "add", full)
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "output_len": 1}, {"prompt": "b", "output_len": 10000})
    code, _, err = ask("--prompts-file", path, "--output", str(tmp_path / "o"))
    assert (code, err) == (1, "client.py: [Errno 28] No space left on device\n")
    assert len(server.model.stopped) == 1


def test_a_server_that_went_away_is_not_waited_for_with_every_prompt(ask: Ask, server: StandinServer) -> None:
    prompts = ["reset 8", "reset 9", "reset 1", "reset 10"]
    code, _, err = ask("--prompts", *prompts, "--retries", "2", "--concurrency", "1")
    assert (code, len(err.splitlines())) == (1, 4)
    assert f"the connection to {server.url()} broke (ServerDisconnectedError" in err
    assert server.model.tries == {"reset 8": 3, "reset 9": 1, "reset 1": 1, "reset 10": 1}


def test_each_try_has_a_request_id_of_its_own(ask: Ask, server: StandinServer) -> None:
    assert ask("--prompts", *"abcde")[0] == 0
    assert len({inputs["request_id"].item() for inputs in server.model.asked}) == 5


def test_output_has_all_prompts_in_order(ask: Ask, server: StandinServer, tmp_path: Path) -> None:
    server.model.token_s = 0.02
    lines = [{"prompt": "slow", "output_len": 9}, {"prompt": "bad"}, {"prompt": "c"}, {"input_ids": [4], "n": 2}]
    output = tmp_path / "o.jsonl"
    output.write_text("old\n" * 1000)
    flags = ["--prompts-file", write(tmp_path / "p.jsonl", *lines), "--output", str(output), "--output-len", "1"]
    code, out, err = ask(*flags)
    assert (code, out, err) == (1, "", f"client.py: 1 of 4 prompts failed; {output} has the errors\n")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert records[1] == {"index": 1, "prompt": "bad", "error": "prompts[0] is bad"}
    assert records[0]["sentences"] == ["slow w0 w1 w2 w3 w4 w5 w6 w7 w8"]
    assert (records[3]["input_ids"], records[3]["sentences"]) == ([4], ["ids w0", "ids w0"])
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == []


def test_concurrency_is_a_limit(ask: Ask, server: StandinServer, tmp_path: Path) -> None:
    server.model.token_s = 0.1
    started = time.monotonic()
    path = write(tmp_path / "p", *map(str, range(8)))
    assert ask("--prompts-file", path, "--output-len", "1", "--concurrency", "4")[0] == 0
    assert 0.2 <= time.monotonic() - started < 0.8


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_ctrl_c_cancels_and_keeps_what_is_finished(server: StandinServer, tmp_path: Path, stream: list[str]) -> None:
    server.model.token_s = 0.05
    lines = [{"prompt": f"{n}", "output_len": 10000 if n % 2 else 1} for n in range(7)] + [{"prompt": "waits"}] * 50
    output = tmp_path / "o.jsonl"
    path = write(tmp_path / "p.jsonl", *lines)
    process = start(server, "--prompts-file", path, "--output", str(output), "--output-len", "10000", *stream)
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
    process = start(server, "--prompts", "a")
    wait_for(lambda: server.model.running)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.model.stopped)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert time.monotonic() - started < 0.5
    process.communicate()
    server.release()


def wait_for(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_reader_who_leaves_is_as_ctrl_c(server: StandinServer) -> None:
    server.model.token_s = 0.05
    process = start(server, "--prompts", "a", "--stream", "--output-len", "10000")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 130
    assert len(server.model.stopped) >= 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_timeout_cancels_the_request(ask: Ask, server: StandinServer) -> None:
    server.model.token_s = 0.1
    for stream in ([], ["--stream"]):
        code, _, err = ask("--prompts", "a", "--output-len", "1000", "--inference-timeout-s", "0.3", *stream)
        assert (code, err) == (1, "client.py: no answer within 0.3 s\n")
    wait_for(lambda: not server.model.running)
    assert len(server.model.stopped) == 2


def test_without_a_server_exit_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("http", "grpc"):
        url = f"{kind}://127.0.0.1:{free_ports(1)[0]}"
        monkeypatch.setattr(sys, "argv", ["client.py", "--url", url, "--prompts", "x", "--init-timeout-s", "0.5"])
        assert client.main() == 3
        assert capsys.readouterr().err == f"client.py: no model gpt2 at {url} within 0.5 s\n"


def test_a_model_that_comes_late_is_waited_for(server: StandinServer) -> None:
    flags = client.parse_flags(["--prompts", "a", "--model-name", NAME])

    class Late:
        calls = 0
        broken = (OSError,)
        url = "x"

        @property
        def client(self) -> Late:
            return self

        async def is_model_ready(self, model: str) -> bool:
            self.calls += 1
            if self.calls == 1:
                raise ConnectionRefusedError
            return self.calls == 3

    late = Late()
    assert asyncio.run(client.Asker(late, flags).is_ready()) and late.calls == 3


@pytest.mark.parametrize(
    "text",
    [
        "Error occurred during inference request. Message: [request id: 0] BadRequest: the sentence",
        "Message: BadRequest: the sentence",
        "[request id: <id_unknown>] ServerBusy: the sentence",
        "the sentence",
    ],
)
def test_the_servers_own_sentence_is_shown(text: str) -> None:
    assert client._sentence(text) == "the sentence"
