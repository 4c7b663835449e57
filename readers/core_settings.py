"""Megatron-core's TransformerConfig as NeMo 2 and Megatron-Bridge store it in YAML → a GPT's shape.

Owns the names and defaults of these settings, the list of classes that compute nothing else than the settings say, and
the refusal of each setting that changes results and is not computed. `_target_` names a class or a function of the
trainer: it is compared as text and never imported. It knows no file.

Format: NVIDIA/NeMo 2.x (nemo/collections/llm/gpt/model/base.py, llama.py, nemotron.py, mistral.py, qwen2.py, qwen3.py,
starcoder.py: classes and defaults; nemo/collections/llm/fn/activation.py; nemo/lightning/io/mixin.py: representers),
NVIDIA/NeMo-Run (nemo_run/core/serialization/yaml.py), NVIDIA-NeMo/Megatron-Bridge (models/gpt_provider.py, its yarn_…
too, models/gpt/model_config.py, models/llama/llama_provider.py of its first releases, utils/activation_map.py), and
NVIDIA/Megatron-LM (megatron/core: transformer/transformer_config.py, transformer/mlp.py, activations.py,
models/common/embeddings/rotary_pos_embedding.py and yarn_rotary_pos_embedding.py; megatron/training:
config/yaml_utils.py, models/gpt.py).
No published checkpoint was at hand; a run_config.yaml that a training log prints (Llama 3.2 1B of Megatron-Bridge) was.
"""

from __future__ import annotations

import re
import reprlib
from functools import cached_property
from typing import Any

from readers.distributed import DistributedCheckpoint
from readers.rotary import attention_factor, yarn_ramp
from readers.sharded import (
    REQUIRED,
    Settings,
    ShardedReader,
    gelu,
    layer_shape,
    rotation,
    trained_as,
    whatever_pipeline,
)
from readers.shards import Shards, Trained

_CLASSES = re.compile(
    r"nemo\.collections\.llm\.gpt\.model\."
    r"(?:base|llama|llama_nemotron|mistral|mixtral|nemotron|qwen2|qwen3|starcoder|starcoder2)\.\w+"
    r"|megatron\.bridge\.models\."
    r"(?:gpt_provider|gpt\.\w+|(?:llama|llama_nemotron|mistral|nemotron|qwen|starcoder)\.\w+_provider)\.\w+"
    r"|megatron\.training\.models\.gpt\.GPTModelConfig"
)
_LAYERS = re.compile(
    r"(?:nemo\.collections\.llm\.gpt\.model\.base|megatron\.bridge\.models\.(?:gpt_provider|gpt\.gpt_builder)"
    r"|megatron\.training\.models\.gpt)\.(?:default|transformer_engine|local)_layer_spec"
)
# Megatron-core's own, beside those of all trainers.
_REQUIRED: dict[str, tuple[Any, ...]] = {key: REQUIRED[key] for key in REQUIRED if key != "window_size"} | {
    "position_embedding_type": ("learned_absolute", "rope", "yarn"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "apply_residual_connection_post_layernorm": (False,),
    "num_moe_experts": (None,),
    "mtp_num_layers": (None, 0),
    "linear_attention_freq": (None,),
    "attention_chunk_size": (None,),
    "nope_layer_interval": (None,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "is_hybrid_model": (False,),
    "enable_mhc_connections": (False,),
    "restore_modelopt_state": (False,),
    "use_transformer_engine_full_layer_spec": (False,),
}
# An activation function's name → what it computes without and with gated_linear_unit.
_ACTIVATIONS: dict[str, tuple[str | None, str | None]] = {
    "torch._C._nn.gelu": ("gelu", None),  # the name that torch.nn.functional.gelu gives itself
    "torch.nn.functional.gelu": ("gelu", None),
    "gelu": ("gelu", None),
    "megatron.core.activations.fast_gelu": ("tanh", None),
    "nemo.collections.llm.fn.activation.openai_gelu": ("tanh", None),
    "fast_gelu": ("tanh", None),
    "gelu_pytorch_tanh": ("tanh", None),
    "megatron.core.activations.squared_relu": ("squared_relu", None),
    "nemo.collections.llm.fn.activation.squared_relu": ("squared_relu", None),
    "squared_relu": ("squared_relu", None),
    "relu2": ("squared_relu", None),
    "torch.nn.functional.silu": (None, "swiglu"),
    "silu": (None, "swiglu"),
}


class CoreReader(ShardedReader):
    """Reads a distributed checkpoint by the settings that are stored beside it. A subclass finds both."""

    weights_files: DistributedCheckpoint

    @cached_property
    def shards(self) -> Shards:
        return Shards([[self.weights_files]])

    @cached_property
    def trained(self) -> Trained:
        settings = self.settings
        return trained_as(
            settings,
            norms_around_zero=settings.require("layernorm_zero_centered_gamma", False, True),
            has_biases=settings.require("add_bias_linear", True, False),
            has_qkv_bias=settings.require("add_qkv_bias", False, True),
        )

    def shape(self) -> dict[str, Any]:
        settings = self.settings
        settings.require_all(_REQUIRED)
        layers = settings.get("transformer_layer_spec")
        if layers is not None and not _LAYERS.fullmatch(_function_name(layers)):
            raise ValueError(
                f"{settings.name}: transformer_layer_spec is {_shown(layers)}; only the GPT's own layers are supported"
            )
        hidden = settings.size("hidden_size")
        shape = layer_shape(settings, self.trained, hidden) | {
            "inter_size": settings.size("ffn_hidden_size", 4 * hidden),
            "num_layer": settings.size("num_layers"),
            "layernorm_eps": settings.fraction("layernorm_epsilon", 1e-5),
            "normalization_type": settings.get("normalization", "LayerNorm").lower(),
        }
        shape |= self._activation() | _windows(settings, shape["num_layer"])
        positions = settings.get("position_embedding_type")
        if positions in ("rope", "yarn"):
            keys = ("rotary_percent", "seq_len_interpolation_factor", "seq_length")
            shape |= rotation(settings, shape["size_per_head"], *keys)
            shape |= _llama3_scaling(settings) if positions == "rope" else _yarn(settings, shape)
        return shape

    def _activation(self) -> dict[str, str]:
        settings = self.settings
        function, is_gated = settings.get("activation_func"), settings.require("gated_linear_unit", False, True)
        computed = _ACTIVATIONS.get(_function_name(function), (None, None))[is_gated]
        if computed is None:
            raise ValueError(
                f"{settings.name}: activation_func is {_shown(function)} with gated_linear_unit {is_gated}; supported: "
                f"gelu, fast_gelu, openai_gelu and squared_relu without it, silu with it"
            )
        if computed not in ("gelu", "tanh"):
            return {"activation_type": computed}
        # Transformer Engine's own GELU is the tanh form.
        settings.require("use_te_activation_func", False)
        settings.require("use_transformer_engine_op_fuser", False)
        is_fused = settings.require("bias_activation_fusion", False, True)
        return gelu(is_fused and self.trained.has_biases, computed == "tanh")


def core_settings(values: Any, name: str) -> Settings:
    """The settings of a model; `name` is their file and the key. Raises ValueError for what is no known GPT."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {type(values).__name__}; settings are expected")
    check_class(values, name)
    inner = values.get("transformer")  # Megatron-Bridge's newer files have TransformerConfig's fields apart
    values = values | inner if isinstance(inner, dict) else values
    return whatever_pipeline(Settings(name, values))


def check_class(values: dict[str, Any], name: str) -> None:
    """Raise ValueError unless a model's class computes nothing else than its settings say."""
    target = values.get("_target_")
    if not isinstance(target, str) or not _CLASSES.fullmatch(target):
        raise ValueError(
            f"{name}: _target_ is {_shown(target)}; supported: the classes for GPT, Llama, Mistral, Nemotron, "
            f"Qwen and StarCoder of NeMo 2 and Megatron-Bridge"
        )


def _function_name(value: Any) -> str:
    """The name of a function that is stored as such; empty for a call, a partial one too."""
    if isinstance(value, dict):
        value = value.get("_target_") if value.keys() == {"_target_", "_call_"} and value["_call_"] is False else ""
    return value if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    return _function_name(value)[:100] or reprlib.repr(value)


def _windows(settings: Settings, num_layer: int) -> dict[str, Any]:
    """ModelConfig's sliding_window and full_attention_layers, where they are not its defaults.

    window_size is the tokens before a query's own and after it; window_attn_skip_freq is n for every n-th layer without
    a window, or has 1 for each layer with one and 0 for others. Megatron-core's is_layer_window_attention, and
    mcore_to_hf_window_size of models/conversion/utils.py in Megatron-Bridge.
    """
    size, skip = settings.get("window_size"), settings.get("window_attn_skip_freq")
    if size in (None, [-1, -1], [-1, 0]):
        return {}
    if not (isinstance(size, list) and len(size) == 2 and type(size[0]) is int and size[0] >= 0 and size[1] == 0):
        raise ValueError(
            f"{settings.name}: window_size is {reprlib.repr(size)}; supported: None, [-1, -1], [-1, 0], "
            f"[n, 0] with n of at least 0"
        )
    if isinstance(skip, list):
        if len(skip) != num_layer or any(one not in (0, 1) for one in skip):
            raise ValueError(
                f"{settings.name}: window_attn_skip_freq is {reprlib.repr(skip)}; 1 or 0 is expected for each of the "
                f"{num_layer} layers"
            )
        full = tuple(layer for layer, has_window in enumerate(skip) if not has_window)
    else:
        every = 0 if skip is None else settings.size("window_attn_skip_freq")
        full = tuple(range(every - 1, num_layer, every)) if every else ()
    return {"sliding_window": size[0] + 1, "full_attention_layers": full} if len(full) < num_layer else {}


def _llama3_scaling(settings: Settings) -> dict[str, Any]:
    """Llama 3's scaling of frequencies: rope_scaling of Megatron-core, scale_factor of NeMo 2 and the first Bridge."""
    # Megatron-core multiplies queries and keys by YaRN's attention factor even where the frequencies are not YaRN's.
    settings.require("yarn_rotary_scaling_factor", None, 1.0)
    if settings.require("rope_scaling", False, True):
        key, default = "rope_scaling_factor", 8.0
        low, high, length = 1.0, 4.0, 8192  # Megatron-core has no settings for these
    elif settings.get("scale_factor") is not None:
        key, default = "scale_factor", 8.0
        low, high = settings.positive("low_freq_factor", 1), settings.positive("high_freq_factor", 4)
        length = settings.size("old_context_len", 8192)
    else:
        return {}
    if settings.get("seq_len_interpolation_factor") is not None:
        raise ValueError(f"{settings.name}: both {key} and seq_len_interpolation_factor are set; one is supported")
    return {
        "rotary_interpolation_factor": settings.positive(key, default),
        "rotary_low_freq_factor": low,
        "rotary_high_freq_factor": high,
        "rotary_trained_positions": length,
    }


def _yarn(settings: Settings, shape: dict[str, Any]) -> dict[str, Any]:
    """YaRN as Megatron-core's YarnRotaryEmbedding computes it: it turns whole heads, and rounds where it is told to."""
    settings.require("rotary_percent", 1.0)
    settings.require("rope_scaling", False)
    for key in ("seq_len_interpolation_factor", "scale_factor"):
        settings.require(key, None)
    factor = settings.positive("yarn_rotary_scaling_factor", 0)
    trained = settings.size("yarn_original_max_position_embeddings")
    turns = settings.positive("yarn_beta_fast", 32), settings.positive("yarn_beta_slow", 1)
    is_rounded = settings.require("yarn_correction_range_round_to_int", False, True)
    name = f"{settings.name}: rotary_base"
    ramp = yarn_ramp(name, shape["rotary_base"], shape["rotary_embedding"], trained, turns, is_rounded)
    scales = ("yarn_mscale", "yarn_mscale_all_dim")
    attention = attention_factor(factor)
    if all(settings.get(key) is not None for key in scales):
        attention = attention_factor(factor, *(settings.positive(key, 1) if settings.get(key) else 0 for key in scales))
    return ramp | {"rotary_interpolation_factor": factor, "rotary_attention_factor": attention}
