"""Tiny random checkpoints as NeMo 2 and Megatron-Bridge write them: YAML settings beside a torch_dist checkpoint.

The YAML is written down from nemo/lightning/io/mixin.py, nemo_run/core/serialization/yaml.py and
megatron/training/config/yaml_utils.py, and from a run_config.yaml that a training log prints; the tensors are those of
tests.support.distributed_checkpoints. Nothing here imports a reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.checkpoints import make_tokenizer
from tests.support.distributed_checkpoints import write_distributed
from tests.support.nemo_checkpoints import write_bpe

NEMO_CLASSES = "nemo.collections.llm.gpt.model"
BRIDGE_CLASSES = "megatron.bridge.models"
_SILU, _GELU, _RELU2 = "torch.nn.functional.silu", "torch._C._nn.gelu", "squared_relu"


def function(name: str) -> dict[str, Any]:
    """A function in their YAML."""
    return {"_target_": name, "_call_": False}


def core_config(model: Any) -> dict[str, Any]:
    """TransformerConfig's and GPTModel's settings of a TinyGPT or a ModernGPT, with some that change no result."""
    kind = getattr(model, "kind", "gpt")
    activation = {"gpt": _GELU, "nemotron": _RELU2}.get(kind, _SILU)
    rotary = dict(position_embedding_type="learned_absolute", rotary_base=10000, rotary_percent=1.0)
    if kind != "gpt":
        rotary = dict(
            position_embedding_type="rope",
            rotary_base=model.base,
            rotary_percent=0.5 if kind == "nemotron" else 1.0,
            seq_len_interpolation_factor=None if model.factor == 1 or model.yarn else model.factor,
        )
        if model.yarn:
            rotary |= dict(
                position_embedding_type="yarn",
                yarn_rotary_scaling_factor=model.factor,
                yarn_original_max_position_embeddings=model.yarn,
                yarn_beta_fast=32.0,
                yarn_beta_slow=1.0,
                yarn_mscale=None,
                yarn_mscale_all_dim=None,
                yarn_correction_range_round_to_int=None,
            )
    return dict(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=getattr(model, "kv_heads", None),
        kv_channels=model.head_dim if getattr(model, "hidden_size", 0) else None,
        ffn_hidden_size=model.inter,
        seq_length=model.positions,
        layernorm_epsilon=model.eps,
        normalization="LayerNorm" if kind in ("gpt", "nemotron") else "RMSNorm",
        layernorm_zero_centered_gamma=kind == "nemotron" or getattr(model, "around_zero", False),
        activation_func=activation,
        gated_linear_unit=activation == _SILU,
        bias_activation_fusion=activation == _SILU or kind == "gpt" and model.gelu == "tanh",
        add_bias_linear=model.biased,
        add_qkv_bias=kind == "qwen2",
        qk_layernorm=kind == "qwen3",
        share_embeddings_and_output_weights=model.tied,
        vocab_size=model.num_tokens,
        make_vocab_size_divisible_by=16,
        tensor_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        window_size=[model.window - 1, 0] if getattr(model, "window", 0) else None,
        window_attn_skip_freq=[0, *[1] * (model.layers - 1)] if getattr(model, "window", 0) else None,
        num_moe_experts=None,
        multi_latent_attention=False,
        hidden_dropout=0.1,
        fp8=None,
        params_dtype=function("torch.bfloat16"),
        attention_backend={"_args_": [5], "_call_": True, "_target_": "megatron.core.transformer.enums.AttnBackend"},
        init_method={"_args_": [], "_partial_": True, "_target_": "torch.nn.init.normal_", "mean": 0.0, "std": 0.02},
        **rotary,
    )


def write_nemo2(
    folder: Path, model: Any, top: dict[str, Any] | None = None, config_class: str = "base.GPTConfig", **config: Any
) -> Path:
    """Write a checkpoint of NeMo 2 with a Hugging Face tokenizer; `top` are settings beside `config`."""
    what = {key: config.pop(key) for key in ("tp", "stacked", "dtype", "prefix") if key in config}
    settings = core_config(model) | {"transformer_layer_spec": function(f"{NEMO_CLASSES}.base.default_layer_spec")}
    if settings["activation_func"] == _RELU2:
        settings["activation_func"] = "nemo.collections.llm.fn.activation.squared_relu"
    settings["activation_func"] = function(settings["activation_func"])
    tokenizer = dict(
        _target_="nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
        pretrained_model_name="nemo_tokenizer",
        vocab_file=None,
        merges_file=None,
        additional_special_tokens=[],
        use_fast=True,
    )
    content = dict(
        _target_=f"{NEMO_CLASSES}.base.GPTModel",
        config={"_target_": f"{NEMO_CLASSES}.{config_class}"} | settings | config,
        optim=None,
        tokenizer=tokenizer,
        model_transform=None,
    )
    (folder / "context").mkdir(parents=True)
    (folder / "context/model.yaml").write_text(yaml.safe_dump(content | (top or {})))
    (folder / "context/io.json").write_text('{"root": {"type": "ref", "key": "trainer_context_1"}, "objects": {}}')
    make_tokenizer(folder / "context/nemo_tokenizer", model.num_tokens)
    others = {"optimizer.state.exp_avg.module.decoder.final_layernorm.weight": torch.ones(8)}
    what = dict(prefix="module.", others=others) | what
    write_distributed(folder / "weights", model, "torch_dist", **what)
    return folder


def write_bridge(
    folder: Path, model: Any, iteration: int = 500, top: dict[str, Any] | None = None, nested: bool = False, **more: Any
) -> Path:
    """Write an iteration of Megatron-Bridge and the files that name it; `nested`: the newer layout of `model`."""
    what = {key: more.pop(key) for key in ("tp", "stacked", "dtype", "prefix") if key in more}
    settings = core_config(model)
    if settings["activation_func"] == _RELU2:
        settings["activation_func"] = "megatron.core.activations.squared_relu"
    outer = ("seq_length", "share_embeddings_and_output_weights", "vocab_size", "make_vocab_size_divisible_by")
    if nested:
        settings["activation_func"] = {_SILU: "silu", _GELU: "gelu"}.get(settings["activation_func"], _RELU2)
        is_outer = {key: key in outer or key.startswith(("rotary", "position", "seq_len")) for key in settings}
        inner = {key: value for key, value in settings.items() if not is_outer[key]}
        settings = {key: value for key, value in settings.items() if is_outer[key]} | more
        settings |= {"_target_": f"{BRIDGE_CLASSES}.gpt.model_config.BridgeGPTModelConfig"}
        settings |= {"_builder_": f"{BRIDGE_CLASSES}.gpt.gpt_builder.GPTModelBuilder"}
        settings["transformer"] = {"_target_": f"{BRIDGE_CLASSES}.transformer_config.TransformerConfig"} | inner
    else:
        settings["activation_func"] = function(settings["activation_func"])
        settings["transformer_layer_spec"] = function(f"{BRIDGE_CLASSES}.gpt_provider.default_layer_spec")
        settings = {"_target_": f"{BRIDGE_CLASSES}.gpt_provider.GPTModelProvider"} | settings | more
    tokenizer = dict(
        _target_="megatron.bridge.training.tokenizers.config.TokenizerConfig",
        tokenizer_type="GPT2BPETokenizer",
        tokenizer_model=None,
    )
    content = dict(model=settings, tokenizer=tokenizer, peft=None, train={"train_iters": 10}) | (top or {})
    place = folder / f"iter_{iteration:07d}"
    place.mkdir(parents=True)
    (place / "run_config.yaml").write_text(yaml.safe_dump(content))
    (place / "tokenizer").mkdir()
    write_bpe(place / "tokenizer", model.num_tokens)
    others = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(8)}
    write_distributed(place, model, "torch_dist", others=others, **what)
    state = {"step": torch.tensor(iteration), "do_train": torch.tensor(True)}
    torch.save(state, place / "train_state.pt")
    torch.save(state, folder / "latest_train_state.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder
