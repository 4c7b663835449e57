"""NeMo 2's and Megatron-Bridge's folders: one sentence for each fault, and for each model that is not supported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import convert
from readers import SourceOptions
from tests.support.broken import EVIL_TRACE, Evil
from tests.support.core_checkpoints import function, write_bridge, write_nemo2
from tests.support.nemo_checkpoints import OTHER_MODELS, TinyGPT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
TINY = TinyGPT(layers=1)
CLASSES = "the classes for GPT, Llama, Mistral, Nemotron, Qwen and StarCoder of NeMo 2 and Megatron-Bridge"
AUTO = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each trainer, which the tests copy."""
    folder = tmp_path_factory.mktemp("whole")
    return {"nemo": write_nemo2(folder / "nemo", TINY), "bridge": write_bridge(folder / "bridge", TINY)}


def refused(source: Path, options: SourceOptions | None = None) -> str:
    """The sentence, with the source's path as SOURCE."""
    with pytest.raises(ValueError) as caught:
        convert.convert(source, source.parent / "ft", 1, "auto", options=options)
    return str(caught.value).replace(str(source), "SOURCE")


# --- settings ---

# A setting → its value, and what is supported.
SETTINGS: dict[str, tuple[Any, str]] = {
    **{
        key: value
        for key, value in OTHER_MODELS.items()
        if key not in ("virtual_pipeline_model_parallel_size", "window_size")
    },
    "position_embedding_type": ("mrope", "learned_absolute, rope, yarn"),
    "normalization": ("L2Norm", "LayerNorm, RMSNorm"),
    "apply_residual_connection_post_layernorm": (True, "False"),
    "num_moe_experts": (8, "None"),
    "mtp_num_layers": (1, "None, 0"),
    "linear_attention_freq": (4, "None"),
    "attention_chunk_size": (8192, "None"),
    "nope_layer_interval": (4, "None"),
    "heterogeneous_block_specs": (True, "False"),
    "heterogeneous_layers_config_encoded_json": ("{}", "None, ''"),
    "is_hybrid_model": (True, "False"),
    "enable_mhc_connections": (True, "False"),
    "restore_modelopt_state": (True, "False"),
    "use_transformer_engine_full_layer_spec": (True, "False"),
    "use_te_activation_func": (True, "False"),
    "use_transformer_engine_op_fuser": (True, "False"),
    "add_bias_linear": ("some", "True, False"),
    "share_embeddings_and_output_weights": ("once", "True, False"),
}


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("trainer", ["nemo", "bridge"])
def test_settings_that_are_not_computed(trainer: str, key: str, tmp_path: Path) -> None:
    value, supported = SETTINGS[key]
    if trainer == "nemo":
        source, name = write_nemo2(tmp_path / "m", TINY, **{key: value}), "context/model.yaml: config"
    else:
        source, name = write_bridge(tmp_path / "m", TINY, **{key: value}), "iter_0000500/run_config.yaml: model"
    assert refused(source) == f"SOURCE/{name}: {key} is {value!r}; supported: {supported}"


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "interleaved rotation": (
        dict(position_embedding_type="rope", rotary_interleaved=True),
        "rotary_interleaved is True; supported: False",
    ),
    "two scalings": (
        dict(position_embedding_type="rope", rope_scaling=True, seq_len_interpolation_factor=2.0),
        "both rope_scaling_factor and seq_len_interpolation_factor are set; one is supported",
    ),
    "two scalings of NeMo": (
        dict(position_embedding_type="rope", scale_factor=8.0, seq_len_interpolation_factor=2.0),
        "both scale_factor and seq_len_interpolation_factor are set; one is supported",
    ),
    "a factor of YaRN's alone": (
        dict(position_embedding_type="rope", yarn_rotary_scaling_factor=4.0),
        "yarn_rotary_scaling_factor is 4.0; supported: None, 1.0",
    ),
    "a window after the query": (
        dict(window_size=[8, 8]),
        "window_size is [8, 8]; supported: None, [-1, -1], [-1, 0], [n, 0] with n of at least 0",
    ),
    "layers without a window": (
        dict(window_size=[8, 0], window_attn_skip_freq=[1, 0]),
        "window_attn_skip_freq is [1, 0]; 1 or 0 is expected for each of the 1 layers",
    ),
    "no layer without a window": (
        dict(window_size=[8, 0], window_attn_skip_freq=0),
        "window_attn_skip_freq is 0; it must be a whole number of at least 1",
    ),
    "YaRN without a factor": (
        dict(position_embedding_type="yarn"),
        "yarn_rotary_scaling_factor is None; it must be a finite number above 0",
    ),
    "YaRN without positions": (
        dict(position_embedding_type="yarn", yarn_rotary_scaling_factor=4.0),
        "yarn_original_max_position_embeddings is None; it must be a whole number of at least 1",
    ),
    "YaRN for a part of a head": (
        dict(position_embedding_type="yarn", rotary_percent=0.5),
        "rotary_percent is 0.5; supported: 1.0",
    ),
    "YaRN and another scaling": (
        dict(position_embedding_type="yarn", seq_len_interpolation_factor=2.0),
        "seq_len_interpolation_factor is 2.0; supported: None",
    ),
    "YaRN with a base of 1": (
        dict(position_embedding_type="yarn", rotary_base=1, yarn_rotary_scaling_factor=4.0)
        | dict(yarn_original_max_position_embeddings=32),
        "rotary_base is 1.0; with YaRN it must be above 1",
    ),
    "no factor": (
        dict(position_embedding_type="rope", rope_scaling=True, rope_scaling_factor=-1),
        "rope_scaling_factor is -1; it must be a finite number above 0",
    ),
    "no length": (
        dict(position_embedding_type="rope", seq_length=None),
        "seq_length is None; it must be a whole number of at least 1",
    ),
    "geglu": (
        dict(gated_linear_unit=True),
        "activation_func is torch._C._nn.gelu with gated_linear_unit True; supported: gelu, fast_gelu, openai_gelu and "
        "squared_relu without it, silu with it",
    ),
    "silu": (
        dict(activation_func=function("torch.nn.functional.silu")),
        "activation_func is torch.nn.functional.silu with gated_linear_unit False; supported: gelu, fast_gelu, "
        "openai_gelu and squared_relu without it, silu with it",
    ),
    "no activation": (
        dict(activation_func=None),
        "activation_func is None with gated_linear_unit False; supported: gelu, fast_gelu, openai_gelu and "
        "squared_relu without it, silu with it",
    ),
    "a call": (
        dict(activation_func={"_target_": "torch._C._nn.gelu", "_call_": True}),
        "activation_func is {'_call_': True, '_target_': 'torch._C._nn.gelu'} with gated_linear_unit False; supported: "
        "gelu, fast_gelu, openai_gelu and squared_relu without it, silu with it",
    ),
    "other layers": (
        dict(transformer_layer_spec=function("nemo.collections.llm.gpt.model.gemma2.gemma2_layer_spec")),
        "transformer_layer_spec is nemo.collections.llm.gpt.model.gemma2.gemma2_layer_spec; only the GPT's own layers "
        "are supported",
    ),
    "partial layers": (
        dict(transformer_layer_spec={"_target_": "x", "_partial_": True}),
        "transformer_layer_spec is {'_partial_': True, '_target_': 'x'}; only the GPT's own layers are supported",
    ),
    "groups": (dict(num_query_groups=3), "num_query_groups is 3; it must divide the 4 attention heads"),
    "heads": (dict(num_attention_heads=3), "num_attention_heads 3 does not divide hidden_size 32"),
    "no heads": (
        dict(num_attention_heads=None),
        "num_attention_heads is None; it must be a whole number of at least 1",
    ),
    "epsilon": (dict(layernorm_epsilon=2), "layernorm_epsilon is 2; it must lie between 0 and 1"),
    "layers": (dict(num_layers=3), "num_layer is 3; the weight files hold 1"),
    "hidden size": (dict(hidden_size=64), "hidden size 64; wte has shape [320, 32]"),
    "class": (
        dict(_target_="nemo.collections.llm.gpt.model.gemma.GemmaConfig7B"),
        f"_target_ is nemo.collections.llm.gpt.model.gemma.GemmaConfig7B; supported: {CLASSES}",
    ),
    "no class": (dict(_target_=None), f"_target_ is None; supported: {CLASSES}"),
    "a class of another's": (dict(_target_="os.system"), f"_target_ is os.system; supported: {CLASSES}"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings(name: str, tmp_path: Path) -> None:
    settings, sentence = OTHER_SETTINGS[name]
    source = write_bridge(tmp_path / "m", TINY, **settings)
    assert refused(source) == f"SOURCE/iter_0000500/run_config.yaml: model: {sentence}"


def test_another_model_of_nemo_2(tmp_path: Path) -> None:
    source = write_nemo2(tmp_path / "m", TINY, {"_target_": "nemo.collections.llm.gpt.model.gemma.GemmaModel"})
    assert refused(source) == (
        f"SOURCE/context/model.yaml: _target_ is nemo.collections.llm.gpt.model.gemma.GemmaModel; supported: {CLASSES}"
    )


# --- files ---


def remove(name: str) -> Edit:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def write(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def save(name: str, content: Any) -> Edit:
    return lambda folder: torch.save(content, folder / name)


def tokenizer(trainer: str, **values: Any) -> Edit:
    """Other settings of the tokenizer in the YAML file."""

    def act(folder: Path) -> None:
        path = folder / ("context/model.yaml" if trainer == "nemo" else "iter_0000500/run_config.yaml")
        content = yaml.safe_load(path.read_text())
        content["tokenizer"] = values or None
        path.write_text(yaml.safe_dump(content))

    return act


def all_of(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


RUN, MODEL = "SOURCE/iter_0000500/run_config.yaml", "SOURCE/context/model.yaml"
FILES: dict[str, tuple[str, Edit, str]] = {
    "no model.yaml": (
        "nemo",
        remove("context/model.yaml"),
        "SOURCE: context/model.yaml is missing; io.json lacks the defaults of its classes",
    ),
    "no weights": ("nemo", remove("weights"), "SOURCE: weights is missing"),
    "no metadata": ("nemo", remove("weights/.metadata"), "SOURCE/weights: .metadata is missing"),
    "adapter": (
        "nemo",
        write("weights/adapter_metadata.json", "{}"),
        "SOURCE/weights/adapter_metadata.json: the weights are an adapter's; merge it into its model first",
    ),
    "list": ("nemo", write("context/model.yaml", "[]"), f"{MODEL}: settings are expected, not list"),
    "no config": (
        "nemo",
        write("context/model.yaml", "_target_: nemo.collections.llm.gpt.model.base.GPTModel"),
        f"{MODEL}: config is NoneType; settings are expected",
    ),
    "no tokenizer of NeMo's": (
        "nemo",
        all_of(tokenizer("nemo"), remove("context/nemo_tokenizer")),
        f"{MODEL}: tokenizer is not set; --tokenizer names one",
    ),
    "tokenizer's class": (
        "nemo",
        tokenizer("nemo", _target_="nemo.TiktokenTokenizer"),
        f"{MODEL}: tokenizer: _target_ is 'nemo.TiktokenTokenizer'; supported: AutoTokenizer, SentencePieceTokenizer; "
        f"--tokenizer names another",
    ),
    "tokenizer's folder": (
        "nemo",
        tokenizer("nemo", _target_=AUTO, pretrained_model_name="/gone"),
        f"{MODEL}: tokenizer: pretrained_model_name is '/gone', and there is no such file in SOURCE/context; "
        f"--tokenizer names another",
    ),
    "tokenizer outside": (
        "nemo",
        tokenizer("nemo", _target_=AUTO, pretrained_model_name="nemo_tokenizer/.."),
        f"{MODEL}: tokenizer: pretrained_model_name is 'nemo_tokenizer/..', and there is no such file in "
        f"SOURCE/context; --tokenizer names another",
    ),
    "tokenizer's name is too long": (
        "nemo",
        tokenizer("nemo", _target_=AUTO, pretrained_model_name="/" + "x" * 300),
        f"{MODEL}: tokenizer: pretrained_model_name is '/{'x' * 198}, and there is no such file in SOURCE/context; "
        f"--tokenizer names another",
    ),
    "tokenizer's name is a path": (
        "nemo",
        tokenizer("nemo", _target_=AUTO, pretrained_model_name={"attr": "/etc", "skip": True}),
        f"{MODEL}: tokenizer: pretrained_model_name is '/etc'; a name on the Hugging Face Hub is expected",
    ),
    "sentencepiece without a file": (
        "nemo",
        tokenizer("nemo", _target_="x.SentencePieceTokenizer"),
        f"{MODEL}: tokenizer: model_path is not set; --tokenizer names the file",
    ),
    "end tokens": (
        "nemo",
        all_of(
            lambda folder: (folder / "context/artifacts").mkdir(),
            write("context/artifacts/generation_config.json", '{"eos_token_id": [1, 320]}'),
        ),
        "SOURCE/context/artifacts/generation_config.json: eos_token_id is [1, 320]; it must be one of the 320 token "
        "ids",
    ),
    "no run_config.yaml": (
        "bridge",
        remove("iter_0000500/run_config.yaml"),
        "SOURCE/iter_0000500: run_config.yaml is missing",
    ),
    "peft": (
        "bridge",
        write("iter_0000500/run_config.yaml", "peft: {dim: 8}"),
        f"{RUN}: peft is set: the weights are an adapter's; merge it into its model first",
    ),
    "no model": (
        "bridge",
        write("iter_0000500/run_config.yaml", "a: 1"),
        f"{RUN}: model is NoneType; settings are expected",
    ),
    "yaml with code": (
        "bridge",
        write("iter_0000500/run_config.yaml", "model: !!python/object/apply:os.system [true]"),
        f"{RUN}: not a YAML file (could not determine a constructor for the tag "
        f"'tag:yaml.org,2002:python/object/apply:os.system' in \"<byte string>\", line 1, column 8: model: "
        f"!!python/object/apply:os.system ... ^)",
    ),
    "no tokenizer of the Bridge's": (
        "bridge",
        all_of(remove("iter_0000500/tokenizer"), tokenizer("bridge", tokenizer_type="NullTokenizer")),
        "SOURCE/iter_0000500: no tokenizer folder with vocab.json and merges.txt, tokenizer.model or tokenizer.json, "
        "and tokenizer_type is 'NullTokenizer'; --tokenizer names one",
    ),
    "no such iteration": (
        "bridge",
        save("latest_train_state.pt", {"step": torch.tensor(7)}),
        "SOURCE/latest_train_state.pt: names iter_0000007, and there is no such folder",
    ),
    "no step": (
        "bridge",
        save("latest_train_state.pt", {"step": "7"}),
        "SOURCE/latest_train_state.pt: step is str; a whole number in a tensor is expected",
    ),
    "sparse step": (
        "bridge",
        save("latest_train_state.pt", {"step": torch.ones(1, dtype=torch.int64).to_sparse()}),
        "SOURCE/latest_train_state.pt: step is no plain tensor: sparse_coo on cpu",
    ),
    "hostile state": (
        "bridge",
        save("latest_train_state.pt", {"step": Evil()}),
        "SOURCE/latest_train_state.pt: refused, because its pickle asks for posix.system; a checkpoint may hold "
        "tensors and plain values only",
    ),
    "iterations without a tracker": (
        "bridge",
        lambda folder: [os.mkdir(folder / "iter_0000900"), *(path.unlink() for path in folder.glob("latest_*"))],
        "SOURCE: 2 iterations and no latest_checkpointed_iteration.txt; give the folder of one",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    trainer, edit, sentence = FILES[name]
    source = tmp_path / "m"
    shutil.copytree(whole[trainer], source)
    edit(source)
    assert refused(source) == sentence
    assert not EVIL_TRACE.exists()


@pytest.mark.parametrize("trainer", ["nemo", "bridge"])
def test_heads_are_in_the_settings(trainer: str, whole: dict[str, Path]) -> None:
    assert refused(whole[trainer], SourceOptions(num_heads=4)) == (
        "SOURCE: --num-heads is for Megatron-LM's checkpoints without arguments only"
    )
