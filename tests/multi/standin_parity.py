"""On every rank: the stand-in's tokens against Hugging Face's `generate` on a tiny random GPT-2.

tests/executor/test_standin.py calls it through tests.support.ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.world import World
from tests.support.tiny_gpt2 import (
    LAYERS,
    OUTPUT_LEN,
    PROMPTS,
    hf_log_prob,
    hf_tokens,
    make_op,
    new_tokens,
    run,
    shard,
    tiny_gpt2,
)


def expect() -> dict[str, Any]:
    """What Hugging Face says of PROMPTS: greedy tokens, log-probabilities of prompt and tokens, 3 beams."""
    model = tiny_gpt2()
    greedy = [hf_tokens(model, prompt, OUTPUT_LEN) for prompt in PROMPTS]
    beam_options = dict(num_beams=3, num_return_sequences=3, length_penalty=0.0)
    return dict(
        state={name: tensor.numpy() for name, tensor in model.state_dict().items()},
        greedy=greedy,
        log_probs=[[hf_log_prob(model, p + new, 1)] for p, [new] in zip(PROMPTS, greedy, strict=True)],
        beams=[hf_tokens(model, prompt, OUTPUT_LEN, **beam_options) for prompt in PROMPTS],
    )


def check(world: World, library: str, expected: dict[str, Any], tp: int, pp: int) -> bool:
    """Whether tokens and log-probabilities agree and the stand-in refuses a wrong shard on every rank (else it raises).

    `expected` is what `expect` returns; it takes transformers, which the ranks do without.
    """
    torch.classes.load_library(library)
    weights = shard(expected["state"], tp, pp, world.rank)
    op = make_op(weights, tp, pp)

    greedy = run(op, PROMPTS, OUTPUT_LEN, log_probs=2)
    assert new_tokens(greedy, PROMPTS) == expected["greedy"], (world.rank, greedy[0], expected["greedy"])
    np.testing.assert_allclose(greedy[2].numpy(), expected["log_probs"], rtol=1e-4)
    beams = run(op, PROMPTS, OUTPUT_LEN, beam_width=3)
    assert new_tokens(beams, PROMPTS) == expected["beams"], (world.rank, beams[0], expected["beams"])

    # What one rank does wrong throws on all of them; none waits for ever.
    wrong_shard = list(weights)
    if world.rank == world.size - 1:
        index = next(i for i in range(4 * LAYERS, 5 * LAYERS) if weights[i].numel())
        wrong_shard[index] = weights[index][:, 1:].contiguous()
    refusals = [lambda: make_op(wrong_shard, tp, pp)]
    if world.size > 1:
        refusals.append(lambda: run(op, [[world.rank]], 1))
    for wrong in refusals:
        try:
            wrong()
        except RuntimeError as error:
            assert str(error).startswith("stand-in: "), error
        else:
            raise AssertionError(f"rank {world.rank}: the stand-in accepted it")
    return True
