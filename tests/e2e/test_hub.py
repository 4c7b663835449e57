"""Real server.py with a model of the Hub's: downloaded by the first start, found in the cache by the second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.support.engines import hf_greedy
from tests.support.hub import Hub
from tests.support.launch import Server, serving

MODEL = "owner--tiny"
TEXT = "the rain in"


@pytest.mark.slow("two starts of a server; test_helpers.py has downloads and the cache")
def test_a_hub_id_is_served_and_offline_served_again(gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path) -> None:
    source, model = gpt2_source
    prompt_ids = AutoTokenizer.from_pretrained(source).encode(TEXT)
    expected = prompt_ids + hf_greedy(model, prompt_ids, 16)
    flags = ["--hf-model-name", "owner/tiny", "--output-dir"]
    with Hub() as hub:
        hub.add("owner/tiny", source)
        environment = settings(hub, tmp_path)
        with serving(1, tmp_path / "log", *flags, str(tmp_path / "first"), environment=environment) as server:
            assert answer(server) == expected
            assert "HTTP Request" not in server.text
        assert hub.downloads() == {path.name: 1 for path in source.iterdir()}
    environment["HF_HUB_OFFLINE"] = "1"
    with serving(1, tmp_path / "log", *flags, str(tmp_path / "second"), environment=environment) as server:
        assert answer(server) == expected
    folders = [tmp_path / part / MODEL / "1-gpu" for part in ("first", "second")]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert manifests[0] == manifests[1]
    assert manifests[0]["source_name"] == "owner/tiny"


@pytest.mark.slow("test_helpers.py has the sentence, test_refusals.py another refusal under mpirun")
def test_a_hub_id_that_does_not_exist_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    with Hub() as hub:
        flags = ["--hf-model-name", "owner/nope", "--tp", "2"]
        server = Server(2, tmp_path / "log", *flags, environment=settings(hub, tmp_path))
        try:
            assert server.process.wait(120) == 1
        finally:
            server.kill()
    (line,) = [line for line in server.text.splitlines() if "hf_model_name" in line]
    assert line.endswith(
        "ERROR [rank 0] hf_model_name is 'owner/nope': no such folder here, and no such repository at "
        f"{hub.endpoint} (a private one needs HF_TOKEN)"
    )
    assert "Traceback" not in server.text


def settings(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that knows no other Hub, has an empty cache and no token."""
    hub_alone = {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1", "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    return {"HF_HOME": str(tmp_path / "home")} | hub_alone


def answer(server: Server) -> list[int]:
    """The tokens of one greedy answer of 16."""
    done = server.client("--model-name", MODEL, "--output-len", "16", "--json", "--prompts", TEXT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["output_ids"][0]
