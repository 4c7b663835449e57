"""The way of a decode step through graphs, on a CPU: a graph's stand-in computes the step anew when it is replayed.

Everything else is the GPU's: the table of places, rows that fill a step up, one attention for all decoding rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from convert import convert
from engine import runner
from engine.engine import Engine
from engine.graphs import DecodeGraphs
from engine.request import SamplingParams
from tests.checkpoints import make_bloom
from tests.test_engine import NEW_TOKENS, finish, hf_greedy, make_engine, prompts, request
from tests.traffic import make_request, random_items, results, run_crowd, vocabulary

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
    monkeypatch.setattr(runner, "_has_kernels", lambda device: True)
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
    assert 8 in REPLAYED  # of six rows and two of nobody's


def test_alibi(graphs: None, tmp_path: Path) -> None:
    model = make_bloom(tmp_path / "hf", heads=6, hidden=48)
    inputs = prompts(5)
    requests = [request(ids, SamplingParams(NEW_TOKENS)) for ids in inputs]
    engine = make(convert(tmp_path / "hf", tmp_path / "ft", 1, "fp32"))
    assert finish(engine, requests) == [hf_greedy(model, ids) for ids in inputs]


def test_random_requests_are_what_they_are_without(
    converted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Sampling, penalties, words, beams, samples and log-probabilities, in steps shared with plain rows."""
    items = random_items(40, seed=11)
    found = []
    for _ in range(2):
        engine = make_engine(converted(1), max_batch_size=16, max_step_tokens=24, block_size=4)
        requests = [make_request(item, vocabulary()) for item in items]
        run_crowd(engine, requests)
        found.append([results(one) for one in requests])
        request.getfixturevalue("graphs")  # for the second
    for without, with_graphs in zip(*found, strict=True):
        for one, other in zip(without["outputs"], with_graphs["outputs"], strict=True):
            assert one["token_ids"] == other["token_ids"]
            assert one["finish_reason"] == other["finish_reason"]
            assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)
