"""cli/output.py: what is printed and kept, prompt by prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.output import Screen, make_record
from cli.parameters import Prompt
from client import parse_flags
from tests.support.standin_server import StandinServer, standin, write


@pytest.fixture
def server() -> Iterator[StandinServer]:
    with standin() as it:
        yield it


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_text_is_printed_under_rules(server: StandinServer, kind: str) -> None:
    for stream in ([], ["--stream"]):
        code, out, err = server.ask("--prompts", "é", "t", "--output-len", "2", *stream, kind=kind)
        lines = out.splitlines()
        assert (code, err) == (0, "")
        assert [line for line in lines if not line.startswith("─")] == ["é w0 w1", "t w0 w1"]
        assert lines[0] == lines[2] == lines[4] and set(lines[0]) == {"─"}


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("n", [1, 2])
def test_json_is_one_object_per_prompt(server: StandinServer, kind: str, n: int) -> None:
    flags = ["--prompts", "a", "b", "--output-len", "2", "--n", str(n), "--top-k", "2", "--json"]
    code, out, _ = server.ask(*flags, kind=kind)
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
    _, out, _ = server.ask(*flags, "--stream", kind=kind)
    lines = [json.loads(line) for line in out.splitlines()]
    if n == 1:  # the new tokens only
        expected = [{**record, "output_ids": [[0, 1]]} for record in expected]
        assert lines[:2] == [
            {"index": 0, "pieces": ["a w0"], "output_ids": [[0]]},
            {"index": 0, "pieces": [" w1"], "output_ids": [[1]]},
        ]
    assert [line for line in lines if "prompt" in line] == expected


def test_stream_flushes_each_piece(server: StandinServer) -> None:
    server.model.token_s = 0.3
    process = server.start("--prompts", "a", "--stream", "--output-len", "4")
    assert process.stdout.readline().startswith("─")
    assert process.stdout.read(len("a w0 w1")) == "a w0 w1"
    assert len(server.model.running) == 1  # it goes on
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.splitlines()[0], err) == (0, " w2 w3", "")


def test_pieces_appear_as_they_come_one_prompt_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(parse_flags(["--prompts", "a", "b", "--stream"]), 2)

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


def test_output_has_all_prompts_in_order(server: StandinServer, tmp_path: Path) -> None:
    server.model.token_s = 0.02
    lines = [{"prompt": "slow", "output_len": 9}, {"prompt": "bad"}, {"prompt": "c"}, {"input_ids": [4], "n": 2}]
    output = tmp_path / "o.jsonl"
    output.write_text("old\n" * 1000)
    flags = ["--prompts-file", write(tmp_path / "p.jsonl", *lines), "--output", str(output), "--output-len", "1"]
    code, out, err = server.ask(*flags)
    assert (code, out, err) == (1, "", f"client.py: 1 of 4 prompts failed; {output} has the errors\n")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert records[1] == {"index": 1, "prompt": "bad", "error": "prompts[0] is bad"}
    assert records[0]["sentences"] == ["slow w0 w1 w2 w3 w4 w5 w6 w7 w8"]
    assert (records[3]["input_ids"], records[3]["sentences"]) == ([4], ["ids w0", "ids w0"])
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == []


def test_concurrency_is_a_limit(server: StandinServer, tmp_path: Path) -> None:
    server.model.token_s = 0.1
    started = time.monotonic()
    path = write(tmp_path / "p", *map(str, range(8)))
    assert server.ask("--prompts-file", path, "--output-len", "1", "--concurrency", "4")[0] == 0
    assert 0.2 <= time.monotonic() - started < 0.8


def test_a_record_joins_responses_and_has_no_infinity() -> None:
    responses = [
        {"sentences": np.array(["a b"]), "output_ids": np.array([[1]]), "output_log_probs": np.array([[-np.inf]])},
        {"sentences": np.array([" c"]), "output_ids": np.array([[2, 3]]), "output_log_probs": np.array([[-1.0, -2.0]])},
        {"sentences": np.array([""]), "output_ids": np.zeros((1, 0)), "output_log_probs": np.zeros((1, 0))},
    ]
    record = make_record(Prompt({"input_ids": [5]}, {}), responses)
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
    record = make_record(Prompt({"prompt": "p"}, {}), [response])
    assert record["output_ids"] == [[1, 2, 3], [4, 5]]
