"""OPT, BLOOM and the newer GPTs on GPUs: tokens and logits against Hugging Face's in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert import convert
from tests.support.checkpoints import make_bloom, make_opt
from tests.support.engines import hf_greedy
from tests.support.hugging_face_models import make as make_model
from tests.support.modern_checkpoints import ModernGPT
from tests.support.nemo_checkpoints import write_nemo
from tests.support.ranks import first_outputs, greedy_items, run_engine, run_logits

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here")
NEW_TOKENS = 24
PROMPTS = [np.random.default_rng(n).integers(4, 302, n).tolist() for n in (1, 2, 7, 20, 33, 50)]
SIZES = dict(heads=8, head_dim=32, inter=384, positions=128)  # heads as narrow as GPU kernels take them
VARIANTS: dict[str, Callable[[Path], Any]] = {
    "opt": lambda folder: make_opt(folder, hidden=128),
    "opt-350m": lambda folder: make_opt(folder, hidden=128, do_layer_norm_before=False, word_embed_proj_dim=24, seed=5),
    "bloom": lambda folder: make_bloom(folder, hidden=128),
    "bloom-6-heads": lambda folder: make_bloom(folder, heads=6, hidden=96),
    "nemotron": lambda folder: write_modern(folder, ModernGPT("nemotron", kv_heads=2, **SIZES)),
    "llama": lambda folder: write_modern(folder, ModernGPT("llama", kv_heads=4, **SIZES)),
    "qwen3": lambda folder: make_model(folder, "qwen3", head_dim=32),
    "qwen3-dense": lambda folder: make_model(folder, "qwen3-dense", head_dim=80),
    "minitron": lambda folder: make_model(folder, "minitron", head_dim=32),
    "yarn": lambda folder: make_model(folder, "yarn", hidden_size=256),
    "windows": lambda folder: make_model(folder, "windows-of-some-layers", hidden_size=256),
    "gpt-neox": lambda folder: make_model(folder, "gpt-neox", hidden_size=128),
    "gpt-j": lambda folder: make_model(folder, "gpt-j", hidden_size=256, rotary_dim=16),
    "phi-norms": lambda folder: make_model(folder, "phi-norms", hidden_size=256),
}


def write_modern(folder: Path, model: ModernGPT) -> Any:
    write_nemo(folder, model, style="core", packed="", **model.settings)
    return model.hf


@pytest.mark.parametrize(
    ("variant", "tp", "pp"),
    [(name, 1, 1) for name in VARIANTS]
    + [("bloom-6-heads", 2, 1), ("nemotron", 2, 1), ("llama", 1, 2)]
    + [("qwen3", 2, 1), ("phi-norms", 2, 1), ("windows", 2, 1), ("windows", 1, 2)],
)
def test_variant_is_hugging_faces(variant: str, tp: int, pp: int, tmp_path: Path) -> None:
    if tp * pp > NUM_GPUS:
        pytest.skip(f"{tp * pp} GPUs needed, {NUM_GPUS} here")
    model = VARIANTS[variant](tmp_path / "source")
    folder = convert(tmp_path / "source", tmp_path / "ft", tp, "fp32")
    with torch.inference_mode():
        expected = np.stack([model(torch.tensor([ids])).logits[0, -1].numpy() for ids in PROMPTS])
    for data_type, limit in (("fp32", 1e-4), ("bf16", 6e-2)):
        ours = run_logits(folder, PROMPTS, tp, pp, "--device", "cuda", "--data-type", data_type)
        error = (np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()
        print(f"{variant} tp {tp} pp {pp} {data_type}: relative norm {error:.2e}", flush=True)
        assert error < limit
    flags = ["--device", "cuda", "--data-type", "fp32"]
    tokens = first_outputs(run_engine(folder, greedy_items(PROMPTS, NEW_TOKENS), tp, pp, *flags))
    assert tokens == [hf_greedy(model, ids, NEW_TOKENS) for ids in PROMPTS]
