"""client.py's flags, tensors and output, without a server (tests/e2e has one)."""

from __future__ import annotations

import json

import numpy as np
import pytest

import client


def test_absent_flags_are_not_sent() -> None:
    inputs = client.make_inputs(client.parse_flags(["--prompts", "a", "bc"]))
    assert set(inputs) == {"prompts", "request_output_len"}
    assert inputs["prompts"].tolist() == [[b"a"], [b"bc"]]
    assert (inputs["request_output_len"].dtype, inputs["request_output_len"].shape) == (np.uint32, (2, 1))


def test_flags_become_one_value_per_prompt() -> None:
    arguments = "--prompts a b --output-len 5 --beam-width 2 --top-k 3 --top-p 0.5 --temperature 0.7 --random-seed 9"
    inputs = client.make_inputs(client.parse_flags(arguments.split()))
    values = {name: (array.dtype.name, array.ravel().tolist()) for name, array in inputs.items() if name != "prompts"}
    half, warm = float(np.float32(0.5)), float(np.float32(0.7))
    assert values == {
        "request_output_len": ("uint32", [5, 5]),
        "beam_width": ("uint32", [2, 2]),
        "runtime_top_k": ("uint32", [3, 3]),
        "runtime_top_p": ("float32", [half, half]),
        "temperature": ("float32", [warm, warm]),
        "random_seed": ("uint64", [9, 9]),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output-len", "0"],
        ["--output-len", "x"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-k", "1.5"],
        ["--random-seed", "-1"],
        ["--random-seed", str(2**64)],
        ["--top-k", str(2**32)],
    ],
)
def test_bad_flags_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        client.parse_flags(["--prompts", "a", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


ANSWERS = {
    "sentences": np.array([[["one é".encode()]], [[b"two"]]], dtype=object),
    "sequence_length": np.array([[3], [2]]),
    "output_ids": np.array([[[1, 2, 3]], [[4, 5, 0]]], dtype=np.int32),
}


def test_text_is_printed_under_rules(capsys: pytest.CaptureFixture[str]) -> None:
    client.show(["one", "t"], ANSWERS, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("─")] == ["one é", "two"]
    assert lines[0] == lines[2] == lines[4] and set(lines[0]) == {"─"}


def test_json_is_one_object_per_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    client.show(["one", "t"], ANSWERS, as_json=True)
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert objects == [
        {"prompt": "one", "sentences": ["one é"], "sequence_length": [3], "output_ids": [[1, 2, 3]]},
        {"prompt": "t", "sentences": ["two"], "sequence_length": [2], "output_ids": [[4, 5]]},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Error occurred during inference request. Message: [request id: 0] BadRequest: the sentence",
        "Message: BadRequest: the sentence",
        "the sentence",
    ],
)
def test_the_servers_own_sentence_is_shown(text: str) -> None:
    assert client._sentence(Exception(text)) == "the sentence"
