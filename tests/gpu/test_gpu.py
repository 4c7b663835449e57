"""The engine on GPUs, over NCCL where there are several: fp32 tokens and bf16 logits against Hugging Face in fp32."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from convert import convert
from engine.request import SamplingParams
from tests.checkpoints import make_gpt2
from tests.launch import ROOT, mpirun
from tests.test_engine import NEW_TOKENS, SEEDED, prompts
from tests.traffic import random_items

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here")
GRIDS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    """Larger than the CPU tests' model: head size 64, 1024 wide, so that rounding has something to add up."""
    folder = tmp_path_factory.mktemp("source") / "gpt2"
    model = make_gpt2(folder, vocab_size=5003, heads=16, hidden=1024, layers=6, n_positions=512, with_tokenizer=False)
    with torch.no_grad():  # deviations of a trained model's size: 0.1 would saturate every softmax
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.4)
    model.save_pretrained(folder)
    return folder, model.cuda()


@pytest.fixture(scope="module")
def converted(source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    output_dir = tmp_path_factory.mktemp("ft_models")
    return lambda tp: convert(source[0], output_dir, tp, "fp32")


def seeded_items() -> list[dict]:
    inputs = prompts(9, vocab_size=5003, longest=120)
    return [{"prompt_ids": ids, "sampling": asdict(sampling)} for ids, sampling in zip(inputs, SEEDED, strict=False)]


@pytest.fixture(scope="module")
def seeded_on_cpu(converted: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What the seeded requests give on a CPU, each alone."""
    path = tmp_path_factory.mktemp("alone") / "one.json"
    tokens = []
    for item in seeded_items():
        path.write_text(json.dumps([item]))
        done = mpirun(1, str(ROOT / "tests/multi/engine_parity.py"), str(converted(1)), str(path))
        assert done.returncode == 0, done.stderr[-3000:]
        tokens += json.loads(done.stdout.split("RESULT", 1)[1])
    return tokens


def run_grid(tp: int, pp: int, folder: Path, items: list[dict], tmp_path: Path, *flags: str) -> str:
    if tp * pp > NUM_GPUS:
        pytest.skip(f"{tp * pp} GPUs needed, {NUM_GPUS} here")
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(items))
    script = str(ROOT / "tests/multi/engine_parity.py")
    grid = ["--device", "cuda", "--tp", str(tp), "--pp", str(pp)]
    done = mpirun(tp * pp, script, str(folder), str(path), *grid, *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def hf_greedy_cuda(model: GPT2LMHeadModel, prompt_ids: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt_ids], device="cuda"),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64, device="cuda"),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    return out[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
def test_fp32_tokens_equal_hugging_face(
    tp: int,
    pp: int,
    source: tuple[Path, GPT2LMHeadModel],
    converted: Callable[[int], Path],
    seeded_on_cpu: list[list[int]],
    tmp_path: Path,
) -> None:
    inputs = prompts(9, vocab_size=5003, longest=120)
    items = [{"prompt_ids": ids, "sampling": {"max_new_tokens": NEW_TOKENS}} for ids in inputs] + seeded_items()
    stdout = run_grid(tp, pp, converted(tp), items, tmp_path, "--data-type", "fp32")
    tokens = json.loads(next(line for line in stdout.splitlines() if line.startswith("RESULT"))[7:])
    assert tokens[:9] == [hf_greedy_cuda(source[1], ids) for ids in inputs]
    assert tokens[9:] == seeded_on_cpu


@pytest.mark.parametrize(("tp", "pp"), GRIDS, ids=[f"tp{tp}-pp{pp}" for tp, pp in GRIDS])
@pytest.mark.parametrize(("data_type", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_logits_are_near_fp32(
    tp: int,
    pp: int,
    data_type: str,
    limit: float,
    source: tuple[Path, GPT2LMHeadModel],
    converted: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    inputs = prompts(6, vocab_size=5003, longest=300)
    items = [{"prompt_ids": ids, "sampling": asdict(SamplingParams(1))} for ids in inputs]
    path = tmp_path / "logits.npy"
    run_grid(tp, pp, converted(tp), items, tmp_path, "--data-type", data_type, "--logits", str(path))
    with torch.inference_mode():
        expected = [source[1](torch.tensor([ids], device="cuda")).logits[0, -1].cpu().numpy() for ids in inputs]
    for ours, theirs in zip(np.load(path), expected, strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"tp {tp} pp {pp} {data_type}: relative norm {error:.2e}", flush=True)
        assert error < limit


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda n: str(n))
def test_random_requests_are_in_a_crowd_what_they_are_alone(
    tp: int, pp: int, gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    """Every mix of parameters, as in tests/test_isolation.py, with NCCL and with steps that are run ahead."""
    items = random_items(150, seed=2)
    folder = convert(gpt2_source[0], tmp_path / "ft_models", tp, "fp32")
    found = []
    for is_alone in (True, False):
        outputs = tmp_path / f"outputs-{is_alone}.json"
        flags = ["--data-type", "fp32", "--max-batch-size", "24", "--outputs", str(outputs)]
        run_grid(tp, pp, folder, items, tmp_path, *flags, *(["--alone"] if is_alone else []))
        found.append(json.loads(outputs.read_text()))
    texts = [
        [[(output["token_ids"], output["finish_reason"]) for output in result["outputs"]] for result in results]
        for results in found
    ]
    different = [index for index, (alone, crowd) in enumerate(zip(*texts, strict=True)) if alone != crowd]
    assert not different, [(items[index], found[0][index], found[1][index]) for index in different[:3]]


def test_hf_reference_runs_in_full_fp32() -> None:
    assert os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "1"
    assert torch.get_float32_matmul_precision() == "highest"
