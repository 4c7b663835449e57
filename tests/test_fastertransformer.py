"""The FasterTransformer driver with the stand-in op: the torch engine's tokens, the op's weights, static batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.fastertransformer import FasterTransformerExecutor, _sampling_arguments, quantize, read_weights
from engine.request import Request, SamplingParams
from engine.static import Batch, StaticScheduler
from engine.weights import ShardReader
from tests.launch import ROOT, mpirun
from tests.standin import StandinUnavailable, build_standin
from tests.test_engine import hf_greedy, prompts

GRIDS = [(1, 1), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        path = build_standin(ROOT / "build" / "standin")
    except StandinUnavailable as error:
        pytest.skip(str(error))
    from engine.comm import World  # initializes MPI, as the op demands

    World()
    torch.classes.load_library(str(path))
    return path


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
def test_stand_in_gets_the_same_tokens(
    tp: int,
    pp: int,
    library: Path,
    converted: Callable[[int], Path],
    gpt2_source: tuple[Path, GPT2LMHeadModel],
    tmp_path: Path,
) -> None:
    """Requests of mixed prompt and output lengths in one batch; the torch engine equals Hugging Face elsewhere."""
    items = [
        {"prompt_ids": ids, "sampling": asdict(SamplingParams(8 + 7 * i, **({"top_k": 1} if i % 2 else {})))}
        for i, ids in enumerate(prompts(7))
    ]
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(items))
    script = str(ROOT / "tests/multi/engine_parity.py")
    flags = ["--engine", "fastertransformer", "--lib-path", str(library), "--tp", str(tp), "--pp", str(pp)]
    done = mpirun(tp * pp, script, str(converted(tp)), str(path), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
    expected = [hf_greedy(gpt2_source[1], item["prompt_ids"], item["sampling"]["max_new_tokens"]) for item in items]
    assert tokens == expected


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
        folder, config, settings, ParallelConfig(), torch.device("cpu"), torch.bfloat16, library
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
    batch = Batch(inputs, [SamplingParams(24)] * 3)
    assert executor.execute(batch).wait() == [hf_greedy(model, ids, 24) for ids in inputs]


def test_int8_with_fp32_is_refused(library: Path, converted: Callable[[int], Path]) -> None:
    folder = converted(1)
    with pytest.raises(ValueError, match="int8_mode is 1; FasterTransformer's int8 needs data_type fp16 or bf16"):
        FasterTransformerExecutor(
            folder,
            ModelConfig.read(folder / "config.ini"),
            EngineConfig(int8_mode=1),
            ParallelConfig(),
            torch.device("cpu"),
            torch.float32,
            library,
        )


def test_sampling_arguments_have_the_dtypes_that_the_op_reads() -> None:
    params = [SamplingParams(5), SamplingParams(5, 0.5, 40, 0.9, 2**64 - 1), SamplingParams(5, temperature=0, top_k=9)]
    top_k, top_p, diversity, temperature, *rest, seeds = _sampling_arguments(params)
    assert (top_k.dtype, top_k.tolist()) == (torch.int32, [1, 40, 1])
    assert top_p.dtype == temperature.dtype == torch.float32
    assert temperature.tolist() == [1.0, 0.5, 1.0]
    assert (seeds.dtype, seeds.tolist()) == (torch.int64, [0, -1, 0])
    assert [diversity, *rest] == [None] * 5


def test_a_batch_never_outgrows_the_positions_and_nobody_loses_the_place_in_line() -> None:
    scheduler = StaticScheduler(max_batch_size=3, max_seq_len=100, end_id=9)
    sizes = [(60, 30), (10, 50), (5, 5), (40, 40), (1, 1)]  # (prompt, output)
    requests = [Request([1] * p, SamplingParams(n), 9, lambda update: None) for p, n in sizes]
    for request in requests:
        scheduler.check(request)
        scheduler.add(request)
    seen = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert scheduler.schedule() is None  # one batch at a time
        seen.append([(len(p), s.max_new_tokens) for p, s in zip(batch.prompts, batch.sampling, strict=True)])
        scheduler.commit([[1] * batch.num_steps for _ in batch.prompts])
    assert seen == [[(60, 30), (5, 5), (40, 40)], [(10, 50), (1, 1)]] or seen == [
        [(60, 30), (5, 5), (1, 1)],
        [(10, 50), (40, 40)],
    ]
    assert [len(r.output_ids) for r in requests] == [n for _, n in sizes]
