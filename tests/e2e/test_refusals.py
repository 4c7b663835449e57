"""server.py refuses to start on a bad command line or a damaged folder, with one sentence, on all ranks."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Ports, Server, flags_of
from tests.support.ranks import call_ranks


def refusal(num_ranks: int, *flags: str) -> str:
    """What all ranks print of a start that each must end with code 1."""
    ends = call_ranks(num_ranks, "tests.multi.refused_start:run", *Ports().port_flags, *flags)
    text = "".join(printed for _, printed in ends)
    assert [code for code, _ in ends] == [1] * num_ranks, text
    assert "Traceback" not in text
    return text


def test_mpirun_ends_with_the_sentence_and_a_code(converted: Callable[[int], Path], tmp_path: Path) -> None:
    """Under an mpirun of its own; the other refusals are of ranks that stay."""
    server = Server(2, tmp_path / "log", *flags_of(converted(1), 2))
    try:
        assert server.process.wait(120) == 1, server.text
    finally:
        server.kill()
    assert server.text.count("was converted for tp 1, and --tp is 2") == 1, server.text
    assert "Traceback" not in server.text


def test_wrong_world_size_says_the_right_command(converted: Callable[[int], Path]) -> None:
    text = refusal(1, *flags_of(converted(2), 2))
    assert "tp × pp takes 2 ranks and 1 were started: mpirun -n 2 " in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--hf-model-name", "/no/such/folder"],
            "hf_model_name is '/no/such/folder', and there is no such folder or file",
        ),
        (["--tp", "2"], "was converted for tp 1, and --tp is 2"),
        (
            ["--pp", "2", "--model-name", "a b"],
            "model_name is 'a b'; it may have letters, digits, '_', '.' and '-' only",
        ),
        (["--max-seq-len", "257"], "max_seq_len is 257; the model has 256 positions"),
        (["--data-type", "fp16"], "data_type is fp16; on a CPU it must be fp32 or bf16"),
        (["--device", "cuda"], "device is cuda, and torch sees no GPU"),
        (["--engine", "fastertransformer"], "and there is no such file"),
    ],
)
def test_what_cannot_start_says_why_once(converted: Callable[[int], Path], flags: list[str], expected: str) -> None:
    num_ranks = 2 if {"--tp", "--pp"} & set(flags) else 1
    text = refusal(num_ranks, *flags_of(converted(1)), *flags)
    assert text.count(expected) == 1, text


def test_a_port_in_use_is_named(converted: Callable[[int], Path]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        text = refusal(1, *flags_of(converted(1)), "--http-port", str(port))
    assert f"http_port is {port}; 127.0.0.1 cannot be bound there (Address already in use)" in text


# Without its manifest a folder passes for one of FasterTransformer's, which has no tokenizer.
TOKENIZER_FILES = ("manifest.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "model.wte.bin").write_bytes(b"1234"), "model.wte.bin: "),
        (lambda f: (f / "model.layers.1.mlp.dense_4h_to_h.weight.1.bin").unlink(), "weight.1.bin: "),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: 1 bytes; the manifest says "),
        (lambda f: [(f / name).unlink() for name in TOKENIZER_FILES], "has no tokenizer that transformers can read"),
        (lambda f: (f / "config.ini").write_text("[gpt]\nhead_num = 4\n"), "is missing from [gpt]"),
    ],
    ids=["truncated", "missing", "tokenizer", "no tokenizer", "config.ini"],
)
def test_a_damaged_folder_is_refused_on_all_ranks(
    converted: Callable[[int], Path], tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    folder = tmp_path / "2-gpu"
    shutil.copytree(converted(2), folder)
    damage(folder)
    text = refusal(2, *flags_of(folder, 2))
    assert expected in text
