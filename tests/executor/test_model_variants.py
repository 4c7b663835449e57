"""GPT-2, OPT and BLOOM in all their variants: the engine's logits and greedy text against Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from convert import convert
from engine.config import EngineConfig, ParallelConfig
from engine.request import SamplingParams
from executor.startup import pick_backend
from tests.support.checkpoints import make_bloom, make_gpt2, make_opt
from tests.support.engines import finish, hf_greedy, make_engine, request, save_logits
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits
from weights.model_config import ModelConfig

NEW_TOKENS = 24
LENGTHS = (1, 2, 7, 20, 33, 50)
PROMPTS = [np.random.default_rng(n).integers(4, 302, n).tolist() for n in LENGTHS]
LIMITS = dict(max_batch_size=5, max_step_tokens=24, block_size=4)

GPT2: Callable[..., transformers.PreTrainedModel] = partial(
    make_gpt2, vocab_size=303, n_positions=128, with_tokenizer=False
)
OPT_350M: dict[str, Any] = dict(do_layer_norm_before=False, word_embed_proj_dim=24, seed=5)
VARIANTS: dict[str, Callable[[Path], transformers.PreTrainedModel]] = {
    "gpt2-gelu": partial(GPT2, activation_function="gelu"),
    "gpt2-relu-inner-untied": partial(GPT2, activation_function="relu", n_inner=88, tied=False),
    "opt": make_opt,
    "opt-350m": partial(make_opt, **OPT_350M),
    "opt-350m-untied-gelu": partial(make_opt, tied=False, activation_function="gelu", **OPT_350M),
    "opt-no-bias": partial(make_opt, enable_bias=False),
    "opt-not-affine": partial(make_opt, layer_norm_elementwise_affine=False),
    "opt-no-final-layernorm": partial(make_opt, _remove_final_layer_norm=True),
    "bloom": make_bloom,
    "bloom-6-heads": partial(make_bloom, heads=6, hidden=48),
    "bloom-post-layernorm-residual": partial(make_bloom, apply_residual_connection_post_layernorm=True),
}
# The variant of each family that has most to go wrong when it is split.
SPLIT = {"gpt2": "gpt2-relu-inner-untied", "opt": "opt-350m", "bloom": "bloom-6-heads"}


class Source:
    """A variant's checkpoint, with what Hugging Face makes of the prompts."""

    def __init__(self, variant: str, folder: Path) -> None:
        self.folder = folder
        self.model = VARIANTS[variant](folder / "hf")
        self.tokens = [hf_greedy(self.model, ids, NEW_TOKENS) for ids in PROMPTS]
        with torch.inference_mode():
            self.logits = np.stack([self.model(torch.tensor([ids])).logits[0, -1].numpy() for ids in PROMPTS])
        assert len({tuple(tokens) for tokens in self.tokens}) == len(PROMPTS)  # else it is too dull to tell

    def converted(self, tp: int) -> Path:
        return convert(self.folder / "hf", self.folder / "ft", tp, "fp32")

    def error(self, path: Path) -> float:
        """The largest relative distance of saved logits from Hugging Face's."""
        distances = np.linalg.norm(np.load(path) - self.logits, axis=1)
        return float((distances / np.linalg.norm(self.logits, axis=1)).max())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    made: dict[str, Source] = {}

    def make(variant: str) -> Source:
        if variant not in made:
            made[variant] = Source(variant, tmp_path_factory.mktemp(variant))
        return made[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_hugging_faces(source: Callable[[str], Source], variant: str, tmp_path: Path) -> None:
    expected = source(variant)
    engine = make_engine(expected.converted(1), **LIMITS)
    save_logits(engine.executor, ParallelConfig(), PROMPTS, tmp_path / "logits.npy")
    print(variant, "logit error", expected.error(tmp_path / "logits.npy"))
    assert expected.error(tmp_path / "logits.npy") < 1e-5
    requests = [request(ids, SamplingParams(NEW_TOKENS)) for ids in PROMPTS]
    assert finish(engine, requests) == expected.tokens


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["gpt2-gelu", "opt-350m", "bloom-6-heads"])
def test_half_precision_on_disk_and_bf16_on_a_cpu(variant: str, stored: torch.dtype, tmp_path: Path) -> None:
    """bf16 keeps 8 bits: logits lie within a few of its steps (0.4 %) of those that the same weights give in fp32."""
    model = VARIANTS[variant](tmp_path / "hf", dtype=stored)
    engine = make_engine(convert(tmp_path / "hf", tmp_path / "ft", 1, "auto"), data_type="bf16", **LIMITS)
    save_logits(engine.executor, ParallelConfig(), PROMPTS, tmp_path / "logits.npy")
    model.float()
    with torch.inference_mode():
        exact = np.stack([model(torch.tensor([ids])).logits[0, -1].numpy() for ids in PROMPTS])
    distances = np.linalg.norm(np.load(tmp_path / "logits.npy") - exact, axis=1) / np.linalg.norm(exact, axis=1)
    print(variant, stored, "logit error", distances.max())
    assert distances.max() < 0.03


@pytest.mark.parametrize(
    ("tp", "pp"),
    [pytest.param(2, 1, marks=pytest.mark.slow("2 s each; the larger grid stays")), (2, 2)],
    ids=["tp2-pp1", "tp2-pp2"],
)
@pytest.mark.parametrize("family", SPLIT)
def test_tokens_over_ranks(source: Callable[[str], Source], family: str, tp: int, pp: int) -> None:
    expected = source(SPLIT[family])
    results = run_engine(expected.converted(tp), greedy_items(PROMPTS, NEW_TOKENS), tp, pp)
    assert first_outputs(results) == expected.tokens


@pytest.mark.parametrize("variant", ["gpt2-gelu", "opt", "bloom-post-layernorm-residual"])
def test_logits_at_tp_4(source: Callable[[str], Source], variant: str, tmp_path: Path) -> None:
    expected = source(variant)
    np.save(tmp_path / "logits.npy", run_logits(expected.converted(4), PROMPTS, 4, 1))
    print(variant, "logit error", expected.error(tmp_path / "logits.npy"))
    assert expected.error(tmp_path / "logits.npy") < 1e-5


def test_without_positions_memory_alone_limits_the_length(tmp_path: Path) -> None:
    model = make_bloom(tmp_path / "hf", layers=2, seq_length=32)
    folder = convert(tmp_path / "hf", tmp_path / "ft", 1, "fp32")
    assert make_engine(folder, **LIMITS).executor.max_seq_len == 32
    engine = make_engine(folder, max_seq_len=90, **LIMITS)
    assert finish(engine, [request(PROMPTS[-1], SamplingParams(40))]) == [hf_greedy(model, PROMPTS[-1], 40)]
    with pytest.raises(ValueError, match="max_new_tokens is 41; .* that is 91, .* is 90 tokens"):
        engine.submit(request(PROMPTS[-1], SamplingParams(41)))


# --- which engine runs it ---

SMALL = ModelConfig(4, 64, 2, 100, 98, 99, max_pos_seq_len=64, layernorm_eps=1e-5)
BLOOM_LIKE = replace(
    SMALL, has_positional_encoding=False, use_attention_linear_bias=True, has_pre_decoder_layernorm=True
)
NORMED_RESIDUAL = replace(BLOOM_LIKE, apply_residual_connection_post_layernorm=True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SMALL, "fastertransformer"),
        (BLOOM_LIKE, "fastertransformer"),
        (replace(SMALL, layernorm_type="post_layernorm", has_post_decoder_layernorm=False), "fastertransformer"),
        (
            NORMED_RESIDUAL,
            "apply_residual_connection_post_layernorm is True; FasterTransformer computes False only",
        ),
    ],
)
def test_auto_takes_what_can_run_the_model(
    config: ModelConfig, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (tmp_path / "lib.so").touch()
    backend = pick_backend(EngineConfig(), config, tmp_path / "lib.so", 0)
    assert backend.dtype == torch.bfloat16
    assert expected in (backend.engine, backend.reason)
    assert (backend.engine == "torch") == (expected == backend.reason)


def test_auto_is_fp16_on_gpus_without_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_backend(EngineConfig(), SMALL, tmp_path / "none", 0).dtype == torch.float16


@pytest.mark.parametrize(
    ("engine", "config", "sentence"),
    [
        (
            "fastertransformer",
            NORMED_RESIDUAL,
            "apply_residual_connection_post_layernorm is True; FasterTransformer computes False only",
        ),
        (
            "fastertransformer",
            replace(SMALL, has_adapters=True),
            "has_adapters is True; the fastertransformer engine loads no adapters",
        ),
        ("torch", replace(SMALL, has_adapters=True), "has_adapters is True; the torch engine computes False only"),
    ],
)
def test_engine_that_cannot_is_refused(engine: str, config: ModelConfig, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "lib.so").touch()
    with pytest.raises(ValueError) as caught:
        pick_backend(EngineConfig(engine=engine, device="cpu"), config, tmp_path / "lib.so", 0)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("activation", "warns"), [("gelu", True), ("relu", False)])
def test_fastertransformers_other_gelu_is_logged(
    activation: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lib.so").touch()
    config = replace(SMALL, activation_type=activation, gelu_form="erf")
    pick_backend(EngineConfig(engine="fastertransformer", device="cpu"), config, tmp_path / "lib.so", 0)
    assert ("gelu_form is erf, and FasterTransformer computes the tanh form" in caplog.text) == warns


def test_length_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seq_len is 65; the model has 64 positions"):
        pick_backend(EngineConfig(device="cpu", max_seq_len=65), SMALL, Path("none"), 0)
    pick_backend(EngineConfig(device="cpu", max_seq_len=65_000), BLOOM_LIKE, Path("none"), 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(gelu_form="fast"), "gelu_form is 'fast'; known: tanh, erf"),
        (
            dict(apply_residual_connection_post_layernorm=True, layernorm_type="post_layernorm"),
            "apply_residual_connection_post_layernorm is True; layernorm_type must be pre_layernorm then, "
            "not post_layernorm",
        ),
    ],
)
def test_keys_that_contradict(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(SMALL, **changes)
    assert str(caught.value) == f"config.ini: {sentence}"
