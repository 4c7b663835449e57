"""The reference of kernels.choose_tokens, and the parameters that slots give it, against the sampler of plain steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.plan import NewSequences
from engine.request import SamplingParams
from executor.penalties import add_bias, ban, penalize
from executor.slots import SlotState
from kernels.choose_tokens import choose_tokens, make_workspace, reference
from kernels.slot_parameters import MOST_LISTED, Parameter
from tests.support.choices import by_sampler, differences, mixed_logits, mixed_rows
from tests.support.rows import Row, sampling_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "vocab_size"), [(240, 1000), (40, 3001)])
def test_tokens_are_the_samplers(count: int, vocab_size: int) -> None:
    rows = mixed_rows(count, vocab_size, CPU)
    logits = mixed_logits(count, vocab_size, CPU)
    expected = by_sampler(rows, logits)
    state, before = rows.state, logits.clone()
    slots = state.tensor([*rows.seq_slots.tolist(), state.dummy_slot, state.dummy_slot])
    padded = torch.cat([logits, logits[:2]])
    workspace = make_workspace(len(slots), vocab_size, 64, CPU)
    tokens, log_probs = choose_tokens(padded, slots, state.tensors, workspace)
    assert not differences(rows, tokens[:-2].tolist(), expected[0].tolist())
    torch.testing.assert_close(log_probs[:-2], expected[1], atol=1e-5, rtol=0)
    assert torch.equal(padded[:-2], before)
    assert tokens[-2:].tolist() == logits[:2].argmax(1).tolist()
    positions = torch.tensor(rows.positions)
    assert torch.equal(state.token_ids[slots[:-2], positions].double(), tokens[:-2])
    assert torch.equal(state.positions[slots[:-2]], positions)
    assert state.positions[state.dummy_slot].item() == 0


def test_the_order_of_biases_penalties_and_bans_is_the_executors() -> None:
    """Greedy choices among tokens that only the adjustments tell apart."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        {"repetition_penalty": 1.7, "logit_bias": ((4, 2.0), (6, -2.0), (4, 0.5))},
        {"frequency_penalty": 0.4, "presence_penalty": 0.3, "temperature": 0.7},
        {"frequency_penalty": 0.4, "presence_penalty": 0.3, "temperature": 0.7, "openai_penalties": True},
        {"min_length": 30},
    ]
    for settings in kinds:
        params = SamplingParams(1, **{"top_k": 1, **settings})
        rows = sampling_rows(
            [Row(params, (1, 2), 5, 20, always_banned=[3, 9])] * 50, torch.randint(12, (50, 30), generator=generator)
        )
        rows.state.positions[:50] = 19
        logits = torch.randn(50, 12, generator=generator)
        adjusted = ban(penalize(add_bias(logits, rows), rows), rows)
        assert adjusted.isinf().sum().item() == 50 * (4 if params.min_length else 2)
        found = reference(logits, torch.arange(50), rows.state.tensors)[0]
        assert found.tolist() == adjusted.argmax(1).tolist()
        assert found.tolist() != logits.argmax(1).tolist()


def test_lists_of_a_slot() -> None:
    state = SlotState(3, 8, 1, 0, CPU)
    params = SamplingParams(4, logit_bias=((5, 1.0), (2, -1.0), (5, 0.5)), min_length=2, num_log_probs=1)
    longest = list(range(MOST_LISTED - 1))
    state.start(
        [
            NewSequences([0], [1], params, (8, 9), [[]], [4]),
            NewSequences([1], [1], SamplingParams(4), (8,), [[]], [MOST_LISTED, *longest]),
            NewSequences([2], [1], SamplingParams(4, min_length=1), (8,), [[]], [7, *longest]),
        ]
    )
    columns = [Parameter.NUM_BIASES, Parameter.NUM_BANNED, Parameter.NUM_END_IDS, Parameter.MIN_LENGTH]
    counts = state.parameters[:, columns].int().tolist()
    assert counts == [[2, 3, 2, 2], [0, MOST_LISTED, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert state.bias_ids[0, :2].tolist() == [5, 2]
    assert state.biases[0, :2].tolist() == [1.5, -1.0]
    assert state.banned_ids[0, :3].tolist() == [8, 9, 4]
    assert state.banned_ids[1].tolist() == [MOST_LISTED, *longest]
    assert state.has_long_list.tolist() == [False, False, True, False]
    assert state.has_extras.tolist() == [True, False, False, False]
    state.start([NewSequences([2, 0], [1], SamplingParams(4, n=2, top_k=3), (8,), [[], []])])
    assert state.parameters[:, columns].any(1).tolist() == [False, True, False, False]
    assert not state.has_long_list.any()


def test_rows_beyond_the_kernels_are_those_with_bans_of_the_step_and_too_long_lists() -> None:
    params = SamplingParams(1, top_k=3)
    rows = [Row(params), Row(params, banned=[1]), Row(params, always_banned=[5] * (MOST_LISTED + 1)), Row(params)]
    assert sampling_rows(rows).beyond_kernels().tolist() == [1, 2]
    assert sampling_rows(rows[:1]).beyond_kernels().tolist() == []
    assert sampling_rows(rows).part(np.array([0, 3])).beyond_kernels().tolist() == []
