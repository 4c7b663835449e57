"""ModelConfig, ParallelConfig, EngineConfig: files, defaults, limits."""

from __future__ import annotations

import argparse
import configparser
from pathlib import Path

import pytest

from engine.config import EngineConfig, ParallelConfig
from engine.flags import add_flags, from_flags
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


def test_rank_grid_is_fastertransformers() -> None:
    places = [(p.tp_rank, p.pp_rank) for p in (ParallelConfig(2, 3, rank) for rank in range(6))]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert list(ParallelConfig(2, 3, 3).layers(6)) == [2, 3]
    assert (ParallelConfig(2, 3, 1).is_first_stage, ParallelConfig(2, 3, 4).is_last_stage) == (True, True)


def test_sizes_that_do_not_divide_name_the_possible_ones() -> None:
    config = ModelConfig(6, 8, 6, 100, 98, 99, max_pos_seq_len=64)
    config.check_tp(3)
    with pytest.raises(
        ValueError, match="tp 4 does not divide this model's 6 heads and inter_size 192; .*: 1, 2, 3, 6"
    ):
        config.check_tp(4)
    with pytest.raises(ValueError, match="pp 4 does not divide this model's 6 layers; possible: 1, 2, 3, 6"):
        ParallelConfig(1, 4, 0).layers(6)


def test_flags_come_from_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, "engine")
    config = from_flags(EngineConfig, parser.parse_args(["--max-batch-size", "7", "--data-type", "bf16"]))
    assert config == EngineConfig(max_batch_size=7, data_type="bf16")
    with pytest.raises(ValueError, match="max_batch_size is 0; it must be at least 1"):
        from_flags(EngineConfig, parser.parse_args(["--max-batch-size", "0"]))
