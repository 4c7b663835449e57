"""The way of a step through graphs, on a CPU (tests.support.stand_in_graphs).

Everything else is the GPU's: the table of KV locations, padding rows, attention of decode rows and of pieces of
prompts (by the kernels' references).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from convert import convert
from engine.engine import Engine
from engine.plan import Chunk
from engine.request import Request, SamplingParams
from executor import runner
from executor.runner import StepResult
from executor.slots import SlotRequest, SlotState
from tests.support import hugging_face_models
from tests.support.checkpoints import make_bloom
from tests.support.engines import NEW_TOKENS, finish, hf_greedy, make_engine, prompts, request
from tests.support.ranks import call_ranks, run_engine
from tests.support.soak import Counter
from tests.support.stand_in_graphs import KINDS, Replays, stand_in_graphs
from tests.support.ties import assert_close
from tests.support.traffic import looping_items, make_request, random_items, results, run_crowd, vocabulary


@pytest.fixture
def graphs() -> Iterator[Replays]:
    with stand_in_graphs() as replayed:
        yield replayed
    assert {name for name, _ in replayed} - {"steps with drafts"} == KINDS


def make(folder: Path, **settings: str) -> Engine:
    return make_engine(folder, max_batch_size=6, max_step_tokens=24, block_size=4, **settings)


def test_tokens_are_hugging_faces(
    graphs: Replays, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    inputs = prompts(9)
    requests = [request(ids, SamplingParams(NEW_TOKENS)) for ids in inputs]
    assert finish(make(converted(1)), requests) == [hf_greedy(gpt2_source[1], ids) for ids in inputs]
    decodes = {size for name, size in graphs if name == "decode steps"}
    assert decodes <= {1, 2, 4, 8} and 8 in decodes  # six rows and two padding rows
    assert {size for name, size in graphs if name == "steps with prompts"} == {16, 32}  # up to 24 tokens


def test_fp8(converted: Callable[[int], Path], request: pytest.FixtureRequest) -> None:
    """Weights and cache; a number may fall to the other side of a rounding, and a random model's logits are flat."""
    found = []
    for has_graphs in (False, True):
        if has_graphs:
            request.getfixturevalue("graphs")
        engine = make(converted(1), quantization="fp8", kv_cache_dtype="fp8")
        requests = [Request(ids, SamplingParams(4), ()) for ids in prompts(9)]
        found.append(finish(engine, requests))
    assert sum(map(list.__eq__, *found)) >= 7  # of 9


def test_alibi(graphs: None, tmp_path: Path) -> None:
    model = make_bloom(tmp_path / "hf", heads=6, hidden=48)
    inputs = prompts(5)
    requests = [request(ids, SamplingParams(NEW_TOKENS)) for ids in inputs]
    engine = make(convert(tmp_path / "hf", tmp_path / "ft", 1, "fp32"))
    assert finish(engine, requests) == [hf_greedy(model, ids) for ids in inputs]


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox", "gpt-j", "phi-norms"])
def test_head_norms_and_parallel_residuals(graphs: None, tmp_path: Path, name: str) -> None:
    model = hugging_face_models.make(tmp_path / "hf", name)
    inputs = prompts(5)
    requests = [request(ids, SamplingParams(40)) for ids in inputs]
    engine = make(convert(tmp_path / "hf", tmp_path / "ft", 1, "fp32"))
    assert finish(engine, requests) == [hf_greedy(model, ids, 40) for ids in inputs]


def test_random_requests_are_what_they_are_without(
    converted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Beams, samples, penalties, words and all that may be told of tokens, in steps shared with plain rows and run
    ahead; prompts of one token, and last pieces of one. And with so few blocks that requests are preempted, and with
    prompts of which all but one token is found."""
    items = random_items(60, seed=11)
    for index, item in enumerate(items):
        if index % 3 == 0:
            item["prompt_ids"] = item["prompt_ids"][:1] if index % 2 else (item["prompt_ids"] * 49)[:49]
        if 30 <= index < 40:
            item["prompt_ids"] = list(range(17))
        item["sampling"] |= {"prompt_log_probs": index % 4 == 1, "next_token_logits": index % 5 == 2}
    found = []
    for has_graphs in (False, True):
        if has_graphs:
            request.getfixturevalue("graphs")
            # A GPU's results are copied before the next step writes over them.
            monkeypatch.setattr(runner, "StepResult", lambda values, layout: StepResult(values.clone(), layout))
        limits = {"num_blocks": 52} if has_graphs else {"no_prefix_cache": True}
        engine = make_engine(converted(1), max_batch_size=16, max_step_tokens=24, block_size=4, **limits)
        engine.executor.num_ahead = int(has_graphs)
        engine.observer = counter = Counter()
        requests = [make_request(item, vocabulary()) for item in items]
        run_crowd(engine, requests)
        found.append([results(one) for one in requests])
        assert (counter.num_preempted > 2, counter.num_hit > 32) == (has_graphs, has_graphs), vars(counter)
    for without, with_graphs in zip(*found, strict=True):
        assert_close(without, with_graphs)


def test_requests_with_drafts_are_what_they_are_without(
    graphs: Replays, converted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one slot see each other, and the slot goes on after the first wrong draft. Drafts, and decode rows of all
    kinds beside them, go through graphs. Beside pieces of prompts they do not, nor where kernels cannot choose."""
    monkeypatch.setattr(runner, "StepResult", lambda values, layout: StepResult(values.clone(), layout))
    launched: list[Chunk] = []
    write_drafts = SlotState.write_drafts

    def record(slots: SlotState, chunks: Sequence[Chunk]) -> None:
        launched.extend(chunk for chunk in chunks if chunk.draft_ids)
        write_drafts(slots, chunks)

    describe = SlotState._describe

    def describe_as_long(slots: SlotState, seq_slot: int, request: SlotRequest) -> None:
        describe(slots, seq_slot, request)
        slots.has_long_list[seq_slot] = request.prompt_len % 3 == 1  # kernels are not to choose for it

    monkeypatch.setattr(SlotState, "write_drafts", record)
    monkeypatch.setattr(SlotState, "_describe", describe_as_long)
    items = looping_items(12)
    loop, late = {"max_new_tokens": 60, "logit_bias": [[5, 100.0]]}, {"max_new_tokens": 3}
    items += [{"prompt_ids": [1, 2, 3], "sampling": loop}, {"prompt_ids": list(range(60)), "sampling": late}]
    found = []
    for speculative in ("none", "ngram"):
        engine = make_engine(
            converted(1), max_batch_size=6, max_step_tokens=24, block_size=4, num_blocks=70, speculative=speculative
        )
        engine.executor.num_ahead = 1
        engine.observer = counter = Counter()
        requests = [make_request(item, vocabulary()) for item in items]
        run_crowd(engine, requests[:12])
        engine.submit(requests[12])
        while len(requests[12].output_ids) < 20:
            engine.step()
        num_beyond = len(launched)
        finish(engine, requests[13:])
        found.append([results(one) for one in requests])
    sizes = [size for name, size in graphs if name == "steps with drafts"]
    assert set(sizes) >= {4, 8, 16} and len(sizes) > 10
    assert 0 < num_beyond < len(launched)
    assert counter.num_accepted > 15
    for without, with_drafts in zip(*found, strict=True):
        assert_close(without, with_drafts)


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 3), (2, 2)], ids=str)
def test_each_stage_has_graphs_of_its_part(tp: int, pp: int, converted: Callable[[int], Path]) -> None:
    """Results are those of one rank without graphs: beams, samples and all that may be told of tokens, too. Plans are
    made ahead, as on a GPU. At tp 2, each rank chooses for its share of the rows in graphs of more than two."""
    items = random_items(24, seed=7)
    expected = run_engine(converted(1), items, 1, 1)
    flags = ["--tp", str(tp), "--pp", str(pp), "--max-batch-size", "12", "--num-ahead", "1", "--few-rows", "2"]
    found = call_ranks(tp * pp, "tests.multi.engine_parity:generate_in_graphs", items, str(converted(tp)), *flags)
    assert_close(expected, found[0][0])
    assert {name for name, _ in found[0][1]} == KINDS
    assert all(replays == found[0][1] for _, replays in found)
