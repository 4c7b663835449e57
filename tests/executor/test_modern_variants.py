"""Rotary positions, gated and squared activations, RMSNorm, grouped queries: NeMo's and Megatron-LM's checkpoints of
them, the weights' layout, and the engine's tokens and logits against Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from convert import convert
from engine.config import EngineConfig, ParallelConfig
from engine.request import SamplingParams
from engine.world import World
from executor.rope import rotary_cos_sin, rotary_inv_freq
from executor.startup import WeightFolder, load, pick_backend
from kernels.heads import rotate
from tests.support.broken import edit_content, edit_state
from tests.support.engines import finish, make_engine, request, save_logits
from tests.support.folders import weight_files
from tests.support.modern_checkpoints import ModernGPT
from tests.support.nemo_checkpoints import write_megatron, write_nemo
from tests.support.quantized import write_dequantized
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

NEW_TOKENS = 24
PROMPTS = [np.random.default_rng(n).integers(4, 302, n).tolist() for n in (1, 2, 7, 20, 33, 50)]
LIMITS = dict(max_batch_size=5, max_step_tokens=24, block_size=4)


@dataclass(frozen=True)
class Source:
    """A model and how its checkpoint is written."""

    model: ModernGPT
    style: str  # of write_nemo, or megatron

    def write(self, target: Path, tp: int = 1, pp: int = 1, **more: Any) -> Path:
        if self.style == "megatron":
            return write_megatron(target, self.model, tp=tp, pp=pp, **self.model.args, **more)
        return write_nemo(target, self.model, tp, pp, style=self.style, packed="", **self.model.settings, **more)

    def converted(self, folder: Path, tp: int, trained: tuple[int, int] = (1, 1), data_type: str = "fp32") -> Path:
        if not (folder / "source").exists():
            self.write(folder / "source", *trained)
        return convert(folder / "source", folder / "ft", tp, data_type)

    def error(self, logits: np.ndarray) -> float:
        """The largest relative distance of logits [prompts, vocab] from Hugging Face's."""
        expected = np.stack([self.model.logits(ids) for ids in PROMPTS])
        return float((np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


NEMOTRON, LLAMA, QWEN2 = ModernGPT("nemotron"), ModernGPT("llama", kv_heads=4), ModernGPT("qwen2", kv_heads=4)
AROUND_ZERO = ModernGPT("llama", kv_heads=4, around_zero=True)
SOURCES = {
    "nemotron": Source(NEMOTRON, "core"),
    "nemotron-multi-query": Source(ModernGPT("nemotron", kv_heads=1), "amp"),
    "llama": Source(LLAMA, "core"),
    "llama-interpolated": Source(ModernGPT("llama", kv_heads=2, factor=4.0, base=10000.0), "core"),
    "legacy-gate": Source(ModernGPT("llama", kv_heads=8), "legacy"),
    "legacy-gate-apart": Source(ModernGPT("llama", kv_heads=8, two_matrices=True), "legacy"),
    "megatron-nemotron": Source(NEMOTRON, "megatron"),
    "megatron-llama": Source(LLAMA, "megatron"),
    "around-zero": Source(AROUND_ZERO, "core"),
    "megatron-around-zero": Source(AROUND_ZERO, "megatron"),
    "qwen2": Source(QWEN2, "core"),
    "megatron-qwen2": Source(QWEN2, "megatron"),
    "qwen3": Source(ModernGPT("qwen3", kv_heads=4), "core"),
    "megatron-qwen3": Source(ModernGPT("qwen3", kv_heads=2), "megatron"),
    # kv_channels other than an even share of the hidden size: all heads together are wider, or narrower.
    "wide-heads": Source(ModernGPT("llama", kv_heads=2, head_dim=16, hidden_size=64), "core"),
    "wide-heads-each-with-keys": Source(ModernGPT("nemotron", kv_heads=8, head_dim=16, hidden_size=64), "legacy"),
    "megatron-narrow-heads": Source(ModernGPT("qwen2", kv_heads=2, head_dim=4, hidden_size=64), "megatron"),
}
SPLIT = ("nemotron", "llama")


@pytest.mark.parametrize("name", SOURCES)
def test_logits_and_tokens_are_hugging_faces(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    engine = make_engine(source.converted(tmp_path, 1), **LIMITS)
    save_logits(engine.executor, ParallelConfig(), PROMPTS, tmp_path / "logits.npy")
    assert source.error(np.load(tmp_path / "logits.npy")) < 1e-5
    expected = [source.model.greedy(ids, NEW_TOKENS) for ids in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # else it is too dull to tell
    assert finish(engine, [request(ids, SamplingParams(NEW_TOKENS)) for ids in PROMPTS]) == expected


SLOW = pytest.mark.slow("a second each; the grids that split most stay")
SLOW_GRID = pytest.mark.slow("2 s each; a grid or a model that has more to go wrong stays")


@pytest.mark.parametrize(
    "trained",
    [pytest.param((2, 1), marks=SLOW), (4, 1), (2, 2), pytest.param((1, 2), marks=SLOW)],
    ids=lambda grid: f"{grid[0]}x{grid[1]}",
)
@pytest.mark.parametrize("name", ["nemotron", "llama", "legacy-gate-apart", "megatron-llama", "qwen2"])
def test_files_depend_on_the_served_tp_only(name: str, trained: tuple[int, int], tmp_path: Path) -> None:
    source = SOURCES[name]
    for tp in (1, 2, 4):
        files = weight_files(source.converted(tmp_path, tp, trained))
        assert files == weight_files(source.converted(tmp_path / "whole", tp))
        expected = source.model.files(tp)
        assert {name: files[name] for name in expected} == expected


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("trained", [(1, 1), (2, 2)], ids=["1x1", "2x2"])
@pytest.mark.parametrize("name", ["qwen2", "megatron-qwen2"])
def test_biases_of_queries_keys_and_values_alone(name: str, trained: tuple[int, int], tp: int, tmp_path: Path) -> None:
    """Qwen2 has these and no others; NeMo's setting is qkv_bias, Megatron-LM's add_qkv_bias."""
    source = SOURCES[name]
    assert source.error(run_logits(source.converted(tmp_path, tp, trained), PROMPTS, tp, 1)) < 1e-5


@pytest.mark.parametrize(
    ("tp", "pp"), [(1, 1), pytest.param(2, 1, marks=SLOW_GRID), (2, 2)], ids=["tp1-pp1", "tp2-pp1", "tp2-pp2"]
)
@pytest.mark.parametrize("name", SPLIT)
def test_tokens_over_ranks(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    source = SOURCES[name]
    results = run_engine(source.converted(tmp_path, tp), greedy_items(PROMPTS, NEW_TOKENS), tp, pp)
    assert first_outputs(results) == [source.model.greedy(ids, NEW_TOKENS) for ids in PROMPTS]


@pytest.mark.parametrize("name", SPLIT)
def test_logits_at_tp_4(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    assert source.error(run_logits(source.converted(tmp_path, 4), PROMPTS, 4, 1)) < 1e-4


@pytest.mark.parametrize("trained", [(1, 1), (2, 1)], ids=["1x1", "2x1"])
@pytest.mark.parametrize(("name", "tp"), [("wide-heads", 4), ("megatron-narrow-heads", 8), ("nemotron-multi-query", 2)])
def test_each_rank_gets_a_copy_of_its_kv_head(name: str, tp: int, trained: tuple[int, int], tmp_path: Path) -> None:
    source = SOURCES[name]
    if source.model.kv_heads < trained[0]:
        pytest.skip("Megatron does not train so")
    files = weight_files(source.converted(tmp_path, tp, trained))
    expected = source.model.files(tp)
    assert {name: files[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        pytest.param("wide-heads", 2, 1, marks=SLOW_GRID),
        ("wide-heads", 4, 1),  # two ranks copy each KV head
        ("wide-heads", 1, 3),  # stages of 2, 1 and 1 layers
        pytest.param("wide-heads-each-with-keys", 2, 1, marks=SLOW_GRID),
        pytest.param("megatron-narrow-heads", 4, 1, marks=SLOW_GRID),
        ("nemotron-multi-query", 2, 1),
    ],
)
def test_sizes_that_follow_from_no_other_over_ranks(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    source = SOURCES[name]
    folder = source.converted(tmp_path, tp)
    assert source.error(run_logits(folder, PROMPTS, tp, pp)) < 1e-5
    results = run_engine(folder, greedy_items(PROMPTS, NEW_TOKENS), tp, pp)
    assert first_outputs(results) == [source.model.greedy(ids, NEW_TOKENS) for ids in PROMPTS]


def test_int8_with_copied_kv_heads(tmp_path: Path) -> None:
    source = SOURCES["wide-heads"]
    expected = run_logits(
        write_dequantized(source.converted(tmp_path, 1), tmp_path / "dequantized" / "1-gpu"), PROMPTS, 1, 1
    )
    ours = run_logits(source.converted(tmp_path, 4), PROMPTS, 4, 1, "--int8-mode", "1")
    assert (np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)).max() < 1e-5


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1)], ids=["1x1", "2x1"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_biases_that_are_no_files(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Llama has no biases, Qwen2 has those of q, k and v: the folder need not hold the others' zeros."""
    source = SOURCES[name]
    folder = source.converted(tmp_path, tp)
    has_not = {"has_dense_bias": False, "has_mlp_bias": False} | ({"has_qkv_bias": False} if name == "llama" else {})
    gone = [path for path in folder.glob("*.bias*.bin") if name == "llama" or "query_key_value" not in path.name]
    assert gone and all(not np.fromfile(path, np.float32).any() for path in gone)
    for path in gone:
        path.unlink()
    replace(ModelConfig.read(folder / "config.ini"), **has_not).write(folder / "config.ini")
    assert source.error(run_logits(folder, PROMPTS, tp, pp)) < 1e-5


def test_uneven_stages_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = SOURCES["nemotron"].converted(tmp_path, 1)
    config, limits = ModelConfig.read(folder / "config.ini"), EngineConfig(device="cpu")
    backend = pick_backend(limits, config, Path("none"), 0, 3)
    with caplog.at_level("INFO", logger="engine"):
        for rank in range(3):
            parallel = ParallelConfig(1, 3, rank)
            comm = SimpleNamespace(parallel=parallel)
            load(WeightFolder(folder, config), limits, parallel, World(), comm, backend)
    messages = [record.getMessage() for record in caplog.records if "stages" in record.getMessage()]
    assert messages == ["pp 3 does not divide 4 layers: the stages have 2, 1, 1"]


@pytest.mark.parametrize("name", SPLIT)
def test_bf16_on_a_cpu(name: str, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: logits lie within some of its steps (0.4 %) of the reference's in fp32."""
    source = SOURCES[name]
    engine = make_engine(source.converted(tmp_path, 1, data_type="bf16"), data_type="bf16", **LIMITS)
    save_logits(engine.executor, ParallelConfig(), PROMPTS, tmp_path / "logits.npy")
    assert 1e-4 < source.error(np.load(tmp_path / "logits.npy")) < 0.06


@pytest.mark.parametrize("name", SPLIT)
def test_int8_is_that_of_dequantized_files(name: str, tmp_path: Path) -> None:
    folder = SOURCES[name].converted(tmp_path, 1)
    expected = run_logits(write_dequantized(folder, tmp_path / "dequantized" / "1-gpu"), PROMPTS, 1, 1)
    ours = run_logits(SOURCES[name].converted(tmp_path, 2), PROMPTS, 2, 1, "--int8-mode", "1")
    assert (np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)).max() < 1e-5


def test_length_is_not_limited_by_positions(tmp_path: Path) -> None:
    """As with BLOOM, what max_position_embeddings says is only the default."""
    source = SOURCES["nemotron"]
    folder = source.converted(tmp_path, 1)
    assert ModelConfig.read(folder / "config.ini").max_pos_seq_len == 80
    engine = make_engine(folder, max_seq_len=100)
    assert finish(engine, [request(PROMPTS[-1], SamplingParams(40))]) == [source.model.greedy(PROMPTS[-1], 40)]


def test_rotation_by_its_definition() -> None:
    """Su et al. 2021: the complex number x_i + i·x_{i + n/2} times exp(i · position · base^(-2i/n)); the rest stays."""
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((5, 3, 10)), np.array([0, 1, 7, 500, 30000])
    config = ModelConfig(
        3, 10, 1, 9, 8, 8, max_pos_seq_len=9, rotary_embedding=6, rotary_base=123.0, rotary_interpolation_factor=2.0
    )
    angles = positions[:, None] / 2.0 * 123.0 ** (-np.arange(0, 6, 2) / 6)  # [tokens, 3]
    turned = (x[..., :3] + 1j * x[..., 3:6]) * np.exp(1j * angles)[:, None]
    expected = np.concatenate([turned.real, turned.imag, x[..., 6:]], -1)
    ours = rotate(torch.tensor(x).float(), rotary_cos_sin(torch.tensor(positions), rotary_inv_freq(config)))
    np.testing.assert_allclose(ours.numpy(), expected, atol=5e-3)  # 30000 radians in fp32
    np.testing.assert_allclose(ours.numpy()[:3], expected[:3], atol=2e-6)


def test_rotation_beside_a_table_of_positions(tmp_path: Path) -> None:
    """Megatron-LM's modules from before Megatron-core have both, unless --no-position-embedding is given."""
    source, table = SOURCES["megatron-llama"], torch.randn(80, 64, generator=torch.Generator().manual_seed(1))

    def add(content: dict[str, Any]) -> None:
        content["model"]["language_model"]["embedding"]["position_embeddings"] = {"weight": table}

    source.write(tmp_path / "source", edit=edit_content(add))
    engine = make_engine(convert(tmp_path / "source", tmp_path / "ft", 1, "fp32"), **LIMITS)
    save_logits(engine.executor, ParallelConfig(), PROMPTS, tmp_path / "logits.npy")
    hf = source.model.hf
    for ids, ours in zip(PROMPTS, np.load(tmp_path / "logits.npy"), strict=True):
        with torch.inference_mode():
            embedded = hf.model.embed_tokens(torch.tensor([ids])) + table[: len(ids)]
            expected = hf(inputs_embeds=embedded).logits[0, -1].numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_stored_frequencies_are_passed_over(tmp_path: Path) -> None:
    """NeMo's first rotary models keep them as a buffer."""

    def add(state: dict[str, Any]) -> None:
        state["model.language_model.rotary_pos_emb.inv_freq"] = torch.ones(4)

    source = SOURCES["legacy-gate"]
    plain = source.converted(tmp_path / "plain", 1)
    source.write(tmp_path / "source", edit=edit_state(add))
    folder = convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert weight_files(folder) == weight_files(plain)


def test_legacy_modules_know_no_scales_around_zero(tmp_path: Path) -> None:
    """NeMo hands layernorm_zero_centered_gamma to Megatron-core only; its own modules have layernorm1p."""
    source = SOURCES["legacy-gate"]
    plain = source.converted(tmp_path / "plain", 1)
    settings = source.model.settings | {"layernorm_zero_centered_gamma": True}
    write_nemo(tmp_path / "source", source.model, style="legacy", packed="", **settings)
    assert weight_files(convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")) == weight_files(plain)


def test_second_matrix_of_another_data_type(tmp_path: Path) -> None:
    """torch.cat of both would promote one of them without a word."""
    second = "model.language_model.encoder.layers.1.mlp.dense_h_to_4h_2.weight"
    source = SOURCES["legacy-gate-apart"]
    source.write(tmp_path / "source", edit=edit_state(lambda state: state.update({second: state[second].half()})))
    with pytest.raises(ValueError) as caught:
        convert(tmp_path / "source", tmp_path / "ft", 1, "fp32")
    assert str(caught.value) == (
        f"{tmp_path}/source/model_weights.ckpt: tensor {second} is [96, 64] in fp16, and "
        f"{second.replace('_2.', '.')} is [96, 64] in fp32"
    )


def test_base_that_yaml_takes_for_text(tmp_path: Path) -> None:
    source = SOURCES["llama"]
    settings = source.model.settings | {"rotary_base": "1e6", "rotary_percentage": "1e0"}
    write_nemo(tmp_path / "source", source.model, style="core", packed="", **settings)
    assert "rotary_base: 1e6\n" in (tmp_path / "source/model_config.yaml").read_text()
    config = ModelConfig.read(convert(tmp_path / "source", tmp_path / "ft", 1, "fp32") / "config.ini")
    assert (config.rotary_base, config.rotary_embedding) == (1e6, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"normalization_type": "rmsnorm"},
            "normalization_type is rmsnorm; FasterTransformer's GPT computes layernorm",
        ),
        (
            {"activation_type": "swiglu"},
            "activation_type is swiglu; FasterTransformer's GPT computes gelu and relu only",
        ),
        ({"activation_type": "squared_relu"}, "activation_type is squared_relu; "),
        ({"kv_head_num": 2}, "kv_head_num is 2; FasterTransformer's GPT computes 4 only"),
        ({"rotary_embedding": 16}, "rotary_embedding is 16; FasterTransformer's GPT computes 0 only"),
        ({"hidden_size": 96}, "hidden_size is 96; FasterTransformer's GPT computes 128 only"),
        ({"has_qkv_bias": False}, "has_qkv_bias is False; FasterTransformer's GPT computes True only"),
        ({"has_dense_bias": False}, "has_dense_bias is False; FasterTransformer's GPT computes True only"),
        ({"has_mlp_bias": False}, "has_mlp_bias is False; FasterTransformer's GPT computes True only"),
        ({"sliding_window": 64}, "sliding_window is 64; FasterTransformer's GPT computes 0 only"),
        ({"qk_layernorm": True}, "qk_layernorm is True; FasterTransformer's GPT computes False only"),
        ({"use_parallel_residual": True}, "use_parallel_residual is True; FasterTransformer's GPT computes False only"),
        ({"has_lm_head_bias": True}, "has_lm_head_bias is True; FasterTransformer's GPT computes False only"),
        ({"end_ids": (99, 7)}, "end_ids is 99, 7; FasterTransformer's GPT ends a text at one token only"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_fastertransformer_refuses_by_name(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    library = tmp_path / "libth_transformer.so"
    library.touch()
    config = ModelConfig(4, 32, 2, 100, 98, 99, max_pos_seq_len=64, **change)
    with pytest.raises(ValueError) as caught:
        pick_backend(EngineConfig(engine="fastertransformer"), config, library, 0)
    assert str(caught.value).startswith(sentence)
    assert pick_backend(EngineConfig(), config, library, 0).engine == "torch"


def test_fastertransformer_refuses_speculation(tmp_path: Path) -> None:
    library = tmp_path / "libth_transformer.so"
    library.touch()
    config = ModelConfig(4, 32, 2, 100, 98, 99, max_pos_seq_len=64)
    with pytest.raises(ValueError, match="^speculative is ngram; FasterTransformer's GPT computes none only$"):
        pick_backend(EngineConfig(engine="fastertransformer", speculative="ngram"), config, library, 0)
    pick_backend(EngineConfig(engine="fastertransformer"), config, library, 0)


def test_without_full_attention_layers_sequences_end_at_the_window(tmp_path: Path) -> None:
    """Older converters wrote no such key, and all layers would get the window of some."""
    path = tmp_path / "config.ini"
    ModelConfig(2, 8, 2, 64, 1, 2, max_pos_seq_len=40, has_positional_encoding=False, sliding_window=40).write(path)
    assert "full_attention_layers" not in path.read_text()
    for wished in (0, 40):
        pick_backend(EngineConfig(device="cpu", max_seq_len=wished), ModelConfig.read(path), Path("none"), 0)
    with pytest.raises(ValueError, match="max_seq_len is 41; config.ini has sliding_window 40 and no full_attention"):
        pick_backend(EngineConfig(device="cpu", max_seq_len=41), ModelConfig.read(path), Path("none"), 0)


def test_fastertransformer_refuses_uneven_stages(tmp_path: Path) -> None:
    library = tmp_path / "libth_transformer.so"
    library.touch()
    config = ModelConfig(4, 32, 4, 100, 98, 99, max_pos_seq_len=64)
    pick_backend(EngineConfig(engine="fastertransformer"), config, library, 0, 2)
    with pytest.raises(ValueError, match="pp is 3; FasterTransformer's must divide the model's 4 layers"):
        pick_backend(EngineConfig(engine="fastertransformer"), config, library, 0, 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv_head_num": 3}, "kv_head_num is 3; it must divide the 4 heads of queries"),
        ({"kv_head_num": -1}, "kv_head_num is -1; it must be at least 1"),
        ({"rotary_embedding": 7}, "rotary_embedding is 7; it must be even, and at most size_per_head 32"),
        ({"rotary_embedding": 34}, "rotary_embedding is 34; it must be even, and at most size_per_head 32"),
        ({"rotary_base": -1.0}, "rotary_base is -1.0; it must be above 0"),
        ({"rotary_interpolation_factor": float("nan")}, "rotary_interpolation_factor is nan; it must be above 0"),
        (
            {"has_post_attention_layernorm": False},
            "has_post_attention_layernorm is False; use_parallel_residual must be True",
        ),
        (
            {"use_parallel_residual": True, "layernorm_type": "post_layernorm"},
            "use_parallel_residual is True; layernorm_type must be pre_layernorm then, and "
            "apply_residual_connection_post_layernorm False",
        ),
        ({"sliding_window": -1}, "sliding_window is -1; it must be at least 0"),
        (
            {"sliding_window": 8, "full_attention_layers": (0, 9)},
            "full_attention_layers has 9; the model's 2 layers begin at 0",
        ),
        ({"rotary_attention_factor": 0.0}, "rotary_attention_factor is 0.0; it must be above 0"),
        (
            {"rotary_ramp_first": 3.0, "rotary_ramp_last": 2.0},
            "rotary_ramp_last is 2.0; it must be above rotary_ramp_first 3.0, or both 0",
        ),
        (
            {"rotary_ramp_last": 2.0, "rotary_trained_positions": 9},
            "rotary_ramp_last is 2.0; rotary_trained_positions must be 0 then, not 9",
        ),
        ({"normalization_type": "batchnorm"}, "normalization_type is 'batchnorm'; known: layernorm, rmsnorm"),
    ],
    ids=str,
)
def test_bad_config_values(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig(4, 32, 2, 100, 98, 99, max_pos_seq_len=64, **change)
    assert str(caught.value) == f"config.ini: {sentence}"
