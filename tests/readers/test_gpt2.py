"""The GPT-2 reader: FasterTransformer's bytes, config.ini, the tests' own tokenizer; what all readers share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import convert
from readers.casting import cast as cast_tensor
from readers.casting import computed_ahead
from tests.support.broken import edit_config
from tests.support.checkpoints import make_gpt2, make_tokenizer, save, write_weights
from tests.support.folders import cast, config_ini, weight_files
from weights.model_config import ModelConfig
from weights.reader import ShardReader
from weights.table import weight_specs

TINY: dict[str, Any] = dict(vocab_size=37, layers=2, heads=4, hidden=16, n_positions=8, with_tokenizer=False)


def expected_files(model: transformers.PreTrainedModel, tp: int, data_type: str) -> dict[str, bytes]:
    """FasterTransformer's files for a GPT-2, written down independently of weights.table."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    state = {name.removeprefix("transformer."): cast(array, data_type) for name, array in state.items()}
    files = {
        "model.wte.bin": state["wte.weight"],
        "model.wpe.bin": state["wpe.weight"],
        "model.final_layernorm.weight.bin": state["ln_f.weight"],
        "model.final_layernorm.bias.bin": state["ln_f.bias"],
    }
    if not model.config.tie_word_embeddings:
        files["model.lm_head.weight.bin"] = state["lm_head.weight"]
    for layer in range(model.config.n_layer):
        source, target = f"h.{layer}.", f"model.layers.{layer}."
        for theirs, ours in (
            ("ln_1.weight", "input_layernorm.weight"),
            ("ln_1.bias", "input_layernorm.bias"),
            ("ln_2.weight", "post_attention_layernorm.weight"),
            ("ln_2.bias", "post_attention_layernorm.bias"),
            ("attn.c_proj.bias", "attention.dense.bias"),
            ("mlp.c_proj.bias", "mlp.dense_4h_to_h.bias"),
        ):
            files[f"{target}{ours}.bin"] = state[source + theirs]
        weight, bias = state[source + "attn.c_attn.weight"], state[source + "attn.c_attn.bias"]
        q, k, v = np.split(weight, 3, axis=1)
        q_bias, k_bias, v_bias = np.split(bias, 3)
        for rank in range(tp):

            def mine(array: np.ndarray, axis: int, rank: int = rank) -> np.ndarray:
                return np.split(array, tp, axis=axis)[rank]

            part = {
                "attention.query_key_value.weight": np.stack([mine(q, 1), mine(k, 1), mine(v, 1)], axis=1),
                "attention.query_key_value.bias": np.stack([mine(q_bias, 0), mine(k_bias, 0), mine(v_bias, 0)]),
                "attention.dense.weight": mine(state[source + "attn.c_proj.weight"], 0),
                "mlp.dense_h_to_4h.weight": mine(state[source + "mlp.c_fc.weight"], 1),
                "mlp.dense_h_to_4h.bias": mine(state[source + "mlp.c_fc.bias"], 0),
                "mlp.dense_4h_to_h.weight": mine(state[source + "mlp.c_proj.weight"], 0),
            }
            files |= {f"{target}{name}.{rank}.bin": array for name, array in part.items()}
    return {name: array.tobytes() for name, array in files.items()}


# --- bytes ---


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("format", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_files_are_those_of_fastertransformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, shards: int, tp: int, data_type: str
) -> None:
    monkeypatch.setattr(convert, "_CHUNK_BYTES", 1000)  # so that matrices are written in many pieces
    model = make_gpt2(tmp_path / "hf", format=format, shards=shards, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", tp, data_type)
    assert folder == tmp_path / "out" / f"{tp}-gpu"
    assert weight_files(folder) == expected_files(model, tp, data_type)


def test_writing_may_be_started_where_it_cannot_be(tmp_path: Path) -> None:
    """It only hastens what fsync does: bytes stay as they are, and a refusal (of a pipe here) does no harm."""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 99)
        file.flush()
        convert._start_writing(file.fileno())
    assert path.read_bytes() == bytes(range(256)) * 99
    reading, writing = os.pipe()
    convert._start_writing(writing)
    os.close(reading), os.close(writing)


def test_shard_reader_reads_what_was_written(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", tied=False, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")
    config = ModelConfig.read(folder / "config.ini")
    readers = [ShardReader(folder, config, rank, torch.float32) for rank in range(2)]
    for spec in weight_specs(config):
        assert all(reader.read(spec).shape == spec.shard_shape(2) for reader in readers)
    assert torch.equal(readers[1].read(weight_specs(config)[-1]), model.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_head_is_written_where_it_is_not_the_embedding(tmp_path: Path, format: str, tied: bool) -> None:
    model = make_gpt2(tmp_path / "hf", format=format, tied=tied, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    assert (folder / "model.lm_head.weight.bin").exists() is not tied
    assert weight_files(folder) == expected_files(model, 1, "fp32")


def test_head_equal_to_the_embedding_is_not_written_twice(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", tied=False, **TINY)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    save(model, tmp_path / "hf")
    assert not (convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32") / "model.lm_head.weight.bin").exists()


def test_head_trained_apart_is_kept_though_the_config_says_tied(tmp_path: Path) -> None:
    """transformers 5 goes by what is stored; dropping the head would give other logits than `generate`."""
    model = make_gpt2(tmp_path / "hf", **TINY)
    head = torch.full((37, 16), 0.25)
    write_weights(tmp_path / "hf", dict(model.state_dict()) | {"lm_head.weight": head}, "safetensors")
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32")
    assert (folder / "model.lm_head.weight.bin").read_bytes() == head.numpy().tobytes()


def test_tied_checkpoint_may_store_the_head_only(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", **TINY)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("wte.weight")}
    write_weights(tmp_path / "hf", tensors, "safetensors")
    assert weight_files(convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")) == expected_files(
        model, 2, "fp32"
    )


def test_headless_checkpoint_with_old_mask_buffers(tmp_path: Path) -> None:
    """openai-community/gpt2 itself: no `transformer.`, and each layer's causal mask stored as attn.bias."""
    model = make_gpt2(tmp_path / "hf", **TINY)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write_weights(tmp_path / "hf", tensors, "safetensors")
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp16")
    assert weight_files(folder) == expected_files(model, 2, "fp16")


def test_bin_from_before_pytorch_1_6(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "hf", format="bin", **TINY)
    torch.save(model.state_dict(), tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=False)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "fp32")
    assert weight_files(folder) == expected_files(model, 2, "fp32")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float64, "fp32")],
)
def test_auto_is_the_stored_data_type(tmp_path: Path, stored: torch.dtype, expected: str) -> None:
    model = make_gpt2(tmp_path / "hf", dtype=stored, **TINY)
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 2, "auto")
    assert config_ini(folder)["weight_data_type"] == expected
    assert weight_files(folder) == expected_files(model, 2, expected)


def test_float64_is_rounded_by_way_of_float32(tmp_path: Path) -> None:
    """FasterTransformer's converters load in float32: 1 + 2^-11 + 2^-40 becomes 1 in fp16, not 1 + 2^-10."""
    model = make_gpt2(tmp_path / "hf", dtype=torch.float64, **TINY)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1 + 2**-11 + 2**-40)
    save(model, tmp_path / "hf")
    folder = convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp16")
    values = np.fromfile(folder / "model.final_layernorm.weight.bin", np.float16)
    assert values.tolist() == [1.0] * 16


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 90), (3, 50, 70), (64, 1), (1, 64), (7,)])
def test_transposed_views_are_cast_as_they_read(
    shape: tuple[int, ...], wanted: torch.dtype, stored: torch.dtype
) -> None:
    """They are copied as they are stored, [out, in] or [3, out, in], and slices of them have gaps between the rows."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(stored).movedim(-1, 0)
    for view in (whole, whole[1:-1], whole[..., 1:-1]):
        if view.numel():
            expected = view.float().to(wanted).flatten()
            assert torch.equal(cast_tensor(view, wanted, "here").flatten(), expected)


def test_results_computed_ahead_come_in_order_and_threads_are_as_before() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        assert torch.get_num_threads() == 1
        if number == 50:
            raise ValueError("fifty")
        return number

    num_threads, seen = torch.get_num_threads(), []
    with pytest.raises(ValueError, match="fifty"), computed_ahead(work, range(100)) as results:
        for number in results:
            seen.append(number)
    assert seen == list(range(50))
    assert torch.get_num_threads() == num_threads
    with computed_ahead(work, range(40)) as results:
        assert list(results) == list(range(40))


# --- config.ini, manifest, tokenizer ---


def test_config_ini(tmp_path: Path) -> None:
    settings = dict(n_inner=24, activation_function="relu", layer_norm_epsilon=1e-3)
    make_gpt2(tmp_path / "hf", **TINY, **settings)
    convert.convert(tmp_path / "hf", tmp_path / "out", 4, "bf16", convert.Names("parrot"))
    config = config_ini(tmp_path / "out/4-gpu")
    expected = dict(model_name="parrot", head_num="4", size_per_head="4", inter_size="24", num_layer="2")
    expected |= dict(max_pos_seq_len="8", vocab_size="37", start_id="36", end_id="36", weight_data_type="bf16")
    expected |= dict(tensor_para_size="4", layernorm_eps="0.001", activation_type="relu")
    assert {key: config[key] for key in expected} == expected


def test_config_ini_takes_gpt2_defaults(tmp_path: Path) -> None:
    """FasterTransformer's converter forgets layernorm_eps, whose default there (1e-6) is not GPT-2's."""
    make_gpt2(tmp_path / "hf", **TINY)
    edit_config(tmp_path / "hf", layer_norm_epsilon=..., n_inner=..., activation_function=..., bos_token_id=None)
    config = config_ini(convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32"))
    names = ("layernorm_eps", "inter_size", "activation_type", "start_id", "model_name")
    assert [config[name] for name in names] == ["1e-05", "64", "gelu", "36", "hf"]


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_tanh_gelus_are_fastertransformers_gelu(tmp_path: Path, activation: str) -> None:
    make_gpt2(tmp_path / "hf", activation_function=activation, **TINY)
    assert config_ini(convert.convert(tmp_path / "hf", tmp_path / "out", 1, "fp32"))["activation_type"] == "gelu"


@pytest.mark.parametrize("vocab_size", [257, 303, 1000])
def test_tokenizer_of_the_tests_knows_every_byte(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = make_tokenizer(tmp_path, vocab_size)
    text = bytes(range(128)).decode() + "é€\U0001f600 Thank you"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == len(tokenizer.get_vocab()) == vocab_size
    assert tokenizer.eos_token_id == vocab_size - 1
