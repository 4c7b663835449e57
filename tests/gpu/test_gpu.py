"""The engine on GPUs, over NCCL where there are several: fp32 tokens and bf16 logits against Hugging Face in fp32."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from convert import convert
from engine.plan import Chunk, Plan
from engine.request import Request, SamplingParams
from executor.output_layout import OutputLayout
from executor.slots import SlotState
from tests.support.checkpoints import make_gpt2
from tests.support.engines import NEW_TOKENS, SEEDED, make_engine, prompts
from tests.support.ranks import Ranks, first_outputs, greedy_items, run_engine, run_logits
from tests.support.soak import Counter, soak_items
from tests.support.ties import assert_likeliest
from tests.support.traffic import looping_items, random_items, telling_items

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here")
FP32 = ["--device", "cuda", "--data-type", "fp32"]
GRIDS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    """Larger than the CPU tests' model: head size 64, 1024 wide, so that rounding has something to add up."""
    folder = tmp_path_factory.mktemp("source") / "gpt2"
    model = make_gpt2(folder, vocab_size=5003, heads=16, hidden=1024, layers=6, n_positions=512, with_tokenizer=False)
    with torch.no_grad():  # deviations of a trained model's size: 0.1 would saturate every softmax
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.4)
    model.save_pretrained(folder)
    return folder, model.cuda()


@pytest.fixture(scope="module")
def converted(source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    output_dir = tmp_path_factory.mktemp("ft_models")
    return lambda tp: convert(source[0], output_dir, tp, "fp32")


def seeded_items() -> list[dict]:
    inputs = prompts(9, vocab_size=5003, longest=120)
    return [{"prompt_ids": ids, "sampling": asdict(sampling)} for ids, sampling in zip(inputs, SEEDED, strict=False)]


@pytest.fixture(scope="module")
def seeded_on_cpu(converted: Callable[[int], Path]) -> list[list[int]]:
    """What the seeded requests give on a CPU, each alone."""
    return first_outputs(run_engine(converted(1), seeded_items(), 1, 1, "--alone"))


def skip_without(num_gpus: int) -> None:
    if num_gpus > NUM_GPUS:
        pytest.skip(f"{num_gpus} GPUs needed, {NUM_GPUS} here")


def hf_greedy_cuda(model: GPT2LMHeadModel, prompt_ids: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt_ids], device="cuda"),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64, device="cuda"),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    return out[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
def test_fp32_tokens_equal_hugging_face(
    tp: int,
    pp: int,
    source: tuple[Path, GPT2LMHeadModel],
    converted: Callable[[int], Path],
    seeded_on_cpu: list[list[int]],
) -> None:
    skip_without(tp * pp)
    inputs = prompts(9, vocab_size=5003, longest=120)
    items = greedy_items(inputs, NEW_TOKENS) + seeded_items()
    tokens = first_outputs(run_engine(converted(tp), items, tp, pp, *FP32))
    assert tokens[:9] == [hf_greedy_cuda(source[1], ids) for ids in inputs]
    assert tokens[9:] == seeded_on_cpu


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
@pytest.mark.parametrize(("data_type", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_logits_are_near_fp32(
    tp: int,
    pp: int,
    data_type: str,
    limit: float,
    source: tuple[Path, GPT2LMHeadModel],
    converted: Callable[[int], Path],
) -> None:
    skip_without(tp * pp)
    inputs = prompts(6, vocab_size=5003, longest=300)
    logits = run_logits(converted(tp), inputs, tp, pp, "--device", "cuda", "--data-type", data_type)
    with torch.inference_mode():
        expected = [source[1](torch.tensor([ids], device="cuda")).logits[0, -1].cpu().numpy() for ids in inputs]
    for ours, theirs in zip(logits, expected, strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"tp {tp} pp {pp} {data_type}: relative norm {error:.2e}", flush=True)
        assert error < limit


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2), (4, 1)], ids=lambda n: str(n))
@pytest.mark.parametrize(("data_type", "atol"), [("fp32", 1e-3), ("bf16", 0.2)])
def test_many_rows_are_hugging_faces(
    tp: int,
    pp: int,
    data_type: str,
    atol: float,
    source: tuple[Path, GPT2LMHeadModel],
    converted: Callable[[int], Path],
    seeded_on_cpu: list[list[int]],
) -> None:
    """Each cohort has more than executor.layers.FEW_ROWS rows, so each rank chooses for its share of them."""
    skip_without(tp * pp)
    items = telling_items(60 * pp, 100, vocab_size=5003)
    flags = ["--device", "cuda", "--data-type", data_type, "--max-batch-size", str(50 * pp)]
    results = run_engine(converted(tp), items + seeded_items(), tp, pp, *flags)
    for item, result in zip(items, results, strict=False):
        assert_likeliest(source[1], item, result, atol)
    if data_type == "fp32":
        assert first_outputs(results[len(items) :]) == seeded_on_cpu


@pytest.mark.parametrize("num_blocks", [0, 52], ids=["plenty", "few"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda n: str(n))
def test_random_requests_are_in_a_crowd_what_they_are_alone(
    tp: int, pp: int, num_blocks: int, gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    """Every mix of parameters, as in tests/engine/test_isolation.py, with NCCL and with steps that are run ahead.

    With few blocks, some are preempted (tests/engine/test_soak.py), and beginnings of prompts are found.
    """
    skip_without(tp * pp)
    items = soak_items(150, seed=2) if num_blocks else random_items(150, seed=2)
    folder = convert(gpt2_source[0], tmp_path / "ft_models", tp, "fp32")
    flags = [*FP32, "--max-batch-size", "24"]
    found = [run_engine(folder, items, tp, pp, *flags, "--alone")]
    found.append(run_engine(folder, items, tp, pp, *flags, "--num-blocks", str(num_blocks)))
    texts = [
        [[(output["token_ids"], output["finish_reason"]) for output in result["outputs"]] for result in results]
        for results in found
    ]
    different = [index for index, (alone, crowd) in enumerate(zip(*texts, strict=True)) if alone != crowd]
    assert not different, [(items[index], found[0][index], found[1][index]) for index in different[:3]]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=lambda n: str(n))
def test_requests_are_with_drafts_what_they_are_without(
    tp: int, pp: int, gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    skip_without(tp * pp)
    items = looping_items(60)
    folder = convert(gpt2_source[0], tmp_path / "ft_models", tp, "fp32")
    flags = [*FP32, "--max-batch-size", "6"]
    drafts = ["--speculative", "ngram"]
    found = [run_engine(folder, items, tp, pp, *flags, *more) for more in ([], drafts, [*drafts, "--enforce-eager"])]
    texts = [[[o["token_ids"] for o in result["outputs"]] for result in results] for results in found]
    different = [index for index, outputs in enumerate(zip(*texts, strict=True)) if outputs != (outputs[0],) * 3]
    assert not different, [(items[index], *(results[index] for results in found)) for index in different[:3]]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_drafts_are_accepted(enforce_eager: bool, converted: Callable[[int], Path]) -> None:
    """Greedy texts of three tokens, which repeat themselves, in bf16."""
    settings = dict(device="cuda", data_type="bf16", max_batch_size=4, enforce_eager=enforce_eager)
    engine = make_engine(converted(1), speculative="ngram", **settings)
    engine.observer = counter = Counter()
    for ids in prompts(4, vocab_size=5003, longest=120):
        engine.submit(
            Request(ids, SamplingParams(200, logit_bias=tuple((token_id, 1000.0) for token_id in ids[:3])), ())
        )
    while engine.step():
        pass
    engine.executor.close()
    assert counter.num_tokens == 800
    assert 200 < counter.num_accepted < counter.num_drafted < 3 * counter.num_accepted


def give_all_locations(state: SlotState, num_blocks: int) -> None:
    """Give all slots but the dummy a KV location for each token that has none yet: nobody asks for blocks here."""
    own, no_location = state.kv_loc_table[:-1], num_blocks * state.block_size
    missing = own == no_location
    is_free = torch.ones(no_location + 1, dtype=torch.bool, device=own.device)
    is_free[own.long()] = False
    own[missing] = is_free.nonzero()[: int(missing.sum()), 0].int()
    assert int(own.max()) < no_location and len(own.unique()) == own.numel()


def test_replays_are_launches_bit_by_bit(converted: Callable[[int], Path]) -> None:
    """200 replays of a decode step beside its kernels launched one by one, from the same state."""
    engine = make_engine(converted(1), device="cuda", data_type="bf16", max_batch_size=8)
    samplings = [{}, {"top_p": 0.9, "random_seed": 3}, {"top_k": 20, "repetition_penalty": 1.3, "random_seed": 4}, {}]
    requests = [
        Request(ids, SamplingParams(300, **sampling), ())
        for ids, sampling in zip(prompts(8, vocab_size=5003, longest=120), samplings * 2, strict=True)
    ]
    for request in requests:
        engine.submit(request)
    while not all(len(request.output_ids) > 1 for request in requests):
        engine.step()
    graphs, state = engine.executor._graphs, engine.executor.slots
    assert graphs is not None
    give_all_locations(state, engine.executor.num_blocks)
    before = state.token_ids.clone(), state.positions.clone()
    with torch.inference_mode():
        replayed = [graphs.run(np.arange(8))[0].clone() for _ in range(200)]
        tokens = state.token_ids.clone()
        for tensor, old in zip((state.token_ids, state.positions), before, strict=True):
            tensor.copy_(old)
        launched = [graphs._step(8).clone() for _ in range(200)]
    assert len({int(row) for row in tokens.unique()}) > 100  # not one token again and again
    assert torch.equal(tokens, state.token_ids)
    assert torch.equal(torch.stack(replayed), torch.stack(launched))
    engine.executor.close()


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2)], ids=lambda n: str(n))
def test_stages_with_graphs_give_the_tokens_of_launches(tp: int, pp: int, converted: Callable[[int], Path]) -> None:
    """In a crowd; each rank replays graphs, and as many as the others."""
    skip_without(tp * pp)
    items = greedy_items(prompts(9, vocab_size=5003, longest=120), NEW_TOKENS) + seeded_items()
    found = []
    for more in ([], ["--enforce-eager"]):
        ranks = Ranks(tp * pp)
        flags = ["--tp", str(tp), "--pp", str(pp), *FP32, *more]
        try:
            parts = ranks.call("tests.multi.engine_parity:generate_and_count", items, str(converted(tp)), *flags)
        finally:
            ranks.close()
        counts = {count for _, count in parts}
        assert len(counts) == 1 and (counts == {0}) == bool(more)
        found.append(first_outputs(parts[0][0]))
    assert found[0] == found[1]


def test_replays_of_steps_with_drafts_are_launches_bit_by_bit(converted: Callable[[int], Path]) -> None:
    """Steps that compute known tokens again, beside their kernels launched one by one from the same state."""
    engine = make_engine(converted(1), device="cuda", data_type="fp32", max_batch_size=8, speculative="ngram")
    samplings = [{}, {"top_p": 0.9, "random_seed": 3}, {"top_k": 20, "repetition_penalty": 1.3, "random_seed": 4}]
    requests = [
        Request(ids, SamplingParams(300, **sampling), ())
        for ids, sampling in zip(prompts(3, vocab_size=5003, longest=120), samplings, strict=True)
    ]
    for request in requests:
        engine.submit(request)
    while not all(len(request.output_ids) > 60 for request in requests):
        engine.step()
    graphs, state = engine.executor._draft_graphs, engine.executor.slots
    assert graphs is not None
    slots = [engine.scheduler._running[request].sequences[0].seq_slot for request in requests]
    texts = [request.prompt_ids + request.output_ids for request in requests]
    starts = [len(text) - 40 for text in texts]
    for num_drafts, num_right in ((drafts, right) for drafts in range(1, 9) for right in range(drafts + 1)):
        draft_ids = texts[0][starts[0] + 1 :][:num_drafts]
        draft_ids[num_right:] = [5002] * (num_drafts - num_right)
        chunks = [Chunk(slots[0], starts[0], 1 + num_drafts, [slots[0]], draft_ids=draft_ids)]
        chunks.append(Chunk(slots[2], starts[2], 3, [slots[2]], draft_ids=texts[2][starts[2] + 1 :][:2]))
        plan = Plan(np.array(slots[1:2], dtype=np.uint8), np.array(starts[1:2], dtype=np.int32), chunks)
        assert graphs.fits(plan)
        rows = OutputLayout.of(plan, state, 5003).rows
        size = next(size for size in graphs._sizes if size >= len(rows))
        before = state.token_ids.clone(), state.positions.clone()
        found = []
        with torch.inference_mode():
            for run in (lambda: graphs.run(plan, rows)[0], lambda: graphs._step(size)[:, : len(rows)]):  # noqa: B023
                values = run()
                found.append([values.clone(), state.token_ids.clone(), state.positions.clone()])
                for tensor, old in zip((state.token_ids, state.positions), before, strict=True):
                    tensor.copy_(old)
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        moves = [1 + num_right, 1, 3]  # the drafts that were right, and one token more
        assert found[0][2][slots].tolist() == [start + move for start, move in zip(starts, moves, strict=True)]
    engine.executor.close()


def test_log_probs_are_hugging_faces(gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path) -> None:
    """Rows get theirs inside a graph; alternatives and beams are added outside, in steps that all share."""
    folder, model = convert(gpt2_source[0], tmp_path / "ft_models", 1, "fp32"), gpt2_source[1]
    wishes = [{}, {"num_log_probs": 3}, {"top_k": 20, "random_seed": 5}, {"beam_width": 3}, {"prompt_log_probs": True}]
    items = [
        {"prompt_ids": ids, "sampling": {"max_new_tokens": NEW_TOKENS, **wish}, "end_id": None}
        for ids, wish in zip(prompts(10), wishes * 2, strict=True)
    ]
    for item, result in zip(items, run_engine(folder, items, 1, 1, *FP32), strict=True):
        prompt_ids = item["prompt_ids"]
        for output in result["outputs"]:
            ids = torch.tensor([prompt_ids + output["token_ids"]])
            with torch.inference_mode():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
            np.testing.assert_allclose(output["log_probs"], log_probs[len(prompt_ids) - 1 :], atol=1e-4)
            if item["sampling"].get("prompt_log_probs"):
                np.testing.assert_allclose(result["prompt_log_probs"], log_probs[: len(prompt_ids) - 1], atol=1e-4)


def test_hf_reference_runs_in_full_fp32() -> None:
    assert os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "1"
    assert torch.get_float32_matmul_precision() == "highest"
