"""The way of a decode step through graphs, on a CPU: a graph's stand-in computes the step anew when it is replayed.

Everything else is the GPU's: the table of places, rows that fill a step up, one attention for all decoding rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from convert import convert
from engine.engine import Engine
from engine.request import SamplingParams
from executor import runner
from executor.graphs import DecodeGraphs
from executor.runner import StepResult
from tests.support.checkpoints import make_bloom
from tests.support.engines import NEW_TOKENS, finish, hf_greedy, make_engine, prompts, request
from tests.support.traffic import make_request, random_items, results, run_crowd, vocabulary

REPLAYED: list[int] = []  # sizes


class StandInGraph:
    """Computes what a CUDA graph of the same size would."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self.graphs = graphs
        self.size = size
        self.values = graphs._step(size).clone()

    def replay(self) -> None:
        REPLAYED.append(self.size)
        self.values.copy_(self.graphs._step(self.size))


def capture(self: DecodeGraphs) -> None:
    graphs = {size: StandInGraph(self, size) for size in self._sizes}
    self._graphs = {size: (graph, graph.values) for size, graph in graphs.items()}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runner, "runs_on", lambda device: True)
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    REPLAYED.clear()
    yield
    assert REPLAYED


def make(folder: Path) -> Engine:
    return make_engine(folder, max_batch_size=6, max_step_tokens=24, block_size=4)


def test_tokens_are_hugging_faces(
    graphs: None, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    inputs = prompts(9)
    requests = [request(ids, SamplingParams(NEW_TOKENS)) for ids in inputs]
    assert finish(make(converted(1)), requests) == [hf_greedy(gpt2_source[1], ids) for ids in inputs]
    assert set(REPLAYED) <= {1, 2, 4, 8}
    assert 8 in REPLAYED  # six rows and two padding rows


def test_alibi(graphs: None, tmp_path: Path) -> None:
    model = make_bloom(tmp_path / "hf", heads=6, hidden=48)
    inputs = prompts(5)
    requests = [request(ids, SamplingParams(NEW_TOKENS)) for ids in inputs]
    engine = make(convert(tmp_path / "hf", tmp_path / "ft", 1, "fp32"))
    assert finish(engine, requests) == [hf_greedy(model, ids) for ids in inputs]


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor]:
    """A stand-in for aten::_flash_attention_forward: each prompt by itself."""
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (query, key, value)), is_causal=True)
        for a, b in pairwise(ends.tolist())
    ]
    return (torch.cat([part[0].transpose(0, 1) for part in parts]),)


def test_random_requests_are_what_they_are_without(
    converted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Beams, samples, penalties, words and all that may be told of tokens, in steps shared with plain rows and run
    ahead; prompts of one token, and last pieces of one."""
    items = random_items(60, seed=11)
    for index, item in enumerate(items):
        if index % 3 == 0:
            item["prompt_ids"] = item["prompt_ids"][:1] if index % 2 else (item["prompt_ids"] * 49)[:49]
        item["sampling"] |= {"prompt_log_probs": index % 4 == 1, "next_token_logits": index % 5 == 2}
    found = []
    for has_graphs in (False, True):
        if has_graphs:
            request.getfixturevalue("graphs")
            # A GPU's results are copied before the next step writes over them.
            monkeypatch.setattr(runner, "StepResult", lambda values, layout: StepResult(values.clone(), layout))
            flash = SimpleNamespace(default=flash_attention)
            monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
        engine = make_engine(converted(1), max_batch_size=16, max_step_tokens=24, block_size=4)
        engine.executor.num_ahead, engine.executor.model.attention.has_flash = int(has_graphs), has_graphs
        requests = [make_request(item, vocabulary()) for item in items]
        run_crowd(engine, requests)
        found.append([results(one) for one in requests])
    for without, with_graphs in zip(*found, strict=True):
        assert_close(without, with_graphs)


def assert_close(one: Any, other: Any) -> None:
    """Equal but for the rounding of floats, at any depth."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_close(mine, yours)
    else:
        assert other == (pytest.approx(one, abs=2e-4) if isinstance(one, float) else one)
