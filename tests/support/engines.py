"""Engines in this process on a tiny model, requests for them, and Hugging Face's answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine import startup
from engine.config import EngineConfig, ParallelConfig
from engine.engine import Engine
from engine.plan import Chunk, NewSequences, Plan
from engine.request import Request, SamplingParams
from engine.watchdog import Watchdog
from engine.world import World
from executor.runner import TorchExecutor
from executor.startup import WeightFolder, connect, load, pick_backend
from tests.support.ranks import ROOT

if TYPE_CHECKING:  # importing it takes seconds, which ranks under mpirun save
    from transformers import GPT2LMHeadModel

NEW_TOKENS = 64


def prompts(count: int, vocab_size: int = 303, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size - 1, rng.integers(1, longest)).tolist() for _ in range(count)]


def hf_greedy(model: GPT2LMHeadModel, prompt_ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """Hugging Face's greedy continuation, up to and with the end token."""
    ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(ids)  # without one, generate takes token 0 of a prompt for padding
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return out[0, len(prompt_ids) :].tolist()


def demo_greedy(prompt: str, new_tokens: int) -> str:
    """Hugging Face's greedy continuation of a text by the model in models/."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/stories")
    model = GPT2LMHeadModel.from_pretrained(ROOT / "models/stories", dtype=torch.float32)
    return tokenizer.decode(hf_greedy(model, tokenizer.encode(prompt), new_tokens))


def make_engine(folder: Path, *, num_blocks: int = 0, **limits: object) -> Engine:
    """num_blocks: of the key-value cache; 0: as many as there is memory for."""
    world = World()
    weights = WeightFolder.read(folder)
    settings = EngineConfig(**{"device": "cpu", **limits})
    backend = pick_backend(settings, weights.config, Path("none"), 0)
    parallel = ParallelConfig()
    executor = load(weights, settings, parallel, world, connect(world, parallel, backend), backend)
    executor.prepare()
    executor.num_blocks = num_blocks or executor.num_blocks
    return startup.make_engine(executor, weights.config, settings, world, Watchdog())


def request(prompt_ids: list[int], sampling: SamplingParams) -> Request:
    return Request(prompt_ids, sampling, (302,))


def finish(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for r in requests:
        engine.submit(r)
    for _ in range(100_000):
        if not engine.step():
            break
    return [r.output_ids for r in requests]


SEEDED = [
    SamplingParams(32, temperature=0.8, top_k=20, random_seed=1),
    SamplingParams(32, top_p=0.9, random_seed=2),
    SamplingParams(32, temperature=1.3, top_p=1.0, random_seed=2**64 - 1),
]


def hf_beams(
    model: GPT2LMHeadModel, prompt_ids: list[int], sampling: SamplingParams, end_id: int
) -> list[tuple[list[int], float]]:
    """Each beam's new tokens, up to and with the end token, and its score with length penalty, best first."""
    early = {"false": False, "true": True, "never": "never"}[sampling.early_stopping]
    out = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),  # else it is guessed from pad_token_id
        num_beams=sampling.beam_width,
        num_return_sequences=sampling.beam_width,
        length_penalty=1.0 if sampling.len_penalty is None else sampling.len_penalty,
        early_stopping=early,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_length or None,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for row, score in zip(out.sequences[:, len(prompt_ids) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = row.index(end_id) + 1 if end_id in row else len(row)
        beams.append((row[:end], score))
    return beams


def save_logits(executor: TorchExecutor, parallel: ParallelConfig, prompts: list[list[int]], path: Path) -> None:
    """The last stage's first rank writes `step_logits` as [prompts, vocab] fp32."""
    rows = step_logits(executor, prompts)
    if parallel.is_last_stage and parallel.tp_rank == 0:
        np.save(path, np.stack(rows))


def step_logits(executor: TorchExecutor, prompts: list[list[int]]) -> list[np.ndarray]:
    """The next token's logits [vocab] of each prompt, one prompt a step, in two pieces; empty before the last stage."""
    rows = []
    for prompt_ids in prompts:
        blocks = list(range(-(-len(prompt_ids) // executor.cache.block_size)))
        middle = len(prompt_ids) // 2
        pieces = [Chunk(0, 0, middle)] if middle else []
        pieces.append(Chunk(0, middle, len(prompt_ids) - middle, [0]))
        for piece in pieces:
            new = [NewSequences([0], prompt_ids, SamplingParams(1), (), [blocks])] if piece.start == 0 else []
            hidden = executor.hidden(Plan(chunks=[piece], new_sequences=new))
        if hidden is not None:
            rows.append(executor.model.logits(hidden[-1:])[0].cpu().numpy())
    return rows
