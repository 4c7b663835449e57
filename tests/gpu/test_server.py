"""The real server on GPUs, behind Triton: text and beams against Hugging Face, streams, a refusal, a signal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from engine.request import SamplingParams
from tests.support.engines import hf_beams, hf_greedy
from tests.support.launch import MODEL, TEXTS, Server, flags_of, serving

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here")
GRIDS = [(1, 1), (2, 1), (2, 2)]


def answer_of(server: Server, prompt: str, *flags: str) -> dict[str, Any]:
    done = server.client("--model-name", MODEL, "--json", "--prompts", prompt, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
def test_server_answers_refuses_and_drains(
    tp: int, pp: int, gpt2_source: tuple[Path, GPT2LMHeadModel], converted: Callable[[int], Path], tmp_path: Path
) -> None:
    pytest.importorskip("pytriton")
    if tp * pp > NUM_GPUS:
        pytest.skip(f"{tp * pp} GPUs needed, {NUM_GPUS} here")
    folder, model = gpt2_source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    flags = [*flags_of(converted(tp), tp), "--pp", str(pp), "--device", "cuda", "--data-type", "fp32"]
    with serving(tp * pp, tmp_path / "log", *flags) as server:
        line = next(line for line in server.text.splitlines() if "ready:" in line)
        print(line, flush=True)
        assert f"tp {tp} × pp {pp}, float32 on cuda" in line
        done = server.client("--model-name", MODEL, "--output-len", "64", "--json", "--prompts", *TEXTS)
        assert done.returncode == 0, done.stderr
        for text, answer in zip(TEXTS, done.stdout.splitlines(), strict=True):
            prompt_ids = tokenizer.encode(text)
            assert json.loads(answer)["output_ids"] == [prompt_ids + hf_greedy(model, prompt_ids, 64)]
        whole = answer_of(server, TEXTS[0], "--beam-width", "4", "--output-len", "32")
        assert len(whole["sentences"]) == 4
        expected = hf_beams(model, tokenizer.encode(TEXTS[0]), SamplingParams(32, beam_width=4), 302)
        prompt_len = len(tokenizer.encode(TEXTS[0]))
        ids = [
            row[prompt_len:length] for row, length in zip(whole["output_ids"], whole["sequence_length"], strict=True)
        ]
        assert ids == [tokens for tokens, _ in expected]
        sampling = ["--top-k", "40", "--random-seed", "3", "--output-len", "64", "--ignore-eos"]
        for kind in ("http", "grpc"):
            pieces = server.client("--model-name", MODEL, "--stream", "--prompts", TEXTS[0], *sampling, kind=kind)
            assert answer_of(server, TEXTS[0], *sampling)["sentences"][0] in pieces.stdout
        refused = server.client("--model-name", MODEL, "--prompts", "x", "--top-k", "304")
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1] == "client.py: runtime_top_k is 304; the vocabulary has 303 tokens"
        assert server.stop() == 0, server.text
