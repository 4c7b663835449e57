"""Weight-only int8: the numbers by their definition, the product without loss, the engine against dequantized files."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig, ParallelConfig
from executor.matmul import Int8CpuMatmul, WideningMatmul, make_matmul
from executor.quantization import QuantizedMatrix, quantize, read_quantized
from executor.startup import pick_backend
from kernels import linear
from tests.support.engines import make_engine, prompts, save_logits
from tests.support.quantized import by_definition, write_dequantized
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig
from weights.reader import ShardReader
from weights.table import layer_specs

CPU = torch.device("cpu")
NEW_TOKENS = 16
HAS_VNNI = torch.cpu._is_vnni_supported()


def test_numbers_are_fastertransformers() -> None:
    weight = np.random.default_rng(0).standard_normal((40, 9)).astype(np.float32)
    weight[:, 3] = 0  # a column without values
    weight[:5, 4] = [1.28, -1.28, 0.005, -0.005, 0.015]  # the ends, and halves
    weight[5:, 4] = 0.1
    matrix = quantize(torch.tensor(weight), torch.tensor(np.abs(weight).max(0)), "int8")
    integers, scales = by_definition(weight)
    assert np.array_equal(matrix.values.numpy().T, integers) and np.array_equal(matrix.scales.numpy(), scales)
    assert integers[:2, 4].tolist() == [127, -128]
    assert np.array_equal(matrix.dequantize().numpy(), integers * scales)
    # Half a step off at most, a whole one at a column's positive end.
    assert (np.abs(matrix.dequantize().numpy() - weight) <= scales * np.where(integers == 127, 1.0, 0.5) * 1.001).all()


def random_matrix(num_in: int, num_out: int) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(num_in)
    values = torch.randint(-128, 128, (num_out, num_in), dtype=torch.int8, generator=generator)
    return QuantizedMatrix(values, torch.rand(num_out, generator=generator) / 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 31, 32, 33, 200])
@pytest.mark.parametrize(("num_in", "num_out"), [(48, 33), (768, 256), (3072, 50)])
@pytest.mark.parametrize("kind", [Int8CpuMatmul, WideningMatmul])
def test_product_is_the_dequantized_one(kind: type, num_in: int, num_out: int, rows: int, dtype: torch.dtype) -> None:
    """Near the rounding of a plain product in the same dtype, even in a row with one value far above the others."""
    if kind is Int8CpuMatmul and not HAS_VNNI:
        pytest.skip("no VNNI here")
    matrix = random_matrix(num_in, num_out)
    generator = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, num_in, generator=generator), torch.randn(num_out, generator=generator)
    x[0] *= 1e4  # each row has steps of its own
    x[-1, 0] = 100
    x, bias = x.to(dtype), bias.to(dtype)
    for b in (bias, None):
        exact = x.double() @ matrix.dequantize().double() + (0 if b is None else b.double())
        ours = kind(matrix)(x, b)
        assert ours.dtype == dtype
        errors = torch.linalg.vector_norm(ours.double() - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
        assert errors.max() < (4e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.skipif(not HAS_VNNI, reason="no VNNI here")
def test_largest_values_fit_their_digits() -> None:
    """The largest of a row, rounded up, once ran over into the next digit and became the smallest."""
    matrix = random_matrix(64, 40)
    x = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ matrix.dequantize().double()
    multiply = Int8CpuMatmul(matrix)
    ours = torch.cat([multiply(part, None) for part in x.split(32)])
    assert ((ours - exact).abs().amax(1) / exact.abs().amax(1)).max() < 1e-5


def test_rows_of_zeros_and_of_nan_stay_their_own() -> None:
    multiply = make_matmul(random_matrix(64, 40))
    x = torch.randn(4, 64)
    alone = multiply(x[3:], None)
    x[0], x[1, 5], x[2, 5] = 0, torch.nan, torch.inf
    y = multiply(x, None)
    assert (y[0] == 0).all() and not y[1:3].isfinite().any()
    torch.testing.assert_close(y[3:], alone)


def test_wrapper_refuses_what_does_not_fit() -> None:
    matrix, workspace = random_matrix(8, 4), linear.make_workspace(CPU)
    x, values, scales = torch.randn(2, 8), matrix.values, matrix.scales
    for arguments, sentence in (
        ((x[:, :7], values, scales, None), r"x is \[2, 7\] and weight \[4, 8\]"),
        ((x, values.float(), scales, None), "must be torch.int8 or torch.float8_e4m3fn and contiguous"),
        ((x, values, scales[:3], None), r"scales are torch.float32 \[3\]"),
        ((x, values, scales.half(), None), r"must be fp32 \[4\]"),
        ((x, values, scales, torch.zeros(4).half()), "bias is torch.float16"),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrong_x, weight, wrong_scales, bias = arguments
            linear.linear(wrong_x, weight, bias, workspace, scales=wrong_scales)
    exact = x @ matrix.dequantize()
    torch.testing.assert_close(linear.linear(x, values, None, workspace, scales=scales), exact)


def anonymous_mb() -> float:
    """What is in use, without what the heap keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("RssAnon"))


def test_memory_is_a_byte_a_weight() -> None:
    """What is multiplied with is all that stays: neither fp32 nor a second int8 copy."""
    make_matmul(random_matrix(1024, 2048))  # what is allocated once
    before, matrices = anonymous_mb(), 24
    kept = []
    for _ in range(matrices):
        weight = torch.randn(1024, 2048)
        kept.append(make_matmul(quantize(weight, weight.abs().amax(0), "int8")))
    del weight
    kept[0](torch.randn(3, 1024), None)
    assert anonymous_mb() - before < 1.5 * matrices * 1024 * 2048 / 1e6


# --- in the engine ---


@pytest.fixture(scope="module")
def dequantized(converted: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dequantized(converted(1), tmp_path_factory.mktemp("dequantized") / "1-gpu")


def test_shards_are_the_whole_matrix_quantized(converted: Callable[[int], Path]) -> None:
    def read(tp: int, rank: int, part: int) -> QuantizedMatrix:
        config = ModelConfig.read(converted(tp) / "config.ini")
        reader = ShardReader(converted(tp), config, rank, torch.bfloat16)  # no matter: the file's values count
        return read_quantized(reader, layer_specs(config, 1)[part], "int8", CPU)

    for part in (4, 10):  # row-parallel: attention.dense, mlp down
        whole, shards = read(1, 0, part), [read(2, rank, part) for rank in range(2)]
        assert torch.equal(torch.cat([shard.values for shard in shards], dim=1), whole.values)
        assert all(torch.equal(shard.scales, whole.scales) for shard in shards)
    whole, shards = read(1, 0, 8), [read(2, rank, 8) for rank in range(2)]  # mlp up
    assert torch.equal(torch.cat([shard.values for shard in shards]), whole.values)
    whole, shards = read(1, 0, 2), [read(2, rank, 2) for rank in range(2)]  # q, k, v of the first heads
    thirds = whole.values.unflatten(0, (3, 2, -1))
    assert all(torch.equal(shard.values, thirds[:, rank].flatten(0, 1)) for rank, shard in enumerate(shards))


@pytest.fixture(scope="module")
def expected(dequantized: Path) -> tuple[list[list[int]], np.ndarray]:
    """Tokens and logits of the dequantized folder, computed in fp32."""
    tokens = first_outputs(run_engine(dequantized, greedy_items(prompts(8), NEW_TOKENS), 1, 1))
    return tokens, run_logits(dequantized, prompts(8), 1, 1)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)], ids=["tp1-pp1", "tp2-pp1", "tp2-pp2"])
def test_engine_is_that_of_dequantized_files(
    tp: int, pp: int, converted: Callable[[int], Path], expected: tuple[list[list[int]], np.ndarray]
) -> None:
    tokens, logits = expected
    results = run_engine(converted(tp), greedy_items(prompts(8), NEW_TOKENS), tp, pp, "--int8-mode", "1")
    assert first_outputs(results) == tokens
    ours = run_logits(converted(tp), prompts(8), tp, pp, "--int8-mode", "1")
    distances = np.linalg.norm(ours - logits, axis=1) / np.linalg.norm(logits, axis=1)
    print("logit error", distances.max())
    assert distances.max() < 1e-5


def test_it_differs_from_the_model_itself_by_a_percent(
    converted: Callable[[int], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logits = []
    with caplog.at_level(logging.INFO, logger="engine"):
        for int8_mode in (0, 1):
            engine = make_engine(converted(1), int8_mode=int8_mode)
            save_logits(engine.executor, ParallelConfig(), prompts(8), tmp_path / "logits.npy")
            logits.append(np.load(tmp_path / "logits.npy"))
    error = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
    assert 1e-4 < error < 0.05
    assert "int8 weights: relative error of the logits " in caplog.text


def test_torch_engine_is_chosen(converted: Callable[[int], Path]) -> None:
    config = ModelConfig.read(converted(1) / "config.ini")
    assert (
        pick_backend(EngineConfig(engine="torch", device="cpu", int8_mode=1), config, Path("none"), 0).engine == "torch"
    )
