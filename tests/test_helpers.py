"""helpers.py: what a name stands for, what of a Hub repository is downloaded, one sentence for each failure."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import JsonFormatter, ProgressLine, TextFormatter, find_checkpoint, model_key, one_line
from tests.support.hub import Fault, Hub
from tests.support.launch import ROOT, free_ports

SIDE_FILES = ["config.json", "generation_config.json", "merges.txt", "tokenizer.json", "vocab.json"]
OTHERS = [
    *("README.md", "flax_model.msgpack", "model.onnx", "rust_model.ot", "tf_model.h5", "64.tflite"),
    *("onnx/config.json", "onnx/model.safetensors", "original/tokenizer.model", "flax/pytorch_model.bin"),
]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
BIG_BYTES = 24 << 20  # more than two of the pieces (10 MiB) in which huggingface_hub writes files

# huggingface_hub reads its environment when it is imported, so each case has a process of its own.
SCRIPT = """
import json, sys, helpers
helpers.setup_logging()
helpers._PROGRESS_INTERVAL_S = 0.1
for name, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps({"path": str(helpers.find_checkpoint(name, revision))}))
    except ValueError as error:
        print(json.dumps({"sentence": str(error)}))
"""


@dataclass
class Machine:
    """A machine with a cache of its own; `log` is what the last call wrote to stderr."""

    endpoint: str
    folder: Path
    log: str = ""

    def find(self, name: str, revision: str | None = None, **environment: str) -> Path:
        (answer,) = self._run([(name, revision)], environment)
        assert "path" in answer, answer
        return Path(answer["path"])

    def sentence(self, name: str, revision: str | None = None, **environment: str) -> str:
        return self.sentences([(name, revision)], **environment)[0]

    def sentences(self, questions: list[tuple[str, str | None]], **environment: str) -> list[str]:
        """The errors, of which nothing but `hf_model_name is '<name>': ` is cut off."""
        answers = self._run(questions, environment)
        for (name, _), answer in zip(questions, answers, strict=True):
            assert answer.get("sentence", "").startswith(f"hf_model_name is {name!r}: "), answer
            assert "\n" not in answer["sentence"]
        return [answer["sentence"].partition("': ")[2] for answer in answers]

    def _run(self, questions: list[tuple[str, str | None]], environment: dict[str, str]) -> list[dict[str, str]]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        hub = {"HF_HOME": str(self.folder / "home"), "HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(questions)],
            env=inherited | hub | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.log = done.stderr
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(hub.endpoint, tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with safetensors and everything beside them that the Hub's repositories have."""
    return write(tmp_path_factory.mktemp("tiny"), *SIDE_FILES, *OTHERS, "model.safetensors", "pytorch_model.bin")


def write(folder: Path, *names: str, content: str = "") -> Path:
    """Files that differ from one another."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + name)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_gives_its_safetensors_and_nothing_else_that_is_large(
    hub: Hub, machine: Machine, tiny: Path
) -> None:
    """`*.json` and `*.safetensors` alone fit files of subfolders too: they were once downloaded with the rest."""
    hub.add("owner/tiny", tiny)
    folder = machine.find("owner/tiny")
    assert names(folder) == {*SIDE_FILES, "model.safetensors"}
    assert all((folder / name).read_bytes() == (tiny / name).read_bytes() for name in names(folder))
    assert hub.downloads() == dict.fromkeys([*SIDE_FILES, "model.safetensors"], 1)
    assert machine.find("owner/tiny") == folder
    assert hub.downloads().total() == len(SIDE_FILES) + 1


@pytest.mark.parametrize(
    "weights, ignored",
    [
        (["pytorch_model.bin"], ["tf_model.h5", "flax_model.msgpack"]),
        (["parrot.nemo"], ["onnx/x.nemo"]),
        (["pytorch_model.bin"], ["adapter_model.safetensors"]),  # not the model: once it kept the .bin file away
        ([*(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)), "pytorch_model.bin.index.json"], ["onnx/x.bin"]),
        ([*(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), "model.safetensors.index.json"], ["training.bin"]),
        ([*(f"model_0000{i}-of-00002.safetensors" for i in (1, 2)), "model.safetensors.index.json"], []),  # BLOOM's
    ],
)
def test_weights_in_other_files(
    hub: Hub, machine: Machine, tmp_path: Path, weights: list[str], ignored: list[str]
) -> None:
    hub.add("owner/tiny", write(tmp_path / "source", *SIDE_FILES, *weights, *ignored))
    assert names(machine.find("owner/tiny")) == {*SIDE_FILES, *weights}


@pytest.mark.parametrize("file", ["sub/folder/megatron.nemo", "odd[1]*.nemo"])
def test_one_file_of_a_repository(hub: Hub, machine: Machine, tmp_path: Path, file: str) -> None:
    hub.add("owner/tiny", write(tmp_path / "source", file, "odd1.nemo", "config.json"))
    path = machine.find(f"owner/tiny:{file}")
    assert path.read_text() == file
    assert hub.downloads() == {file: 1}
    assert machine.find(f"owner/tiny:{file}", **OFFLINE) == path


def test_an_id_without_an_owner_follows_the_hub_to_its_new_name(hub: Hub, machine: Machine, tiny: Path) -> None:
    hub.add("openai-community/gpt2", tiny)
    hub.moved["gpt2"] = "openai-community/gpt2"
    assert names(machine.find("gpt2")) == {*SIDE_FILES, "model.safetensors"}


def test_revisions_are_branches_tags_and_commits(hub: Hub, machine: Machine, tiny: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "old", "config.json", "model.safetensors", content="old ")
    repo = hub.add("owner/tiny", tiny, **{"v1.0": old})
    assert (machine.find("owner/tiny") / "config.json").read_text() == "config.json"
    assert (machine.find("owner/tiny", "v1.0") / "config.json").read_text() == "old config.json"
    commit = repo.revisions["v1.0"].commit
    assert machine.find("owner/tiny", commit) == machine.find("owner/tiny", "v1.0")
    assert hub.downloads()["config.json"] == 2


def test_a_name_that_stands_for_nothing(hub: Hub, machine: Machine, tiny: Path, tmp_path: Path) -> None:
    hub.add("owner/tiny", tiny)
    others = write(tmp_path / "text", "config.json", "adapter_model.safetensors", "onnx/pytorch_model.bin")
    hub.add("owner/text", others)
    unknown = f"no such folder here, and no such repository at {hub.endpoint} (a private one needs HF_TOKEN)"
    no_weights = "the repository has no model.safetensors or pytorch_model.bin (whole or in shards) or .nemo"
    no_id = "neither a folder or file here nor a Hub id (owner/name or owner/name:file)"
    expected = {
        ("owner/tiny", "v9"): "the repository has no revision 'v9'",
        ("owner/tiny:nope.nemo", None): "the repository has no file 'nope.nemo'",
        ("owner/tiny:nope.nemo", "v9"): "the repository has no revision 'v9'",
        ("owner/text", None): no_weights,
        ("owner/nope", None): unknown,
        ("nope", None): unknown,
        ("nope:file", None): unknown,
        ("two words", None): no_id,
        ("a/b/c:file", None): no_id,
    }
    assert dict(zip(expected, machine.sentences(list(expected)), strict=True)) == expected
    assert set(hub.downloads()) == {"config.json"}


def test_private_repositories_need_the_right_token(hub: Hub, machine: Machine, tiny: Path) -> None:
    hub.add("owner/secret", tiny, token="hf_right")
    hub.add("owner/other", tiny, token="hf_other")
    unknown = f"no such folder here, and no such repository at {hub.endpoint} (a private one needs HF_TOKEN)"
    assert machine.sentence("owner/secret") == unknown
    assert machine.sentence("owner/secret", HF_TOKEN="hf_other") == unknown
    refused = "the download failed (status 401: Invalid credentials in Authorization header)"
    assert machine.sentence("owner/secret", HF_TOKEN="hf_wrong") == refused
    assert not hub.downloads()
    assert names(machine.find("owner/secret", HF_TOKEN="hf_right")) == {*SIDE_FILES, "model.safetensors"}
    assert machine.find("owner/secret:README.md", HF_TOKEN="hf_right").read_text() == "README.md"


def test_gated_repositories_say_so(hub: Hub, machine: Machine, tiny: Path) -> None:
    hub.add("owner/gated", tiny, token="hf_right", is_gated=True)
    sentence = f"{hub.endpoint} gives it only for the HF_TOKEN of a user who was granted access"
    assert machine.sentence("owner/gated") == sentence
    assert machine.find("owner/gated", HF_TOKEN="hf_right").is_dir()


def test_offline_the_cache_is_all_there_is(hub: Hub, machine: Machine, tiny: Path) -> None:
    hub.add("owner/tiny", tiny)
    absent = "revision 'main' is not, or not all of it, in the cache, and HF_HUB_OFFLINE is set"
    assert machine.sentence("owner/tiny", **OFFLINE) == absent
    assert machine.sentence("owner/tiny:README.md", **OFFLINE) == absent
    assert machine.sentence("two words", **OFFLINE).startswith("neither a folder or file here nor a Hub id")
    assert not hub.requests and "WARNING" not in machine.log
    folder = machine.find("owner/tiny")
    hub.requests.clear()
    assert machine.find("owner/tiny", **OFFLINE) == folder
    assert machine.sentence("owner/tiny", "v1", **OFFLINE) == absent.replace("main", "v1")
    assert machine.sentence("owner/tiny:README.md", **OFFLINE) in (
        absent,  # where huggingface_hub remembers what the repository has
        "its cached copy has no file 'README.md', and HF_HUB_OFFLINE is set",
    )
    assert not hub.requests


def test_offline_a_cached_copy_without_safetensors_is_found_too(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    hub.add("owner/tiny", write(tmp_path / "source", *SIDE_FILES, "pytorch_model.bin", "tf_model.h5"))
    folder = machine.find("owner/tiny")
    assert machine.find("owner/tiny", **OFFLINE) == folder


SLOW = pytest.mark.slow("3 s each; the slowest obstacle and the plainest stay")


@pytest.mark.parametrize(
    "kind", ["closed", "silent", *(pytest.param(kind, marks=SLOW) for kind in ("broken", "busy", "no hub"))]
)
def test_a_hub_out_of_reach_costs_seconds_and_a_cached_copy_does(
    hub: Hub, machine: Machine, tiny: Path, kind: str
) -> None:
    """huggingface_hub alone retries for 23 s for one file, and waits for ever for a host that does not answer."""
    hub.add("owner/tiny", tiny)
    folder = machine.find("owner/tiny")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if kind == "closed":
            machine.endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
        elif kind == "silent":
            machine.endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hub.status = {"broken": 503, "busy": 429, "no hub": 200}.get(kind)
        endpoint = re.escape(machine.endpoint)
        obstacle = {
            "closed": rf"{endpoint} is out of reach \(Connect\w+: .*\)",
            "silent": rf"{endpoint} is out of reach \(ReadTimeout: .*\)",
            "broken": rf"{endpoint} is out of reach \(status 503: .*\)",
            "busy": rf"{endpoint} is out of reach \(status 429: .*\)",
            "no hub": rf"{endpoint} is out of reach \(\w+: .*\)",
        }[kind]
        started = time.monotonic()
        assert machine.find("owner/tiny", HF_HUB_ETAG_TIMEOUT="1") == folder
        assert re.search(rf"WARNING {obstacle}; looking for owner/tiny in the cache\n", machine.log)
        sentence = machine.sentence("owner/new:file", HF_HUB_ETAG_TIMEOUT="1")
        assert re.fullmatch(f"revision 'main' is not, or not all of it, in the cache, and {obstacle}", sentence)
        assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("big"), "config.json")
    (folder / "model.safetensors").write_bytes(os.urandom(BIG_BYTES))
    return folder


@pytest.mark.parametrize("fault", ["close", "reset"])
def test_a_download_that_breaks_off_is_taken_up_again(hub: Hub, machine: Machine, big: Path, fault: Fault) -> None:
    hub.add("owner/big", big).faults["model.safetensors"] = [fault]
    folder = machine.find("owner/big")
    assert (folder / "model.safetensors").read_bytes() == (big / "model.safetensors").read_bytes()
    assert hub.downloads() == {"config.json": 1, "model.safetensors": 2}
    if fault == "close":
        (asked,) = hub.ranges
        assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 10 << 20


def test_a_download_that_fails_leaves_no_file_and_the_next_completes_it(hub: Hub, machine: Machine, big: Path) -> None:
    """huggingface_hub 1 and 2 raise httpx's error for a reset, which is no OSError: it once passed as a traceback."""
    hub.add("owner/big", big).faults["model.safetensors"] = ["reset"] * 3
    assert re.fullmatch(r"the download failed \(\w+: .*reset by peer.*\)", machine.sentence("owner/big"))
    assert not list(machine.folder.rglob("model.safetensors"))
    assert re.search(r"^(revision 'main' is not|its cached copy has no)", machine.sentence("owner/big", **OFFLINE))
    folder = machine.find("owner/big")
    assert (folder / "model.safetensors").read_bytes() == (big / "model.safetensors").read_bytes()
    assert hub.downloads() == {"config.json": 1, "model.safetensors": 4}


def test_what_the_file_system_refuses_is_not_tried_again(hub: Hub, machine: Machine, big: Path) -> None:
    hub.add("owner/big", big)
    (machine.folder / "home").write_text("a file where a folder must be made")
    assert re.fullmatch(r"the download failed \(\w+: \[Errno \d+\] .*\)", machine.sentence("owner/big"))
    assert "broke off" not in machine.log


def test_progress_is_logged_where_there_is_no_terminal(hub: Hub, machine: Machine, big: Path) -> None:
    hub.add("owner/big", big).faults["model.safetensors"] = ["pause"]
    machine.find("owner/big")
    assert re.search(r"INFO downloading owner/big: 0\.01 GB so far, \d+ MB/s\n", machine.log)
    assert "HTTP Request" not in machine.log


def test_local_paths_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, "owner/tiny/config.json", "model.nemo"))
    for name in ("owner/tiny", "./owner/tiny", str(tmp_path), "model.nemo"):
        assert find_checkpoint(name) == Path(name)
    for name in ("./nope", "/nope", "~/nope-nope", "owner/tiny/nope"):
        with pytest.raises(ValueError, match=f"^hf_model_name is '{name}', and there is no such folder or file$"):
            find_checkpoint(name)


def test_model_keys_are_folder_names(tmp_path: Path) -> None:
    assert model_key("gpt2") == "gpt2"
    assert model_key("owner/tiny") == "owner--tiny"
    assert model_key("owner/tiny:megatron.nemo") == "owner--tiny--megatron.nemo"
    assert model_key(str(tmp_path)) == tmp_path.name


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc\n")) == "a b c"
    assert one_line(KeyError()) == "KeyError"


def test_progress_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    progress = ProgressLine(seconds=0)
    progress(500_000_000, 2_000_000_000)
    (record,) = caplog.records
    assert re.fullmatch(r"converted 0\.50 of 2\.00 GB, \d+ MB/s", record.getMessage())


def formatted(formatter: logging.Formatter, *args: Any, **more: Any) -> str:
    record = logging.makeLogRecord({"name": "serving", "levelname": "INFO", "msg": args[0], "args": args[1:], **more})
    record.created = 1_700_000_000.25
    return formatter.format(record)


FIELDS = {"id": 'a b\nid="x"', "seconds": 0.25, "none": None, "reasons": ["length", "end id"], "count": 3, "e": ""}


def test_text_lines_end_with_the_fields_each_in_one_word() -> None:
    line = formatted(TextFormatter(1, 2), "%d requests", 2, fields=FIELDS)
    rest = line[len("12:00:00 ") :]
    assert rest == (
        r'INFO [rank 1] 2 requests id="a b\nid=\"x\"" seconds=0.25 none=- reasons=length,"end id" count=3 e=""'
    )
    assert formatted(TextFormatter(0, 1), "plain")[len("12:00:00 ") :] == "INFO plain"


def test_json_lines_have_all_in_one_object() -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        error = sys.exc_info()
    line = formatted(JsonFormatter(3), 'two\n"lines" of %s', "text", fields=FIELDS, exc_info=error)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("exception").endswith("KeyError: 'lost'")
    assert found == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "INFO",
        "logger": "serving",
        "rank": 3,
        "message": 'two\n"lines" of text',
        **FIELDS,
    }
