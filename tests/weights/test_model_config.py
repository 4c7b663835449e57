"""ModelConfig: config.ini's keys, defaults and limits, and the sizes that ranks can share."""

from __future__ import annotations

import configparser
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weights.model_config import ModelConfig

MINIMAL = """[gpt]
head_num = 4
size_per_head = 8
num_layer = 6
vocab_size = 100
start_id = 98
end_id = 99
max_pos_seq_len = 64
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.ini"
    path.write_text(text)
    return path


def test_absent_keys_take_fastertransformers_defaults(tmp_path: Path) -> None:
    config = ModelConfig.read(write(tmp_path, MINIMAL + "infer_gpu_num = 8\n"))  # a key of FT's that is not ours
    assert config.layernorm_eps == 1e-6
    assert config.inter_size == 4 * 32
    assert (config.layernorm_type, config.activation_type) == ("pre_layernorm", "gelu")
    assert (config.has_positional_encoding, config.has_pre_decoder_layernorm) == (True, False)
    assert (config.has_post_decoder_layernorm, config.use_attention_linear_bias) == (True, False)
    assert (config.has_adapters, config.adapter_inter_size) == (False, 0)


def test_write_then_read_is_the_same(tmp_path: Path) -> None:
    config = ModelConfig(4, 8, 6, 100, 98, 99, model_name="a%b", max_pos_seq_len=64, layernorm_eps=1e-5, inter_size=96)
    config.write(tmp_path / "config.ini")
    assert ModelConfig.read(tmp_path / "config.ini") == config
    section = configparser.ConfigParser(interpolation=None)
    section.read(tmp_path / "config.ini")
    assert section["gpt"]["layernorm_eps"] == "1e-05"
    assert section["gpt"].getboolean("has_positional_encoding") is True


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no section [gpt]"),
        ("not an ini", "not an ini file"),
        (MINIMAL.replace("vocab_size = 100\n", ""), "key vocab_size is missing from [gpt]"),
        (MINIMAL.replace("= 100", "= many"), "vocab_size = 'many' is not a valid value"),
        (MINIMAL.replace("head_num = 4", "head_num = 0"), "head_num is 0; it must be at least 1"),
        (MINIMAL.replace("end_id = 99", "end_id = 100"), "end_id is 100; the vocabulary has 100 tokens"),
        (MINIMAL + "activation_type = silu\n", "activation_type is 'silu'; known: gelu, relu"),
        (MINIMAL + "weight_data_type = fp8\n", "weight_data_type is 'fp8'; known: fp32, fp16, bf16"),
    ],
)
def test_bad_config_ini_is_one_sentence_with_the_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        ModelConfig.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


CONFIG = ModelConfig(4, 8, 6, 100, 98, 99, max_pos_seq_len=64)
# What FasterTransformer's keys and the first of ours are; folders written before the others must stay as they are.
KEYS = """
head_num size_per_head num_layer vocab_size start_id end_id model_name inter_size max_pos_seq_len weight_data_type
tensor_para_size layernorm_eps layernorm_type activation_type has_positional_encoding has_pre_decoder_layernorm
has_post_decoder_layernorm use_attention_linear_bias has_adapters adapter_inter_size gelu_form
apply_residual_connection_post_layernorm normalization_type kv_head_num rotary_embedding rotary_base
rotary_interpolation_factor
""".split()


def written(config: ModelConfig, path: Path) -> dict[str, str]:
    config.write(path)
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(path)
    return dict(parser["gpt"])


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({}, {}),
        ({"hidden_size": 32, "end_ids": (99,), "has_qkv_bias": True}, {}),
        ({"hidden_size": 40}, {"hidden_size": "40"}),
        ({"end_ids": (99, 3, 1)}, {"end_ids": "99, 3, 1"}),
        ({"has_qkv_bias": False, "has_mlp_bias": False}, {"has_qkv_bias": "0", "has_mlp_bias": "0"}),
        ({"has_dense_bias": False}, {"has_dense_bias": "0"}),
    ],
    ids=str,
)
def test_new_keys_are_written_where_they_say_something(
    change: dict[str, Any], more: dict[str, str], tmp_path: Path
) -> None:
    config = replace(CONFIG, **change)
    section = written(config, tmp_path / "config.ini")
    assert list(section) == [*KEYS, *more]
    assert {key: section[key] for key in more} == more
    assert ModelConfig.read(tmp_path / "config.ini") == config


def test_a_default_models_file_is_this(tmp_path: Path) -> None:
    expected = "4 8 6 100 98 99 gpt 128 64 fp32 1 1e-06 pre_layernorm gelu 1 0 1 0 0 0 tanh 0 layernorm 4 0 10000.0 1.0"
    assert list(written(CONFIG, tmp_path / "config.ini").values()) == expected.split()


def test_sizes_that_follow_from_others() -> None:
    assert (CONFIG.hidden_size, CONFIG.attention_size, CONFIG.end_ids) == (32, 32, (99,))
    wide = ModelConfig(4, 8, 6, 100, 98, 99, max_pos_seq_len=64, hidden_size=40)
    assert (wide.hidden_size, wide.attention_size, wide.inter_size) == (40, 32, 160)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": -1}, "hidden_size is -1; it must be at least 1"),
        ({"end_ids": (99, 100)}, "end_id is 100; the vocabulary has 100 tokens"),
        ({"end_ids": (3, 99)}, "end_ids is 3, 99; it must begin with end_id, 99"),
        ({"end_ids": (99, 3, 3)}, "end_ids is 99, 3, 3; it names a token twice"),
    ],
    ids=str,
)
def test_bad_values(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(CONFIG, **change)
    assert str(caught.value) == f"config.ini: {sentence}"


def test_end_ids_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end_ids = '99, x' is not a valid value"):
        ModelConfig.read(write(tmp_path, MINIMAL + "end_ids = 99, x\n"))


def test_tp_that_does_not_divide_names_the_possible_ones() -> None:
    config = ModelConfig(6, 8, 6, 100, 98, 99, max_pos_seq_len=64)
    config.check_tp(3)
    with pytest.raises(
        ValueError, match="tp 4 does not divide this model's 6 heads and inter_size 192; .*: 1, 2, 3, 6"
    ):
        config.check_tp(4)


def test_tp_divides_the_heads_of_keys_or_is_their_multiple() -> None:
    config = ModelConfig(12, 8, 2, 100, 98, 99, max_pos_seq_len=64, kv_head_num=3)
    for tp, kv_heads_local in ((1, 3), (3, 1), (6, 1), (12, 1)):
        config.check_tp(tp)
        assert config.kv_heads_local(tp) == kv_heads_local
    with pytest.raises(ValueError) as caught:
        config.check_tp(2)
    assert str(caught.value) == (
        "tp 2 does not divide this model's 12 heads, 3 heads of keys and values and inter_size 384; "
        "possible: 1, 3, 6, 12"
    )
