"""Tells a result that rounding decided from a wrong one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from engine.request import SamplingParams
from executor.penalties import ban, current_top_p, penalize
from executor.sampler import sample
from tests.support.rows import Row, sampling_rows


def texts(result: dict[str, Any]) -> list[Any]:
    """Tokens and end of each output of one of traffic's results."""
    return [(output["token_ids"], output["finish_reason"]) for output in result["outputs"]]


def is_tie(model: GPT2LMHeadModel, item: dict[str, Any], alone: dict[str, Any], crowd: dict[str, Any]) -> bool:
    """Whether rounding decides between the two: both of the first tokens that differ come of Hugging Face's logits in
    fp64, moved by as much as fp32 sums move with the number of rows (3e-6 of the largest).

    Request 199 is such a case: the 8th and 9th of its logits differ by 8e-7 of their size, and its nucleus ends there.
    """
    if item["sampling"].get("beam_width", 1) > 1 or item["stop"] or item["bad"]:
        return False
    params = SamplingParams(**item["sampling"])
    exact = copy.deepcopy(model).double()
    for sample_index, (ours, theirs) in enumerate(zip(alone["outputs"], crowd["outputs"], strict=True)):
        pairs = enumerate(zip(ours["token_ids"], theirs["token_ids"], strict=False))
        place = next((k for k, (a, b) in pairs if a != b), None)
        if place is None:
            continue
        history = torch.tensor([item["prompt_ids"] + ours["token_ids"][:place]])
        with torch.inference_mode():
            logits = exact(history).logits[0, -1]
        end_ids = () if item["end_id"] is None else (item["end_id"],)
        row = Row(params.for_sample(sample_index), end_ids, len(item["prompt_ids"]), history.shape[1])
        generator = torch.Generator().manual_seed(0)
        noise = 3e-6 * logits.abs().max() * torch.randn(200, len(logits), generator=generator)
        rows = sampling_rows([row] * 200, history)
        moved = ban(penalize((logits + noise).float(), rows), rows)
        tokens = sample(moved, rows, current_top_p(rows))
        if not {ours["token_ids"][place], theirs["token_ids"][place]} <= set(tokens.tolist()):
            return False
    return True
