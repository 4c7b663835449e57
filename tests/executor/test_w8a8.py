"""W8A8 on a CPU: int8 weights by rows rounded to int8, against numpy by the definition; and who refuses it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from executor import startup
from executor.matmul import Int8CpuMatmul, make_matmul
from executor.quantization import QuantizedMatrix
from tests.support.engines import prompts
from tests.support.ranks import ROOT, run_logits
from weights.model_config import ModelConfig

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="no VNNI here")
FLAGS = ("--quantization", "w8a8")


def random_matrix(num_in: int, num_out: int) -> QuantizedMatrix:
    generator = np.random.default_rng(num_in)
    values = generator.integers(-128, 128, (num_out, num_in), dtype=np.int8)
    scales = generator.random(num_out, dtype=np.float32) / 100
    return QuantizedMatrix(torch.from_numpy(values), torch.from_numpy(scales), rounds_rows=True)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 33, 200])
@pytest.mark.parametrize(("num_in", "num_out"), [(48, 33), (768, 256), (3072, 50)])
def test_product_is_that_of_rounded_rows(num_in: int, num_out: int, rows: int, dtype: torch.dtype) -> None:
    matrix = random_matrix(num_in, num_out)
    generator = np.random.default_rng(rows)
    x = torch.from_numpy(generator.standard_normal((rows, num_in), np.float32))
    x[0] *= 1e4  # each row has a step of its own
    x[-1, 0] = 100
    x = x.to(dtype)
    bias = torch.from_numpy(generator.standard_normal(num_out, np.float32)).to(dtype)
    wide = x.float().numpy()
    steps = np.abs(wide).max(1, keepdims=True) / np.float32(127)
    rounded = np.rint(wide / steps).astype(np.int64)
    assert np.abs(rounded).max() == 127
    exact = (rounded @ matrix.values.numpy().astype(np.int64).T) * steps.astype(np.float64) * matrix.scales.numpy()
    multiply = make_matmul(matrix)
    assert type(multiply) is Int8CpuMatmul
    for b in (bias, None):
        ours = multiply(x, b)
        assert ours.dtype == dtype
        expected = exact if b is None else exact + b.double().numpy()
        errors = np.linalg.norm(ours.double().numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() < (4e-6 if dtype == torch.float32 else 4e-3)  # a digit is stored 128 too large


@needs_vnni
def test_rows_do_not_touch_each_other() -> None:
    multiply = make_matmul(random_matrix(64, 40))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    alone = [multiply(row, None) for row in x.split(1)]
    torch.testing.assert_close(multiply(x, None), torch.cat(alone), rtol=0, atol=0)
    x[0], x[1, 5], x[2, 5], x[3] = 0, torch.nan, torch.inf, 1e-44
    y = multiply(x, None)
    assert (y[0] == 0).all() and not y[1:3].isfinite().any() and (y[3].abs() < 1e-30).all()
    torch.testing.assert_close(y[4:], alone[4], rtol=0, atol=0)


@needs_vnni
def test_ranks_compute_nearly_the_same(converted: Callable[[int], Path]) -> None:
    """A row-parallel linear's ranks have steps of their own for their parts of a row."""
    plain, alone = (run_logits(converted(1), prompts(8), 1, 1, *flags) for flags in ((), FLAGS))
    shared = run_logits(converted(2), prompts(8), 2, 2, *FLAGS)
    for logits in (alone, shared):
        assert 1e-4 < np.linalg.norm(logits - plain) / np.linalg.norm(plain) < 0.05
    assert np.linalg.norm(shared - alone) / np.linalg.norm(alone) < 0.05


RUN = """
import sys
from pathlib import Path
from engine.request import SamplingParams
from tests.support.engines import finish, make_engine, request
finish(make_engine(Path(sys.argv[1]), quantization="w8a8"), [request([1, 2, 3], SamplingParams(2))])
"""


@needs_vnni
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="no AMX here")
@pytest.mark.parametrize(("wish", "has_amx"), [({}, False), ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True)])
def test_amx_is_used_where_the_environment_wants_it_only(
    wish: dict[str, str], has_amx: bool, converted: Callable[[int], Path]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"ONEDNN_VERBOSE": "1", **wish}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(converted(1))], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    products = [line for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line and "wei:s8" in line]
    assert products and any("amx" in line for line in products) == has_amx


def test_its_two_names() -> None:
    assert EngineConfig(int8_mode=2).weight_format == EngineConfig(quantization="w8a8").weight_format == "w8a8"
    assert EngineConfig(int8_mode=2, quantization="w8a8").weight_format == "w8a8"
    with pytest.raises(ValueError, match="quantization is int8, and int8_mode is 2, which is quantization w8a8; set"):
        EngineConfig(quantization="int8", int8_mode=2)


def test_who_lacks_it_says_so(
    converted: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.read(converted(1) / "config.ini")
    library = tmp_path / "libth_transformer.so"
    library.touch()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert startup.pick_backend(EngineConfig(device="cpu", int8_mode=2), config, library, 0).engine == "torch"
    with pytest.raises(ValueError, match="quantization is w8a8; FasterTransformer's GPT computes none and int8 only"):
        startup.pick_backend(EngineConfig(engine="fastertransformer", device="cpu", int8_mode=2), config, library, 0)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(RuntimeError, match="w8a8, which needs a CPU with VNNI; this CPU has none"):
        startup.pick_backend(EngineConfig(device="cpu", int8_mode=2), config, Path("none"), 0)
    with pytest.raises(ValueError, match="w8a8, which needs a CPU with VNNI"):
        make_matmul(random_matrix(8, 4))
    monkeypatch.setattr(startup, "pick_device", lambda wish, rank: torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="w8a8, which needs a CPU with VNNI; a GPU computes int8 and fp8"):
        startup.pick_backend(EngineConfig(int8_mode=2, data_type="fp32"), config, Path("none"), 0)
