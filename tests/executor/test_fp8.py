"""fp8 weights and cache: the numbers by e4m3's definition, the engine against files of dequantized weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.plan import Chunk, NewSequences, Plan
from engine.request import SamplingParams
from executor import probe, runner, startup
from executor.kv_cache import CacheShape, KVCache, KVScales
from executor.matmul import CpuMatmul, make_matmul
from executor.quantization import quantize
from kernels import decode_attention, linear, prompt_attention, quantize_rows, store_kv, widen
from kernels.decode_attention import DecodeMetadata, make_workspace
from kernels.fp8 import FP8, to_fp8
from kernels.heads import HeadLayout
from kernels.layer_cache import LayerCache
from tests.support.engines import make_engine, prompts
from tests.support.quantized import fp8_by_definition, nearest_e4m3, write_dequantized
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

CPU = torch.device("cpu")
NEW_TOKENS = 16
FP8_WEIGHTS = ("--quantization", "fp8")
FP8_CACHE = ("--kv-cache-dtype", "fp8")


def random_values(*shape: int) -> np.ndarray:
    """Of many magnitudes, normal and subnormal in e4m3, and beyond its largest."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 10, shape)).astype(np.float32)


def test_the_cast_rounds_to_the_nearest_and_saturates() -> None:
    x = random_values(50, 40)
    assert (np.abs(x) > 448).any() and (np.abs(x) < 2.0**-9).any()
    assert np.array_equal(to_fp8(torch.tensor(x), torch.tensor(1.0)).float().numpy(), nearest_e4m3(x))
    odd = to_fp8(torch.tensor([1e30, -torch.inf, torch.nan, 449.0, 1.0625, 1.1875]), torch.tensor(1.0)).float()
    assert odd.nan_to_num(-1).tolist() == [448, -448, -1, 448, 1.0, 1.25]  # halves to even
    assert to_fp8(torch.tensor([6.0]), torch.tensor([2.0])).item() == 3.0


def test_weights_are_e4m3_with_a_scale_for_each_column() -> None:
    weight = random_values(40, 9)
    weight[:, 3] = 0
    matrix = quantize(torch.tensor(weight), torch.tensor(np.abs(weight).max(0)), "fp8")
    values, scales = fp8_by_definition(weight)
    assert matrix.values.dtype == FP8 and matrix.scales.dtype == torch.float32
    assert np.array_equal(matrix.values.float().numpy().T, values) and np.array_equal(matrix.scales.numpy(), scales)
    assert np.array_equal(matrix.dequantize().numpy(), values * scales)
    assert (np.abs(values).max(0) == np.where(scales > 0, 448, 0)).all()


def test_products_that_cublas_lacks_are_of_widened_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock: only a GPU multiplies fp8 with fp8."""
    errors = ["CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic(...)`"]

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError(errors[-1])

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    monkeypatch.setattr(linear, "rounds_rows", lambda rows, weight, dtype: True)
    monkeypatch.setattr(linear, "quantize_rows", quantize_rows.reference)
    values, scales, bias = to_fp8(torch.randn(48, 64), torch.ones(48, 1)), torch.rand(48), torch.randn(48).bfloat16()
    x, workspace = torch.randn(33, 64).bfloat16(), linear.make_workspace(CPU)
    exact = x.double() @ (values.double() * scales[:, None].double()).t() + bias.double()
    ours = linear.linear(x, values, bias, workspace, scales=scales)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-2 * float(exact.abs().max()))
    wide = torch.empty(33, 48)
    assert linear.linear(x, values, bias, workspace, "relu", scales, wide) is wide
    torch.testing.assert_close(wide.double(), exact.relu(), rtol=0, atol=1e-2 * float(exact.abs().max()))
    raw = torch.randn(33, 128).bfloat16()
    activated = (torch.nn.functional.silu(raw[:, :64].float()) * raw[:, 64:].float()).double()
    exact = activated @ (values.double() * scales[:, None].double()).t() + bias.double()
    ours = linear.linear(raw, values, bias, workspace, scales=scales, input_activation="swiglu")
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-2 * float(exact.abs().max()))
    errors.append("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        linear.linear(x, values, bias, workspace, scales=scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 33])
def test_product_is_the_dequantized_one(rows: int, dtype: torch.dtype) -> None:
    weight = torch.tensor(random_values(48, 33))
    matrix = quantize(weight, weight.abs().amax(0), "fp8")
    x, bias = torch.randn(rows, 48).to(dtype), torch.randn(33).to(dtype)
    exact = x.double() @ matrix.dequantize().double() + bias.double()
    for ours in (
        make_matmul(matrix)(x, bias),
        linear.linear(x, matrix.values, bias, linear.make_workspace(CPU), scales=matrix.scales),
    ):
        errors = torch.linalg.vector_norm(ours.double() - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)
        assert ours.dtype == dtype and errors.max() < (1e-6 if dtype == torch.float32 else 1e-2)
    wide = widen.widen(matrix.values, matrix.scales, dtype)
    assert torch.equal(wide, matrix.dequantize().t().to(dtype))


def test_rows_have_scales_of_their_own() -> None:
    x = torch.tensor(random_values(7, 30))
    x[2] = 0
    values, scales = quantize_rows.quantize_rows(x)
    expected = x.abs().amax(1, keepdim=True) / 448
    expected[2] = 1
    assert torch.equal(scales, expected)
    assert np.array_equal(values.float().numpy(), nearest_e4m3((x / expected).numpy()))
    assert (values.float().abs().amax(1) == torch.tensor([448, 448, 0, 448, 448, 448, 448])).all()
    with pytest.raises(ValueError, match=r"x is \[3\]; it must be \[rows, in\]"):
        quantize_rows.quantize_rows(torch.zeros(3))


def test_rows_are_activated_before_they_are_rounded() -> None:
    x = torch.tensor(random_values(5, 24))
    gate, up = x.double().chunk(2, 1)
    for activation, exact in (
        ("relu", x.double().clamp_min(0).numpy()),
        ("swiglu", (gate * gate.sigmoid() * up).numpy()),
    ):
        values, scales = quantize_rows.quantize_rows(x, activation)
        np.testing.assert_allclose(scales.numpy(), np.abs(exact).max(1, keepdims=True) / 448, rtol=1e-5)
        np.testing.assert_allclose(values.float().numpy() * scales.numpy(), exact, atol=2**-5 * np.abs(exact).max())


# --- the cache ---


def fp8_cache(num_locs: int, kv_heads: int, head_dim: int) -> LayerCache:
    generator = torch.Generator().manual_seed(0)
    scales = [2.0 ** torch.randint(-8, -5, (kv_heads,), generator=generator) for _ in range(2)]
    parts = [torch.randn(num_locs, kv_heads, head_dim, generator=generator) for _ in range(2)]
    return LayerCache(*(to_fp8(part, scale[:, None]) for part, scale in zip(parts, scales, strict=True)), *scales)


def test_the_cache_keeps_each_head_in_its_scale() -> None:
    cache = fp8_cache(10, 2, 4)
    key, value = (torch.tensor(part) for part in (random_values(3, 2, 4), random_values(3, 2, 4)[::-1].copy()))
    kv_locs = torch.tensor([7, 0, 3])
    before = cache.keys.view(torch.uint8).clone()
    cache.write(key, value, kv_locs)
    for dtype in (torch.float32, torch.bfloat16):
        for ours, part, scales in zip(cache.read(kv_locs, dtype), (key, value), cache[2:], strict=True):
            scale = scales[:, None].numpy()
            assert ours.dtype == dtype  # exact in bf16, too
            assert np.array_equal(ours.float().numpy(), nearest_e4m3(part.numpy() / scale) * scale)
    others = [1, 2, 4, 5, 6, 8, 9]
    assert torch.equal(cache.keys.view(torch.uint8)[others], before[others])


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_reads_what_it_stored(kv_heads: int) -> None:
    """Decode rows and prompts over an fp8 cache are those over its numbers in fp32, the new tokens rounded, too."""
    layout = HeadLayout(4, kv_heads, 8, kv_heads != 4)
    qkv = torch.randn(5, (4 + 2 * kv_heads) * 8)
    table = torch.randperm(40).int().view(2, 20)
    _, key, value = layout.split(qkv)
    rounded = fp8_cache(40, kv_heads, 8)
    wide = LayerCache(*(part.contiguous() for part in rounded.read(slice(None), torch.float32)))

    def store(rows: slice, kv_locs: torch.Tensor) -> None:  # by definition
        for part, new, scales in zip(wide[:2], (key, value), rounded[2:], strict=True):
            scale = scales[:, None].numpy()
            part[kv_locs] = torch.tensor(nearest_e4m3(new[rows].numpy() / scale) * scale)

    decodes = DecodeMetadata(table, torch.tensor([1, 0]), torch.tensor([4, 9]), make_workspace(0, 0, CPU))
    kv_locs = table[decodes.slots, decodes.positions].long()
    ours = decode_attention.decode_attention(qkv[:2], layout, rounded, decodes)
    store(slice(2), kv_locs)
    expected = [
        _attend(qkv[row : row + 1], layout, wide, table[slot, : position + 1].long())
        for row, (slot, position) in enumerate(((1, 4), (0, 9)))
    ]
    torch.testing.assert_close(ours, torch.cat(expected))
    kv_locs = table[1, 10:13].long()
    store_kv.store_kv(qkv[2:], layout, rounded, kv_locs)
    store(slice(2, 5), kv_locs)
    assert all(map(torch.equal, rounded.read(kv_locs, torch.float32), (wide.keys[kv_locs], wide.values[kv_locs])))
    tiles = torch.from_numpy(prompt_attention.make_tiles([(1, 10, 3)]))
    ours = prompt_attention.prompt_attention(qkv[2:], layout, rounded, prompt_attention.PromptMetadata(table, tiles))
    expected = [_attend(qkv[2 + i : 3 + i], layout, wide, table[1, : 11 + i].long()) for i in range(3)]
    torch.testing.assert_close(ours, torch.cat(expected))


def _attend(qkv: torch.Tensor, layout: HeadLayout, cache: LayerCache, kv_locs: torch.Tensor) -> torch.Tensor:
    """One query over the tokens at kv_locs, by torch's attention."""
    q, k, v = layout.split(qkv)[0], cache.keys[kv_locs], cache.values[kv_locs]
    parts = (part.transpose(0, 1) for part in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*parts, enable_gqa=True).transpose(0, 1).flatten(1)


def test_scales_leave_room() -> None:
    part = torch.tensor(random_values(20, 6, 4))
    part[:, 4], part[3, 5, 2] = 0, torch.inf
    scales = probe.head_scales(part)
    assert torch.equal(scales.log2(), scales.log2().round())
    filled = part[:, :4].abs().amax((0, 2)) * 2 / scales[:4]  # twice the largest
    assert (filled <= 448).all() and (filled > 224).all()
    assert scales[4:].tolist() == [1, 1]


def test_a_cache_of_half_the_bytes() -> None:
    shape = CacheShape(3, 16, 2, 8, torch.bfloat16)
    assert shape.bytes_per_block == 2 * 3 * 16 * 2 * 8 * 2
    assert shape._replace(dtype=FP8).bytes_per_block == shape.bytes_per_block // 2
    cache = KVCache(shape._replace(dtype=FP8), 5, CPU, [KVScales(torch.ones(2), torch.ones(2))] * 3)
    assert sum(part.numel() * part.itemsize for layer in cache.layers for part in layer[:2]) == (
        5 * shape.bytes_per_block // 2 + 3 * 2 * 2 * 8  # and the dummy location
    )


# --- in the engine ---


@pytest.fixture(scope="module")
def dequantized(converted: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dequantized(converted(1), tmp_path_factory.mktemp("fp8") / "1-gpu", fp8_by_definition)


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float((np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def test_engine_is_that_of_dequantized_files(converted: Callable[[int], Path], dequantized: Path) -> None:
    items = greedy_items(prompts(8), NEW_TOKENS)
    tokens = first_outputs(run_engine(dequantized, items, 1, 1))
    assert first_outputs(run_engine(converted(1), items, 1, 1, *FP8_WEIGHTS)) == tokens
    ours = run_logits(converted(1), prompts(8), 1, 1, *FP8_WEIGHTS)
    assert relative_error(ours, run_logits(dequantized, prompts(8), 1, 1)) < 1e-5


def test_the_second_product_of_an_mlp_may_activate(
    converted: Callable[[int], Path],
    probe_texts: list[list[int]],
    plain_logits: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a GPU does where it rounds rows to fp8, which a mock says here."""
    activations, call = set(), CpuMatmul.__call__

    def record(
        self: CpuMatmul,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "none",
        out: torch.Tensor | None = None,
        input_activation: str = "none",
    ) -> torch.Tensor:
        activations.add((activation, input_activation))
        return call(self, x, bias, activation, out, input_activation)

    monkeypatch.setattr(CpuMatmul, "activates_input", lambda self, rows, dtype: True)
    monkeypatch.setattr(CpuMatmul, "__call__", record)
    ours = _read(make_engine(converted(1)).executor, probe_texts)
    assert activations == {("none", "none"), ("none", "gelu_tanh")}
    assert relative_error(ours, plain_logits) < 1e-5


def test_a_cache_in_fp8_changes_logits_by_a_percent(converted: Callable[[int], Path]) -> None:
    ours = run_logits(converted(1), prompts(8), 1, 1, *FP8_CACHE)
    assert 1e-4 < relative_error(ours, run_logits(converted(1), prompts(8), 1, 1)) < 0.05
    items = greedy_items(prompts(8), 4)
    ours, plain = (first_outputs(run_engine(converted(1), items, 1, 1, *flags)) for flags in (FP8_CACHE, ()))
    assert sum(a[0] == b[0] for a, b in zip(ours, plain, strict=True)) >= 7  # of 8: a random model's logits are flat


def test_ranks_compute_the_same(converted: Callable[[int], Path]) -> None:
    """Each calibrates its own heads of its own layers. A number may fall to the other side of a rounding."""
    ours = run_logits(converted(2), prompts(3), 2, 2, *FP8_WEIGHTS, *FP8_CACHE)
    assert relative_error(ours, run_logits(converted(1), prompts(3), 1, 1, *FP8_WEIGHTS, *FP8_CACHE)) < 0.02


@pytest.fixture(scope="module")
def probe_texts(converted: Callable[[int], Path]) -> list[list[int]]:
    config = ModelConfig.read(converted(1) / "config.ini")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 64))
    tokens[:, 0] = config.start_id
    return tokens.tolist()


@pytest.fixture(scope="module")
def plain_logits(converted: Callable[[int], Path], probe_texts: list[list[int]]) -> np.ndarray:
    return _read(make_engine(converted(1)).executor, probe_texts)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quantization": "fp8"}, "fp8 weights"),
        ({"kv_cache_dtype": "fp8"}, "fp8 key-value cache"),
        ({"int8_mode": 1}, "int8 weights"),
        pytest.param(
            {"quantization": "w8a8"},
            "w8a8 weights",
            marks=pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="no VNNI here"),
        ),
    ],
    ids=str,
)
def test_start_up_tells_the_error_on_the_logits(
    settings: dict[str, str | int],
    name: str,
    converted: Callable[[int], Path],
    probe_texts: list[list[int]],
    plain_logits: np.ndarray,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The figures of its one line, beside those of two engines that read the same tokens."""
    with caplog.at_level(logging.INFO, logger="engine"):
        executor = make_engine(converted(1), **settings).executor
    (found,) = re.findall(
        rf"{name}: relative error of the logits (.*), the same next token at (.*) % of 256 probe tokens", caplog.text
    )
    error, share = map(float, found)
    ours = _read(executor, probe_texts)
    assert error == pytest.approx(np.linalg.norm(ours - plain_logits) / np.linalg.norm(plain_logits), rel=0.05)
    assert 0 < error < 0.1
    assert share == pytest.approx(100 * (ours.argmax(1) == plain_logits.argmax(1)).mean(), abs=1)


@torch.inference_mode()
def _read(executor: runner.TorchExecutor, texts: list[list[int]]) -> np.ndarray:
    """Logits at each token of the texts, one text after another: [tokens, vocab]."""
    rows = []
    for text in texts:
        blocks = list(range(-(-len(text) // executor.cache.block_size)))
        new = NewSequences([0], text, SamplingParams(1), (), [blocks])
        hidden = executor.hidden(Plan(chunks=[Chunk(0, 0, len(text), [0])], new_sequences=[new]))
        rows.append(executor.model.logits(hidden).numpy())
    return np.concatenate(rows)


def test_nothing_is_probed_without_need(converted: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="engine"):
        make_engine(converted(1))
    assert "probe" not in caplog.text


def test_more_tokens_fit_into_the_memory(converted: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_memory_left", lambda device, local_size: 8_000_000)
    plain, ours = (make_engine(converted(1), kv_cache_dtype=dtype).executor for dtype in ("auto", "fp8"))
    assert plain.cache.dtype == torch.float32 and ours.cache.dtype == FP8
    assert ours.num_blocks // 4 == plain.num_blocks > 0


# --- refusals ---


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="quantization is fp8, and int8_mode is 1, which is quantization int8"):
        EngineConfig(quantization="fp8", int8_mode=1)
    formats = [
        EngineConfig(int8_mode=mode, quantization=name).weight_format for mode, name in ((1, "none"), (1, "int8"))
    ]
    assert [*formats, EngineConfig(quantization="int8").weight_format] == ["int8"] * 3
    assert EngineConfig().weight_format == "none"


@pytest.mark.parametrize("name", ["quantization", "kv_cache_dtype"])
def test_who_lacks_fp8_says_so(
    name: str, converted: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.read(converted(1) / "config.ini")
    library = tmp_path / "libth_transformer.so"
    library.touch()
    wanted = {name: "fp8"}
    with pytest.raises(ValueError, match=f"{name} is fp8; FasterTransformer's GPT computes"):
        startup.pick_backend(EngineConfig(engine="fastertransformer", device="cpu", **wanted), config, library, 0)
    assert startup.pick_backend(EngineConfig(device="cpu", **wanted), config, library, 0).engine == "torch"
    monkeypatch.setattr(startup, "pick_device", lambda wish, rank: torch.device("cuda", 0))
    monkeypatch.setattr(startup, "has_fp8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    sentence = f"{name} is fp8, which needs compute capability 8.9 or later; A100 has 8.0"
    with pytest.raises(RuntimeError, match=sentence):
        startup.pick_backend(EngineConfig(**wanted), config, Path("none"), 0)
