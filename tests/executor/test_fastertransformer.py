"""The FasterTransformer driver with the stand-in op: the torch engine's tokens, the op's weights and arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from engine import startup
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine
from engine.request import END_ID, Request, SamplingParams
from engine.static import Batch, RequestRow
from engine.watchdog import Watchdog
from engine.world import World
from executor.fastertransformer import FasterTransformerExecutor, quantize, read_weights
from executor.startup import Backend
from tests.support.engines import finish, hf_greedy, make_engine, prompts
from tests.support.launch import ROOT
from tests.support.ranks import run_engine
from tests.support.standin import StandinUnavailable, build_standin
from tests.support.traffic import make_request, results, vocabulary
from weights.model_config import ModelConfig
from weights.reader import ShardReader

GRIDS = [(1, 1), (2, 1), (2, 2)]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        path = build_standin(ROOT / "build" / "standin")
    except StandinUnavailable as error:
        pytest.skip(str(error))
    World()  # initializes MPI, as the op demands
    torch.classes.load_library(str(path))
    return path


class Recorder:
    """An op that keeps what it was called with."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *arguments: Any) -> list[torch.Tensor]:
        self.calls.append(arguments)
        return self.op.forward(*arguments)


def cpu_backend(library: Path, dtype: torch.dtype) -> Backend:
    return Backend("fastertransformer", "of the test", torch.device("cpu"), dtype, library)


def ft_executor(folder: Path, library: Path, **changed: Any) -> FasterTransformerExecutor:
    """One rank's executor, with a recorder; `changed` are fields of the ModelConfig."""
    config = replace(ModelConfig.read(folder / "config.ini"), **changed)
    executor = FasterTransformerExecutor(
        folder, config, EngineConfig(), ParallelConfig(), cpu_backend(library, torch.float32)
    )
    executor.prepare()
    executor._op = Recorder(executor._op)
    return executor


def ft_engine(folder: Path, library: Path, **changed: Any) -> Engine:
    executor = ft_executor(folder, library, **changed)
    return startup.make_engine(executor, executor.config, EngineConfig(max_batch_size=32), World(), Watchdog())


def reference(model: GPT2LMHeadModel, request: Request) -> tuple[list[int], float]:
    """Greedy tokens and their log-probability: bad words, temperature, penalty, min_length, in the op's order.

    In numpy, and by whole forward passes; the temperature only where a presence penalty makes it tell.
    """
    params, tokens, start, total = request.sampling, list(request.prompt_ids), len(request.prompt_ids), 0.0
    while len(tokens) - start < params.max_new_tokens and (len(tokens) == start or tokens[-1] != request.end_ids[0]):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].double().numpy()
        for word in request.bad_word_ids:
            if len(word) <= len(tokens) + 1 and tokens[len(tokens) + 1 - len(word) :] == word[:-1]:
                logits[word[-1]] = -np.inf
        if params.presence_penalty:
            logits /= params.temperature or 1.0
        seen = sorted(set(tokens))
        factor = np.where(logits[seen] < 0, params.repetition_penalty, 1 / params.repetition_penalty)
        logits[seen] = logits[seen] * factor - params.presence_penalty
        if len(tokens) - start < params.min_length:
            logits[request.end_ids[0]] = -np.inf
        tokens.append(int(logits.argmax()))
        total += logits[tokens[-1]] - np.logaddexp.reduce(logits)
    return tokens[start:], total


def mixed_items() -> list[dict[str, Any]]:
    """Requests whose tokens the torch engine must choose too: greedy ones and beams that no end token cuts short."""
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 1, "temperature": 0.3},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "temperature": 0.4},
        {"presence_penalty": -1.0, "temperature": 0},
        {"beam_width": 3, "len_penalty": 0.0},
        {"beam_width": 3, "len_penalty": 0.0},
        {"beam_width": 2, "len_penalty": 0.0, "temperature": 0.6},
        {"beam_width": 2, "len_penalty": 0.0, "repetition_penalty": 1.3},
        {"min_length": 5},
        {},
        {"repetition_penalty": 0.7},
    ]
    lengths = [8, 24, 31, 20, 15, 12, 12, 12, 12, 40, 50, 9]
    items = [
        {"prompt_ids": ids, "sampling": {"max_new_tokens": length, **one}}
        for ids, one, length in zip(prompts(len(options)), options, lengths, strict=True)
    ]
    items[2]["prompt_ids"] = items[2]["prompt_ids"][:1]
    items[6]["stop"] = items[10]["stop"] = ["ab", "ca"]
    return items


Texts = list[list[tuple[list[int], str]]]  # per request and output: tokens, finish reason


@pytest.fixture(scope="module")
def torch_texts(converted: Callable[[int], Path]) -> Texts:
    """What the torch engine makes of them, but for stop words of beams: the op searches on, and the host cuts then."""
    items = mixed_items()
    searched = make_request(items[6], vocabulary())
    del items[6]["stop"]
    requests = [make_request(item, vocabulary()) for item in items]
    finish(make_engine(converted(1), max_batch_size=9, max_step_tokens=24, block_size=4), requests)
    for output in requests[6].outputs:
        ends = (k for k in range(1, 13) if searched.reason_to_end(output.token_ids[:k]) is not None)
        del output.token_ids[next(ends) :]
        output.finish_reason = searched.reason_to_end(output.token_ids)
    return texts([results(request) for request in requests])


def texts(all_results: list[dict[str, Any]]) -> Texts:
    return [[(output["token_ids"], output["finish_reason"]) for output in one["outputs"]] for one in all_results]


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
def test_mixed_requests_get_the_torch_engines_tokens(
    tp: int,
    pp: int,
    library: Path,
    converted: Callable[[int], Path],
    torch_texts: Texts,
    gpt2_source: tuple[Path, GPT2LMHeadModel],
) -> None:
    items = mixed_items()
    flags = ["--engine", "fastertransformer", "--lib-path", str(library)]
    got = texts(run_engine(converted(tp), items, tp, pp, *flags))
    assert got == torch_texts
    assert not any(reason == END_ID for beams in got[5:9] for _, reason in beams)
    assert "stop" in [reason for _, reason in got[6]] and got[10][0][1] == "stop"
    assert got[0][0][0] == hf_greedy(gpt2_source[1], items[0]["prompt_ids"], 8)


def test_greedy_parameters_against_numpy(
    library: Path, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    """Each parameter in two batches with the others, its tokens and log-probability, and that it tells."""
    model = gpt2_source[1]
    ids = prompts(12)
    free = [hf_greedy(model, prompt, NEW_TOKENS) for prompt in ids]
    end_id = free[0][2]
    options: list[dict[str, Any]] = [
        {"min_length": 9},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.0, "temperature": 0.5, "top_k": 1},
        {"presence_penalty": 0.4, "temperature": 0},
        {"repetition_penalty": 1.3, "min_length": 3},
        {},
        {"temperature": 0.2, "top_k": 1},
        {},
        {},
        {"repetition_penalty": 1.4},
    ]
    bad = {
        5: [[free[5][0]]],
        7: [[free[7][0], free[7][1]], [ids[7][-1], free[7][0]]],
        1: [[free[1][4]], [17], [free[1][0]]],
    }
    ids[9] = ids[9][:1]  # a penalty after a single token, in a batch of its own below
    requests = [
        Request(prompt, SamplingParams(NEW_TOKENS, **one), (end_id,), bad_word_ids=bad.get(i, []))
        for i, (prompt, one) in enumerate(zip(ids, options, strict=False))
    ]
    engine = ft_engine(converted(1), library, end_id=end_id, end_ids=())
    finish(engine, requests[:-1])
    finish(engine, requests[-1:])
    assert len(engine.executor._op.calls) == 4  # the two penalties, the word of two tokens, the last one
    for i, request in enumerate(requests):
        tokens, log_prob = reference(model, request)
        assert request.output_ids == tokens, options[i]
        assert request.outputs[0].cum_log_prob == pytest.approx(log_prob, rel=1e-3), options[i]
        plain, _ = reference(model, Request(ids[i], SamplingParams(NEW_TOKENS), (end_id,)))
        assert (tokens != plain) == (i not in (6, 8)), options[i]


def test_samples_are_those_of_requests_with_their_seeds(library: Path, converted: Callable[[int], Path]) -> None:
    engine = ft_engine(converted(1), library)
    [ids] = prompts(1)
    options = dict(top_k=40, top_p=0.9, temperature=1.5)
    together = Request(ids, SamplingParams(12, n=3, random_seed=2**64 - 2, **options), (302,))
    alone = [
        Request(ids, SamplingParams(12, random_seed=seed, **options), (302,)) for seed in (2**64 - 2, 2**64 - 1, 0)
    ]
    finish(engine, [together, *alone])
    assert [output.token_ids for output in together.outputs] == [request.output_ids for request in alone]
    assert len({tuple(output.token_ids) for output in together.outputs}) == 3
    # The stand-in's fp32 products round differently with another number of rows.
    log_probs = [one.outputs[0].cum_log_prob for one in alone]
    assert [output.cum_log_prob for output in together.outputs] == pytest.approx(log_probs, rel=1e-6)


def test_beams_best_first_with_their_log_probabilities(
    library: Path, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    engine = ft_engine(converted(1), library)
    ids = prompts(2)
    requests = [Request(prompt, SamplingParams(10, beam_width=4), (302,)) for prompt in ids]
    finish(engine, requests)
    assert len(engine.executor._op.calls) == 1
    for prompt, request in zip(ids, requests, strict=True):
        scores = [output.cum_log_prob for output in request.outputs]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        for output, score in zip(request.outputs, scores, strict=True):
            with torch.no_grad():
                log_probs = gpt2_source[1](torch.tensor([prompt + output.token_ids])).logits[0].log_softmax(-1)
            own = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(output.token_ids)[:, None]).sum()
            assert score == pytest.approx(float(own), rel=1e-4)


def reader_of(folder: Path, dtype: torch.dtype = torch.float32, tp_rank: int = 0) -> ShardReader:
    return ShardReader(folder, ModelConfig.read(folder / "config.ini"), tp_rank, dtype)


def test_weight_list_has_the_ops_order(converted: Callable[[int], Path]) -> None:
    """Rank 3 of 2 × 2: second tp shard, layers 2 and 3; compared with the files read plainly."""
    folder = converted(2)
    weights, int8_weights, scales = read_weights(
        reader_of(folder, tp_rank=1), ParallelConfig(2, 2, 3), 0, torch.device("cpu")
    )
    assert (len(weights), int8_weights, scales) == (12 * 4 + 2 + 1 + 2 + 4, [], [])
    kinds = "input_layernorm attention.query_key_value attention.dense post_attention_layernorm".split()
    kinds += ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    names = [f"{kind}.{part}" for kind in kinds for part in ("weight", "bias")]
    for kind, name in enumerate(names):
        for layer in range(4):
            tensor = weights[kind * 4 + layer]
            if layer < 2:
                assert tensor.shape == (0,)
                continue
            paths = [folder / f"model.layers.{layer}.{name}{part}.bin" for part in (".1", "")]
            path = next(p for p in paths if p.exists())
            assert np.array_equal(tensor.flatten().numpy(), np.fromfile(path, np.float32)), name
    outer = ["final_layernorm.weight", "final_layernorm.bias", "wpe", "wte", "wte"]
    for tensor, name in zip(weights[48:53], outer, strict=True):
        assert np.array_equal(tensor.flatten().numpy(), np.fromfile(folder / f"model.{name}.bin", np.float32)), name
    assert all(t.shape == (0,) and t.dtype == torch.float32 for t in weights[53:])


def test_int8_is_per_column_and_symmetric(library: Path) -> None:
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    quantized, scale = quantize(matrix)
    assert (quantized.dtype, tuple(quantized.shape), tuple(scale.shape)) == (torch.int8, (64, 96), (96,))
    wide = matrix.float().numpy()
    exact = np.abs(wide).max(axis=0) / 128  # FasterTransformer's range, in which +128 is clipped to 127
    np.testing.assert_allclose(scale.float().numpy(), exact, rtol=2**-8)  # the scale is bf16
    assert (np.abs(quantized.numpy() * exact - wide) <= exact * 1.001).all()


def test_int8_engine_gives_the_tokens_of_the_dequantized_model(
    library: Path, converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    folder = converted(1)
    config = ModelConfig.read(folder / "config.ini")
    settings = EngineConfig(int8_mode=1, data_type="bf16")
    executor = FasterTransformerExecutor(
        folder, config, settings, ParallelConfig(), cpu_backend(library, torch.bfloat16)
    )
    executor.prepare()
    model = copy.deepcopy(gpt2_source[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.to(torch.bfloat16)
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                quantized, scale = quantize(rounded)
                parameter.copy_(quantized.float() * scale.float())
            else:
                parameter.copy_(rounded.float())
    inputs = prompts(3)
    rows = executor.execute(Batch([RequestRow(ids, SamplingParams(24), []) for ids in inputs])).wait()
    assert [row.token_ids for [row] in rows] == [hf_greedy(model, ids, 24) for ids in inputs]


def test_int8_with_fp32_is_refused(library: Path, converted: Callable[[int], Path]) -> None:
    folder = converted(1)
    with pytest.raises(ValueError, match="quantization is int8; FasterTransformer's int8 needs data_type fp16 or bf16"):
        FasterTransformerExecutor(
            folder,
            ModelConfig.read(folder / "config.ini"),
            EngineConfig(int8_mode=1),
            ParallelConfig(),
            cpu_backend(library, torch.float32),
        )


NAMES = "ids lengths output_len beam_width top_k top_p diversity temperature len_penalty".split()
NAMES += "repetition presence min_length seed bad_words cum_log_probs".split()


def op_arguments(executor: FasterTransformerExecutor, *rows: RequestRow) -> dict[str, Any]:
    """What the op is called with for these rows, but for its defaults; tensors as (dtype, values)."""
    executor.execute(Batch(list(rows)))
    given = zip(NAMES, executor._op.calls[-1], strict=True)
    return {
        name: (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value
        for name, value in given
        if value is not None
    }


def test_arguments_have_the_dtypes_and_shapes_that_the_op_reads(
    library: Path, converted: Callable[[int], Path]
) -> None:
    executor = ft_executor(converted(1), library)
    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    row = [
        RequestRow([5, 6], SamplingParams(5), []),
        RequestRow([7], SamplingParams(3, 0.5, 40, 0.75, 2**64 - 1, repetition_penalty=1.5), [[8, 9], [4]]),
        RequestRow([8], SamplingParams(5, temperature=0, top_k=9, min_length=2**32 - 1), []),
    ]
    assert op_arguments(executor, *row) == {
        "ids": (i32, [[5, 6], [7, 302], [8, 302]]),
        "lengths": (i32, [2, 1, 1]),
        "output_len": 5,
        "beam_width": 1,
        "top_k": (i32, [1, 40, 1]),
        "top_p": (f32, [0, 0.75, 0]),
        "temperature": (f32, [1, 0.5, 1]),
        "repetition": (f32, [1, 1.5, 1]),
        "min_length": (i32, [0, 0, 5]),
        "seed": (i64, [0, -1, 0]),
        "bad_words": (i32, [[[0] * 3, [-1] * 3], [[8, 9, 4], [2, 3, -1]], [[0] * 3, [-1] * 3]]),
        "cum_log_probs": 1,
    }
    beams = [
        RequestRow([5, 6, 7], SamplingParams(4, 0.5, beam_width=3, len_penalty=-1.0, presence_penalty=0.5), []),
        RequestRow([5, 6, 8], SamplingParams(4, 0.5, beam_width=3, len_penalty=-1.0, presence_penalty=0.5), []),
    ]
    assert op_arguments(executor, *beams) == {
        "ids": (i32, [[5, 6, 7], [5, 6, 8]]),
        "lengths": (i32, [3, 3]),
        "output_len": 4,
        "beam_width": 3,
        "temperature": (f32, [0.5, 0.5]),
        "len_penalty": (f32, [-1, -1]),
        "presence": (f32, [0.5, 0.5]),
        "cum_log_probs": 1,
    }
    diverse = op_arguments(
        executor, RequestRow([5], SamplingParams(4, 0, beam_width=2, beam_search_diversity_rate=-0.5), [])
    )
    assert diverse.keys() - {"ids", "lengths", "output_len", "beam_width", "cum_log_probs"} == {"diversity"}
    assert diverse["diversity"] == (f32, [-0.5])
    plain = op_arguments(executor, RequestRow([5], SamplingParams(4, len_penalty=2.0), []))
    assert plain.keys() == {"ids", "lengths", "output_len", "beam_width", "top_k", "top_p", "seed", "cum_log_probs"}
    assert plain["ids"] == (i32, [[5]])
    greedy = op_arguments(executor, RequestRow([5], SamplingParams(4, 0.5, presence_penalty=1.0), []))
    assert (greedy["temperature"], greedy["top_k"], greedy["ids"]) == ((f32, [0.5]), (i32, [1]), (i32, [[5, 302]]))


def test_a_penalty_counts_after_one_token_unless_no_position_is_left(
    library: Path, converted: Callable[[int], Path]
) -> None:
    """The op applies none at step 1, so a lone prompt of one token is padded to two, as in a larger batch."""
    executor = ft_executor(converted(1), library)
    assert executor.max_seq_len == 256
    for output_len, ids in ((254, [[5, 302]]), (255, [[5]])):
        given = op_arguments(executor, RequestRow([5], SamplingParams(output_len, repetition_penalty=1.5), []))
        assert given["ids"][1] == ids
