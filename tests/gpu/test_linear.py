"""The kernels for few rows against plain torch in fp64: weights in x's dtype, int8 and fp8, every activation."""

from __future__ import annotations

import pytest
import torch

from kernels import linear
from kernels.activation import ACTIVATIONS
from kernels.fp8 import FP8, has_fp8, to_fp8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ROWS = (1, 2, 3, 7, 8, 16, 17, 32, 33, 64, 65, 100, 128, 129, 256, 257, 300)


def relative_errors(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(ours.double() - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)


KINDS = {"plain": None, "int8": torch.int8, "fp8": FP8}


def random_weight(num_out: int, num_in: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight of the dtype, or int8 or fp8 with scales."""
    if dtype == FP8:
        if not has_fp8(torch.device("cuda", 0)):
            pytest.skip("no fp8 on this GPU")
        weight = torch.randn(num_out, num_in, device="cuda")
        scales = weight.abs().amax(1) / 448
        return to_fp8(weight, scales[:, None]), scales * num_in**-0.5
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (num_out, num_in), dtype=torch.int8, device="cuda")
        return weight, torch.rand(num_out, device="cuda") / 100
    return (torch.randn(num_out, num_in, device="cuda") * num_in**-0.5).to(dtype), None


def rounds_rows(kind: str, dtype: torch.dtype, rows: int, num_in: int, num_out: int) -> bool:
    """Whether x is rounded to fp8, too."""
    is_fit = num_in % 16 == num_out % 16 == 0
    return kind == "fp8" and dtype == torch.bfloat16 and rows > 1 and is_fit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_in", "num_out"), [(64, 192), (768, 2304), (200, 334), (4096, 1024), (1000, 50), (8192, 2048), (1024, 50257)]
)
def test_linear_is_the_reference(num_in: int, num_out: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(num_in)
    weight, scales = random_weight(num_out, num_in, KINDS[kind] or dtype)
    workspace = linear.make_workspace(weight.device)
    exact_weight = weight.double() * (1 if scales is None else scales[:, None].double())
    bias = torch.randn(num_out, device="cuda").to(dtype)
    for rows in ROWS:
        limit = 8e-3 if dtype == torch.bfloat16 else 1e-3  # for many rows weights with scales are rounded, too
        if rounds_rows(kind, dtype, rows, num_in, num_out):
            limit = 5e-2
        x = torch.randn(rows, num_in, device="cuda").to(dtype)
        for b in (bias, None):
            ours = linear.linear(x, weight, b, workspace, scales=scales)
            assert ours.dtype == dtype and not workspace.any()
            exact = x.double() @ exact_weight.t() + (0 if b is None else b.double())
            assert relative_errors(ours, exact).max() < limit, rows
            reference = linear.reference(x, weight, b, scales=scales).double()
            torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2 * limit * float(exact.abs().max()))
            wide = torch.empty(rows, num_out, device="cuda")
            linear.linear(x, weight, b, workspace, scales=scales, out=wide)
            if kind == "plain":  # fp32 sums, not rounded
                assert relative_errors(wide, exact).max() < 1e-5, rows


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_in", "num_out"), [(256, 512), (200, 334), (2048, 8192)])
def test_activations(num_in: int, num_out: int, kind: str, activation: str) -> None:
    torch.manual_seed(num_in)
    dtype = torch.bfloat16
    weight, scales = random_weight(num_out, num_in, KINDS[kind] or dtype)
    if kind == "int8":
        scales *= 10 / num_in**0.5
    workspace = linear.make_workspace(weight.device)
    bias = torch.randn(num_out, device="cuda").to(dtype)
    exact_weight = weight.double() * (1 if scales is None else scales[:, None].double())
    for rows in (1, 2, 16, 30, 64, 200):
        x = torch.randn(rows, num_in, device="cuda").to(dtype)
        ours = linear.linear(x, weight, bias, workspace, activation, scales)
        exact = ACTIVATIONS[activation](x.double() @ exact_weight.t() + bias.double())
        assert ours.shape == exact.shape
        assert relative_errors(ours, exact).max() < (
            8e-2 if rounds_rows(kind, dtype, rows, num_in, num_out) else 1.5e-2
        ), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("num_in", "num_out"), [(11008, 130), (26624, 64), (32768, 66), (2560, 4608), (6148, 9000)])
def test_one_row_of_bytes(num_in: int, num_out: int, kind: str, dtype: torch.dtype) -> None:
    """6 blocks of W, the last not whole; 13, in as many turns; 16, in two turns; 5 small ones; 7, two on their way."""
    torch.manual_seed(num_in)
    weight, scales = random_weight(num_out, num_in, KINDS[kind])
    assert scales is not None
    if kind == "int8":
        scales /= 10  # fp16 holds the products of swiglu
    workspace = linear.make_workspace(weight.device)
    x, bias = torch.randn(1, num_in, device="cuda").to(dtype), torch.randn(num_out, device="cuda").to(dtype)
    x[0, -4:] = 20  # what is multiplied beyond W's columns would show
    sums = x.double() @ (weight.double() * scales[:, None].double()).t() + bias.double()
    for activation in ("none", "swiglu"):
        ours = linear.linear(x, weight, bias, workspace, activation, scales)
        assert relative_errors(ours, ACTIVATIONS[activation](sums)).max() < (8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_extreme_values() -> None:
    """Large values saturate as torch's do, and give no NaN."""
    x = torch.tensor([[1e4, -1e4]], device="cuda", dtype=torch.bfloat16).repeat_interleave(64, 1)
    weight = torch.cat([torch.ones(8, 64), -torch.ones(8, 64)], 1).cuda().bfloat16()
    weight = torch.cat([weight, -weight])
    workspace = linear.make_workspace(x.device)
    for rows in (1, 4):
        for activation in ("gelu_tanh", "gelu_erf", "relu", "squared_relu", "swiglu"):
            ours = linear.linear(x.repeat(rows, 1), weight, None, workspace, activation)
            expected = linear.reference(x.repeat(rows, 1), weight, None, activation)
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, FP8])
def test_sums_are_the_same_every_time(dtype: torch.dtype) -> None:
    """Splits add up in a fixed order, whichever ends last."""
    for rows, num_out, num_in in ((8, 4096, 4096), (1, 4096, 4096), (20, 1024, 8192)):
        weight, scales = random_weight(num_out, num_in, dtype)
        workspace = linear.make_workspace(weight.device)
        x = torch.randn(rows, num_in, device="cuda", dtype=torch.bfloat16)
        first = linear.linear(x, weight, None, workspace, scales=scales)
        assert all(torch.equal(first, linear.linear(x, weight, None, workspace, scales=scales)) for _ in range(100))
