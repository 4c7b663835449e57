"""Results that are equal but for rounding; tells a result that rounding decided from a wrong one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
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


def assert_close(one: Any, other: Any) -> None:
    """Equal but for the rounding of floats, at any depth."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_close(mine, yours)
    else:
        assert other == (pytest.approx(one, abs=2e-4) if isinstance(one, float) else one)


def assert_likeliest(model: GPT2LMHeadModel, item: dict[str, Any], result: dict[str, Any], atol: float = 1e-4) -> None:
    """All that one of traffic's results tells of a greedy request is Hugging Face's, but for rounding."""
    (output,) = result["outputs"]
    ids = torch.tensor(item["prompt_ids"] + output["token_ids"], device=model.device)
    with torch.inference_mode():
        logits = model(ids[None, :-1]).logits[0].cpu()
    log_probs, first = logits.log_softmax(-1), len(item["prompt_ids"]) - 1
    of_tokens = log_probs.gather(1, ids[1:, None].cpu())[:, 0]
    np.testing.assert_allclose(of_tokens[first:], log_probs[first:].max(1).values, atol=2 * atol)
    np.testing.assert_allclose(output["log_probs"], of_tokens[first:], atol=atol)
    if count := item["sampling"].get("num_log_probs"):
        found = [[log_prob for _, log_prob in token] for token in output["alternatives"]]
        np.testing.assert_allclose(found, log_probs[first:].topk(count).values, atol=atol)
    if item["sampling"].get("prompt_log_probs"):
        np.testing.assert_allclose(result["prompt_log_probs"], of_tokens[:first], atol=atol)
    if item["sampling"].get("next_token_logits"):
        np.testing.assert_allclose(result["next_token_logits"], logits[first], atol=atol)
