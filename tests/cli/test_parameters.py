"""cli/parameters.py: flags and lines of files become prompts, and these become tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.parameters import PARAMETERS, read_prompts
from cli.transport import make_inputs
from client import parse_flags
from tests.support.standin_server import StandinServer, standin, write

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
    "end_id": ("--end-id 2 5", "uint32", [2, 5]),
    "exclude_input_in_output": ("--exclude-input", "bool", [True]),
    "skip_special_tokens": ("--no-skip-special-tokens", "bool", [False]),
    "is_return_log_probs": ("--log-probs", "bool", [True]),
    "num_log_probs": ("--num-log-probs 3", "uint32", [3]),
    "is_return_prompt_log_probs": ("--prompt-log-probs", "bool", [True]),
    "is_return_next_token_logits": ("--next-token-logits", "bool", [True]),
    "deadline_s": ("--deadline-s 1.5", "float32", [1.5]),
}

MESSAGES = [{"role": "user", "content": "a"}]
BAD_MESSAGES = "must be a list of objects with role and content, which are strings"


@pytest.fixture
def server() -> Iterator[StandinServer]:
    with standin() as it:
        yield it


def inputs_of(*arguments: str) -> dict[str, np.ndarray]:
    return make_inputs(read_prompts(parse_flags([*arguments, "--prompts", "a"]))[0])


def plain(inputs: dict[str, np.ndarray]) -> dict[str, tuple[str, list]]:
    return {name: (array.dtype.name, array.tolist()) for name, array in inputs.items()}


def test_absent_flags_are_not_sent() -> None:
    assert plain(inputs_of()) == {"prompts": ("object", [b"a"]), "request_output_len": ("uint32", [32])}


def test_every_tensor_has_a_flag() -> None:
    assert set(FLAGS) == {parameter.tensor for parameter in PARAMETERS}
    arguments = " ".join(flag for flag, _, _ in FLAGS.values()).split()
    expected = {tensor: (dtype, values) for tensor, (_, dtype, values) in FLAGS.items()}
    assert plain(inputs_of(*arguments)) == {"prompts": ("object", [b"a"]), **expected}


@pytest.mark.parametrize("is_tensor_name", [False, True])
def test_every_parameter_is_a_key_of_a_line(tmp_path: Path, is_tensor_name: bool) -> None:
    line: dict = {"prompt": "a"}
    for parameter in PARAMETERS:
        values = [v.decode() if isinstance(v, bytes) else v for v in FLAGS[parameter.tensor][2]]
        line[parameter.tensor if is_tensor_name else parameter.name] = values if parameter.is_list else values[0]
    path = write(tmp_path / "p.jsonl", line)
    (prompt,) = read_prompts(parse_flags(["--prompts-file", path]))
    assert plain(make_inputs(prompt)) == plain(inputs_of(*" ".join(f for f, _, _ in FLAGS.values()).split()))


def test_lines_of_text_are_prompts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\\n é\r\n \n  two\u2028three ".encode())
    prompts = read_prompts(parse_flags(["--prompts-file", str(path), "--top-k", "2"]))
    assert [prompt.content["prompt"] for prompt in prompts] == ["one\\n é", "  two\u2028three "]
    assert prompts[0].parameters == {"output_len": 32, "top_k": 2}


def test_a_line_goes_before_the_flags(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "top_k": 9, "stop_words": "x"}, {"input_ids": [1, 2], "stop_words": [], "top_k": None}]
    flags = ["--prompts-file", write(tmp_path / "p.jsonl", *lines), "--top-k", "2", "--stop-words", "s"]
    first, second = map(make_inputs, read_prompts(parse_flags(flags)))
    assert first["runtime_top_k"].tolist() == [9] and first["stop_words"].tolist() == [b"x"]
    assert plain(second) == {"input_ids": ("int32", [1, 2]), "request_output_len": ("uint32", [32])}


def test_prompts_of_a_chat_are_a_users_messages(tmp_path: Path) -> None:
    flags = ["--chat", "--prompts", "Hi \udcff", "b"]
    first, second = map(make_inputs, read_prompts(parse_flags(flags)))
    assert set(first) == {"messages", "request_output_len"}
    assert json.loads(first["messages"].item()) == [{"role": "user", "content": "Hi \udcff"}]
    assert json.loads(second["messages"].item()) == [{"role": "user", "content": "b"}]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}, {"role": "user", "content": "c"}]
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"messages": talk}, {"input_ids": [1, 2]})
    one, two, three = read_prompts(parse_flags(["--chat", "--system", "Be kind.", "--prompts-file", path]))
    assert one.content == {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]}
    assert json.loads(make_inputs(two)["messages"].item()) == talk
    assert three.content == {"input_ids": [1, 2]}
    (_, two, _) = read_prompts(parse_flags(["--prompts-file", path]))  # a line with messages is a chat anyway
    assert two.content == {"messages": talk}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[" * 3000, "not valid JSON: nested too deeply"),
        ("[1]", "not a JSON object"),
        ({"top_k": 1}, "it must have one of prompt, input_ids and messages"),
        ({"prompt": "a", "input_ids": [1]}, "it must have one of prompt, input_ids and messages"),
        ({"prompt": 1}, "prompt is 1; it must be of type str"),
        (
            {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
            "it must have one of prompt, input_ids and messages",
        ),
        ({"messages": "a"}, "messages must be a list of objects with role and content, which are strings"),
        (
            {"messages": [{"role": "user"}]},
            "messages must be a list of objects with role and content, which are strings",
        ),
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
        ({"prompt": "a", "end_id": [1, -1]}, "end_id is -1; it must be between 0 and 4294967295"),
        ({"prompt": "a", "early_stopping": "no"}, "early_stopping is 'no'; it must be one of false, true, never"),
    ],
)
def test_a_bad_line_is_one_sentence_and_nothing_is_sent(
    server: StandinServer, tmp_path: Path, line: object, expected: str
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, "", line)
    code, out, err = server.ask("--prompts-file", path)
    assert (code, out, err) == (2, "", f"client.py: {path}:3: {expected}\n")
    assert not server.model.asked


def test_a_file_that_cannot_be_used_exits_2(server: StandinServer, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"good\n\xff\n")
    expected = f"client.py: {tmp_path}/latin:2: not valid UTF-8: invalid start byte at byte 0\n"
    assert server.ask("--prompts-file", str(tmp_path / "latin")) == (2, "", expected)
    _, _, err = server.ask("--prompts-file", str(tmp_path / "none"))
    assert err.endswith("cannot be read (No such file or directory)\n")
    empty = write(tmp_path / "empty", "")
    assert server.ask("--prompts-file", empty) == (2, "", f"client.py: {empty} has no prompts\n")
    good = write(tmp_path / "good", "a")
    assert "is --prompts-file" in server.ask("--prompts-file", good, "--output", good)[2]
    assert "is no regular file" in server.ask("--prompts-file", good, "--output", "/dev/null")[2]
    assert "cannot be written" in server.ask("--prompts-file", good, "--output", str(tmp_path / "no" / "where"))[2]
    assert Path(good).read_text() == "a\n"
