"""The kernels that choose tokens against executor.sampler and executor.penalties on the same rows, and their times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.plan import NewSequences
from engine.request import SamplingParams
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState
from kernels import accept_tokens
from kernels.choose_tokens import choose_tokens, make_workspace, reference
from kernels.gumbel import gumbel, row_states
from kernels.slot_parameters import Parameter
from tests.support.choices import by_sampler, differences, mixed_logits, mixed_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICE = torch.device("cuda")


def run(logits: torch.Tensor, slots: torch.Tensor, state: SlotState, times: int = 1) -> torch.Tensor:
    """The kernels' result, on the CPU; checks what they wrote to the state, and leaves the positions as they were."""
    before, positions = logits.clone(), state.positions.clone()
    workspace = make_workspace(len(slots) + 3, logits.shape[1], state.token_ids.shape[1], DEVICE)
    for tensor in workspace:  # whatever was there before
        tensor.view(torch.int32).fill_(-1)
    results = []
    for _ in range(times):
        state.positions.copy_(positions)
        results.append(choose_tokens(logits, slots, state.tensors, workspace).cpu())
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(logits, before)
    own = slots[slots != state.dummy_slot]
    assert torch.equal(state.positions[own], positions[own] + 1)
    assert torch.equal(state.token_ids[own, positions[own] + 1].cpu().double(), results[0][0, : len(own)])
    assert state.positions[state.dummy_slot].item() == 0
    state.positions.copy_(positions)
    return results[0]


@pytest.mark.parametrize("vocab_size", [1000, 50257, 51200])
@pytest.mark.parametrize(("count", "num_padding"), [(1, 0), (7, 1), (64, 0), (207, 49), (512, 0)])
def test_tokens_are_the_samplers(count: int, num_padding: int, vocab_size: int) -> None:
    """207 rows are all the mixes of parameters."""
    rows = mixed_rows(count, vocab_size, DEVICE, seed=count, max_seq_len=3000)
    logits = mixed_logits(count + num_padding, vocab_size, DEVICE)
    logits[3:count:8, 5:] = float("-inf")  # fewer than many a top_k
    expected = by_sampler(rows, logits[:count]).cpu()
    slots = rows.state.tensor([*rows.seq_slots.tolist(), *[rows.state.dummy_slot] * num_padding])
    tokens, log_probs = run(logits, slots, rows.state, 3)
    wrong = differences(rows, tokens[:count].tolist(), expected[0].tolist())
    assert not wrong, wrong[:5]
    torch.testing.assert_close(log_probs[:count], expected[1], atol=5e-5, rtol=1e-6)
    assert tokens[count:].tolist() == logits[count:].argmax(1).tolist()


def test_rows_of_one_slot_choose_at_their_own_positions() -> None:
    """As in a step with drafts; the slots stay as they are."""
    rows = mixed_rows(60, 50257, DEVICE, max_seq_len=3000)
    slots, positions = rows.on_device
    slots, positions = (
        slots.repeat_interleave(3),
        (positions[:, None] - torch.arange(2, -1, -1, device=DEVICE)).clamp(1),
    )
    state, before = rows.state, [tensor.clone() for tensor in rows.state.tensors]
    logits = mixed_logits(180, 50257, DEVICE)
    workspace = make_workspace(180, 50257, 3000, DEVICE)
    found = choose_tokens(logits, slots, state.tensors, workspace, positions.flatten())[0]
    own = SamplingRows(state, slots.cpu().numpy(), positions.flatten().cpu().numpy())
    wrong = differences(own, found.tolist(), by_sampler(own, logits)[0].tolist())
    assert not wrong, wrong[:5]
    assert all(torch.equal(one, other) for one, other in zip(state.tensors, before, strict=True))


@pytest.mark.parametrize("num_slots", [2, 5, 12, 40])
def test_tokens_are_accepted_up_to_the_first_wrong_draft(num_slots: int) -> None:
    """Up to nine rows a slot, and padding rows; two tokens to choose from, so that many drafts are right. 40 slots have
    more rows than the kernel takes."""
    rng = np.random.default_rng(num_slots)
    for num_padding in range(20):
        counts = rng.integers(1, 10, num_slots)
        firsts = rng.integers(1, 50, num_slots)
        slots = np.repeat(rng.permutation(num_slots), counts)
        positions = np.concatenate([np.arange(*span) for span in zip(firsts, firsts + counts, strict=True)])
        padding = [num_slots] * num_padding
        row_slots = torch.tensor([*slots, *padding], device=DEVICE)
        row_positions = torch.tensor([*positions, *[0] * num_padding], device=DEVICE)
        chosen_ids = torch.tensor([*rng.integers(0, 2, len(slots)), *[1] * num_padding], device=DEVICE)
        token_ids = torch.tensor(rng.integers(0, 2, (num_slots + 1, 64)), device=DEVICE)
        ours, expected = ([token_ids.clone(), torch.zeros_like(token_ids[:, 0])] for _ in range(2))
        accept_tokens.accept_tokens(*ours, row_slots, row_positions, chosen_ids.double())
        accept_tokens.reference(*expected, row_slots, row_positions, chosen_ids)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


def sampled_rows(count: int, params: dict[str, Any], seq_len: int = 40) -> SamplingRows:
    """Rows that differ by their seeds, in slots of the same numbers; half of a text is prompt."""
    state = SlotState(count, seq_len, 1, 0, DEVICE)
    for row in range(count):
        own = SamplingParams(1, random_seed=row * 12345, **params)
        state.start([NewSequences([row], [0] * (seq_len // 2), own, (), [[]])])
    state.token_ids.copy_(torch.randint(1000, state.token_ids.shape, generator=torch.Generator().manual_seed(0)))
    state.positions[:count] = seq_len - 2
    return SamplingRows(state, np.arange(count), np.full(count, seq_len - 1))


@pytest.mark.parametrize("count", [40, 150])
def test_fp64_decides_between_scores_that_are_near_each_other(count: int) -> None:
    """Each row's best token gets a rival, whose score is higher or lower by some 1e-6: fp32 cannot tell them apart."""
    rows = sampled_rows(count, {"top_p": 1.0, "temperature": 0.8})
    slots = rows.state.tensor(rows.seq_slots)
    logits = torch.randn(count, 3001, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5))
    states = row_states(rows.state.seeds[slots], rows.state.tensor(rows.positions))[:, None]
    noise = gumbel(states, torch.arange(3001, device=DEVICE))
    best, at_best = (logits / 0.8 + noise).max(dim=1)
    rivals = (at_best + 1234) % 3001
    wanted = best + torch.linspace(-2e-6, 2e-6, count, device=DEVICE)
    logits[slots, rivals] = ((wanted - noise[slots, rivals]) * 0.8).float()
    expected = reference(logits, slots, rows.state.tensors)[0].cpu()
    rows.state.positions[slots] -= 1
    assert 0.2 * count < (expected == rivals.cpu()).sum() < 0.8 * count
    found = run(logits, slots, rows.state)[0]
    # Where rounding of the logits has made the scores equal but for fp64's last bits, either is right.
    scores = logits / 0.8 + noise
    gap = scores[slots, found.long().to(DEVICE)] - scores[slots, expected.long().to(DEVICE)]
    assert gap.abs().max().item() < 1e-13


@pytest.mark.parametrize("params", [{}, {"top_k": 40}, {"top_k": 900}, {"min_p": 0.01}], ids=str)
def test_fp64_decides_whether_a_token_is_in_the_nucleus(params: dict[str, Any]) -> None:
    """top_p is, but for 1e-9, the mass before the token that has the best score without a top_p."""
    count = 60
    rows = sampled_rows(count, {"top_p": 0.999999, **params})
    slots = rows.state.tensor(rows.seq_slots)
    logits = torch.randn(count, 3001, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(6)) * 2
    tokens = reference(logits, slots, rows.state.tensors)[0]
    rows.state.positions[slots] -= 1
    kept = logits.sort(dim=1, descending=True).values.double()
    kept = kept[:, : params.get("top_k") or 3001]
    kept = kept.masked_fill(kept < kept[:, :1] + np.log(params.get("min_p") or 1e-30), float("-inf"))
    is_before = kept > logits.gather(1, tokens.long()[:, None])
    mass_before = (kept.softmax(1) * is_before).sum(1)
    nudge = torch.tensor([1e-9, -1e-9], device=DEVICE, dtype=torch.float64).repeat(count // 2)
    rows.state.parameters[slots, Parameter.TOP_P] = (mass_before + nudge).clamp(1e-12)
    expected = reference(logits, slots, rows.state.tensors)[0].cpu()
    rows.state.positions[slots] -= 1
    assert 0.3 * count < (expected == tokens.cpu()).sum() < 0.8 * count
    assert run(logits, slots, rows.state)[0].tolist() == expected.tolist()


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"top_p": 1.0},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "top_k 1000": {"top_k": 1000},
    "min_p 0.05": {"top_p": 1.0, "min_p": 0.05},
    "penalties, greedy": {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "penalties, top_p 0.9": {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "top_p": 0.9},
}


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "peaked"])
def test_times(scale: float) -> None:
    """Prints µs per call, from CUDA graphs of ten calls. Rows with penalties have texts of 1000 tokens."""
    vocab_size, num_calls, replays = 51200, 10, 20
    print(f"\n{'logits · ' + format(scale, 'g'):22}" + "".join(f"{count:>10} rows" for count in (1, 32, 256)))
    for name, params in KINDS.items():
        line = f"{name:22}"
        for count in (1, 32, 256):
            rows = sampled_rows(count, params, 1000)
            rows.state.advance.zero_()  # each call chooses the same tokens
            slots = rows.state.tensor(rows.seq_slots)
            logits = torch.randn(count, vocab_size, device=DEVICE) * scale
            workspace = make_workspace(count, vocab_size, 1000, DEVICE)
            choose_tokens(logits, slots, rows.state.tensors, workspace)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(num_calls):
                    choose_tokens(logits, slots, rows.state.tensors, workspace)
            graph.replay()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            line += f"{start.elapsed_time(end) * 1000 / (num_calls * replays):>15.1f}"
        print(line, flush=True)
