"""NeMo 2's and Megatron-Bridge's folders: logits and tokens of the reference, the files that are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from convert import convert
from executor.rope import rotary_inv_freq
from readers import SourceOptions, open_reader
from readers.gpt2 import GPT2Reader
from readers.megatron_bridge import BridgeReader
from readers.shards import Trained
from tests.support.checkpoints import make_gpt2
from tests.support.core_checkpoints import write_bridge, write_nemo2
from tests.support.folders import weight_files
from tests.support.modern_checkpoints import ModernGPT
from tests.support.nemo_checkpoints import TinyGPT, write_nemo
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

NEW_TOKENS = 16
PROMPTS = [np.random.default_rng(n).integers(4, 302, n).tolist() for n in (1, 2, 7, 20, 33)]
TINY = TinyGPT()
EXACT = TinyGPT(gelu="erf", tied=False)
NO_BIASES = TinyGPT(gelu="erf", biased=False)
NEMOTRON = ModernGPT("nemotron")
LLAMA = ModernGPT("llama", kv_heads=4)
INTERPOLATED = ModernGPT("llama", kv_heads=2, factor=4.0, base=10000.0)
AROUND_ZERO = ModernGPT("llama", kv_heads=4, around_zero=True)
QWEN2 = ModernGPT("qwen2", kv_heads=4)
QWEN3 = ModernGPT("qwen3", kv_heads=4, around_zero=True)
YARN = ModernGPT("qwen2", kv_heads=4, factor=4.0, yarn=20)
WINDOWS = ModernGPT("qwen2", kv_heads=4, window=6)
WIDE_HEADS = ModernGPT("llama", kv_heads=2, head_dim=16, hidden_size=64)
SLOW = pytest.mark.slow("3 s each; the models with most to go wrong stay")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def nested(folder: Path, model: Any) -> Path:
    return write_bridge(folder, model, nested=True)


MODELS = {
    "nemo-gpt": (write_nemo2, TINY),
    "nemo-exact-gelu-untied": (write_nemo2, EXACT),
    "nemo-no-biases": (write_nemo2, NO_BIASES),
    "nemo-nemotron": (write_nemo2, NEMOTRON),
    "nemo-llama": (write_nemo2, LLAMA),
    "nemo-interpolated": (write_nemo2, INTERPOLATED),
    "nemo-around-zero": (write_nemo2, AROUND_ZERO),
    "nemo-qwen2": (write_nemo2, QWEN2),
    "nemo-qwen3": (write_nemo2, QWEN3),
    "nemo-yarn": (write_nemo2, YARN),
    "nemo-wide-heads": (write_nemo2, WIDE_HEADS),
    "bridge-gpt": (write_bridge, TINY),
    "bridge-nemotron": (write_bridge, NEMOTRON),
    "bridge-llama": (write_bridge, LLAMA),
    "bridge-qwen3": (write_bridge, QWEN3),
    "bridge-yarn": (write_bridge, YARN),
    "bridge-windows": (write_bridge, WINDOWS),
    "bridge-nested-llama": (nested, LLAMA),
    "bridge-nested-yarn": (nested, YARN),
    "bridge-nested-nemotron": (nested, NEMOTRON),
    "bridge-nested-gpt": (nested, EXACT),
}
FAST = (
    "nemo-nemotron",
    "nemo-llama",
    "nemo-qwen3",
    "bridge-gpt",
    "bridge-yarn",
    "bridge-windows",
    "bridge-nested-llama",
)


def error(logits: np.ndarray, model: Any) -> float:
    """The largest relative distance of logits [prompts, vocab] from the reference's."""
    expected = np.stack([np.asarray(model.logits(ids)) for ids in PROMPTS])
    return float((np.linalg.norm(logits - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else SLOW) for name in MODELS])
def test_logits_and_tokens_are_the_references(name: str, tp: int, tmp_path: Path) -> None:
    write, model = MODELS[name]
    folder = convert(write(tmp_path / "source", model), tmp_path / "ft", tp, "fp32")
    assert error(run_logits(folder, PROMPTS, tp, 1), model) < 1e-5
    expected = [model.greedy(ids, NEW_TOKENS) for ids in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # else it is too dull to tell
    assert first_outputs(run_engine(folder, greedy_items(PROMPTS, NEW_TOKENS), tp, 1)) == expected


# Of the run_config.yaml that a published training log of Megatron-Bridge prints, Llama 3.2 1B in October 2025.
PRINTED = """
_target_: megatron.bridge.models.llama.llama_provider.Llama31ModelProvider
activation_func: {_call_: false, _target_: torch.nn.functional.silu}
activation_func_clamp_value: null
add_bias_linear: false
add_qkv_bias: false
apply_query_key_layer_scaling: false
apply_residual_connection_post_layernorm: false
attention_backend: {_args_: [5], _call_: true, _target_: megatron.core.transformer.enums.AttnBackend}
attention_softmax_in_fp32: false
bias_activation_fusion: true
ffn_hidden_size: 8192
gated_linear_unit: true
glu_linear_offset: 0.0
heterogeneous_block_specs: false
hidden_size: 2048
high_freq_factor: 4.0
is_hybrid_model: false
kv_channels: 64
layernorm_epsilon: 1.0e-05
layernorm_zero_centered_gamma: false
low_freq_factor: 1.0
mrope_section: null
mtp_enabled: false
mtp_num_layers: null
multi_latent_attention: false
no_rope_freq: null
normalization: RMSNorm
num_attention_heads: 32
num_layers: 16
num_moe_experts: null
num_query_groups: 8
old_context_len: 8192
position_embedding_type: rope
qk_layernorm: false
restore_modelopt_state: false
rotary_base: 500000.0
rotary_interleaved: false
rotary_percent: 1.0
scale_factor: 32.0
seq_len_interpolation_factor: null
seq_length: 131072
share_embeddings_and_output_weights: true
softmax_scale: null
softmax_type: vanilla
transformer_impl: transformer_engine
transformer_layer_spec: {_call_: false, _target_: megatron.bridge.models.gpt_provider.default_layer_spec}
use_te_activation_func: false
use_transformer_engine_full_layer_spec: false
use_transformer_engine_op_fuser: null
virtual_pipeline_model_parallel_size: null
window_attn_skip_freq: null
window_size: null
"""


def test_a_printed_run_config(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump({"model": yaml.safe_load(PRINTED), "peft": None}))
    reader = open_reader(tmp_path, SourceOptions(), tmp_path)
    assert isinstance(reader, BridgeReader)
    assert reader.shape() == dict(
        head_num=32,
        kv_head_num=8,
        size_per_head=64,
        hidden_size=2048,
        inter_size=8192,
        num_layer=16,
        qk_layernorm=False,
        layernorm_eps=1e-5,
        normalization_type="rmsnorm",
        activation_type="swiglu",
        has_positional_encoding=False,
        rotary_embedding=64,
        rotary_base=500000.0,
        rotary_interpolation_factor=32.0,
        rotary_low_freq_factor=1.0,
        rotary_high_freq_factor=4.0,
        rotary_trained_positions=8192,
        max_pos_seq_len=131072,
    )
    assert reader.trained == Trained(32, 8, has_biases=False, has_qkv_bias=False, ties_head=True)


def test_an_iteration_in_hugging_faces_format(tmp_path: Path) -> None:
    """Megatron-Bridge can write its iterations so; run_config.yaml lies beside config.json."""
    make_gpt2(tmp_path)
    (tmp_path / "run_config.yaml").write_text("model: {}")
    assert isinstance(open_reader(tmp_path, SourceOptions(), tmp_path), GPT2Reader)


# --- layouts ---


@pytest.mark.parametrize(
    "layout",
    [
        dict(stacked=False),
        dict(tp=4),
        dict(tp=1, dtype=torch.bfloat16),
        dict(prefix=""),
        dict(prefix="module.language_model."),
    ],
    ids=str,
)
def test_layouts_of_tensors(layout: dict[str, Any], tmp_path: Path) -> None:
    dtype = layout.get("dtype", torch.float32)
    plain = write_nemo(tmp_path / "plain", LLAMA, style="core", packed="", dtype=dtype, **LLAMA.settings)
    expected = weight_files(convert(plain, tmp_path / "expected", 2, "auto"))
    for write, target in ((write_nemo2, "nemo"), (write_bridge, "bridge")):
        source = write(tmp_path / target, LLAMA, **layout)
        assert weight_files(convert(source, tmp_path / f"{target}-ft", 2, "auto")) == expected


@pytest.mark.parametrize(
    ("write", "settings", "factors"),
    [
        (write_nemo2, dict(config_class="llama.Llama31Config8B", scale_factor=32.0), (32.0, 1.0, 4.0, 8192)),
        (
            write_nemo2,
            dict(config_class="llama.Llama31Config", scale_factor=8)
            | dict(low_freq_factor=2.0, high_freq_factor=8.0, old_context_len=32),
            (8.0, 2.0, 8.0, 32),
        ),
        (write_bridge, dict(rope_scaling=True, rope_scaling_factor=32.0), (32.0, 1.0, 4.0, 8192)),
        (write_bridge, dict(rope_scaling=False, rope_scaling_factor=8.0), (1.0, 1.0, 4.0, 0)),
        (
            write_bridge,
            dict(_target_="megatron.bridge.models.llama.llama_provider.Llama31ModelProvider", scale_factor=32.0)
            | dict(low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192),
            (32.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_llama_3s_scaling(write: Callable[..., Path], settings: dict[str, Any], factors: Any, tmp_path: Path) -> None:
    folder = convert(write(tmp_path / "source", LLAMA, **settings), tmp_path / "ft", 1, "fp32")
    config = ModelConfig.read(folder / "config.ini")
    assert factors == (
        config.rotary_interpolation_factor,
        config.rotary_low_freq_factor,
        config.rotary_high_freq_factor,
        config.rotary_trained_positions,
    )


def test_logits_with_llama_3s_scaling(tmp_path: Path) -> None:
    """The frequencies of Hugging Face's llama3 with the same factors."""
    model = ModernGPT("llama", kv_heads=4)
    scaling = dict(rope_type="llama3", rope_theta=model.base, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = model.hf.config
    config.rope_parameters = scaling | {"original_max_position_embeddings": 32}
    scaled = transformers.LlamaForCausalLM(config).eval()
    scaled.load_state_dict(model.hf.state_dict())
    object.__setattr__(model, "hf", scaled)
    settings = dict(scale_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=32)
    source = write_nemo2(tmp_path / "source", model, config_class="llama.Llama31Config", **settings)
    logits = run_logits(convert(source, tmp_path / "ft", 1, "fp32"), PROMPTS, 1, 1)
    assert error(logits, model) < 1e-5 < 1e-3 < error(logits, LLAMA)


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        (dict(yarn_mscale=1.0, yarn_mscale_all_dim=0.0), dict(truncate=False)),
        (dict(yarn_mscale=0.7, yarn_mscale_all_dim=1.0), dict(truncate=False, mscale=0.7, mscale_all_dim=1.0)),
        (dict(yarn_correction_range_round_to_int=True, yarn_beta_fast=None, yarn_beta_slow=None), {}),
        (dict(yarn_beta_fast=16, yarn_beta_slow=2), dict(truncate=False, beta_fast=16, beta_slow=2)),
    ],
    ids=str,
)
def test_yarns_settings(settings: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    """The frequencies and the factor of Hugging Face's yarn with the same settings."""
    yarn = dict(rope_type="yarn", rope_theta=500000.0, factor=4.0, original_max_position_embeddings=8192) | rope
    hf = transformers.LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=yarn)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, "cpu")
    scaling = dict(yarn_rotary_scaling_factor=4.0, yarn_original_max_position_embeddings=8192)
    model = yaml.safe_load(PRINTED) | dict(position_embedding_type="yarn", scale_factor=None) | scaling | settings
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    reader = open_reader(tmp_path, SourceOptions(), tmp_path)
    assert isinstance(reader, BridgeReader)
    config = ModelConfig(vocab_size=320, start_id=1, end_id=2, **reader.shape())
    torch.testing.assert_close(rotary_inv_freq(config), expected, rtol=2e-6, atol=0)
    assert config.rotary_attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("size", "skip", "windows"),
    [
        ([4095, 0], None, [4096] * 16),  # tokens before the query's own, and after it
        ([0, 0], 4, [1, 1, 1, 0] * 4),
        ([127, 0], [1, 0, 1, 1] * 4, [128, 0, 128, 128] * 4),
        ([127, 0], [0] * 16, [0] * 16),
        ([-1, 0], 2, [0] * 16),
        (None, 2, [0] * 16),
    ],
    ids=str,
)
def test_windows_of_layers(size: Any, skip: Any, windows: list[int], tmp_path: Path) -> None:
    """As Megatron-core's is_layer_window_attention, which numbers layers from 1."""
    model = yaml.safe_load(PRINTED) | dict(window_size=size, window_attn_skip_freq=skip)
    (tmp_path / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    reader = open_reader(tmp_path, SourceOptions(), tmp_path)
    assert isinstance(reader, BridgeReader)
    config = ModelConfig(vocab_size=320, start_id=1, end_id=2, **reader.shape())
    assert [config.window(layer) for layer in range(16)] == windows


@pytest.mark.parametrize(
    ("activation", "settings", "form"),
    [
        ("nemo.collections.llm.fn.activation.openai_gelu", {}, "tanh"),
        ("megatron.core.activations.fast_gelu", {}, "tanh"),
        ("torch._C._nn.gelu", {"bias_activation_fusion": True}, "tanh"),
        ("torch._C._nn.gelu", {"bias_activation_fusion": False}, "erf"),
        ("torch.nn.functional.gelu", {"bias_activation_fusion": False}, "erf"),
    ],
)
def test_forms_of_gelu(activation: str, settings: dict[str, Any], form: str, tmp_path: Path) -> None:
    function = {"_target_": activation, "_call_": False}
    source = write_nemo2(tmp_path / "source", TINY, activation_func=function, **settings)
    config = ModelConfig.read(convert(source, tmp_path / "ft", 1, "fp32") / "config.ini")
    assert (config.activation_type, config.gelu_form) == ("gelu", form)


# --- iterations ---


def without_state(folder: Path) -> None:
    (folder / "latest_train_state.pt").unlink()


def with_old_tracker(folder: Path) -> None:
    """Megatron-Bridge reads its own file first."""
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


@pytest.mark.parametrize("edit", [lambda folder: None, without_state, with_old_tracker])
def test_latest_iteration(edit: Callable[[Path], None], tmp_path: Path) -> None:
    source = tmp_path / "source"
    for iteration, seed in ((100, 1), (900, 2), (1000, 0)):
        write_bridge(source, TinyGPT(seed=seed), iteration)
    edit(source)
    assert weight_files(convert(source, tmp_path / "ft", 2, "fp32")) == TINY.files(2)
    older = convert(source / "iter_0000900", tmp_path / "older", 2, "fp32")
    assert weight_files(older) == TinyGPT(seed=2).files(2)


def test_only_iteration(tmp_path: Path) -> None:
    source = write_bridge(tmp_path / "source", TINY)
    for path in source.glob("latest_*"):
        path.unlink()
    assert weight_files(convert(source, tmp_path / "ft", 2, "fp32")) == TINY.files(2)


def test_exported_folders_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    source = write_bridge(tmp_path / "source", TINY)
    (source / "iter_0000500/hf").mkdir()
    (source / "iter_0000500/hf/model.safetensors").write_text("no weights")
    folder = convert(source, tmp_path / "ft", 2, "fp32")
    assert weight_files(folder) == TINY.files(2)
    assert "hf/model.safetensors" not in "".join(path.read_text() for path in folder.glob("*.json"))
