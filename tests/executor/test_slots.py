"""The slots' state: what new sequences and reorders write, and steps of several known tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from engine.plan import BeamReorder, Chunk, NewSequences, Plan
from engine.request import SamplingParams
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState
from kernels.choose_tokens import choose_tokens, make_workspace
from kernels.slot_parameters import Parameter
from tests.support.choices import by_sampler, mixed_logits, mixed_rows
from tests.support.engines import hf_greedy, make_engine, prompts

CPU = torch.device("cpu")


def test_samples_read_the_prompt_at_the_first_ones_locations() -> None:
    slots = SlotState(4, 16, 4, 20, CPU)
    sampling = SamplingParams(5, top_k=7, top_p=0.5, temperature=2.0, presence_penalty=0.25, n=2, random_seed=2**64 - 1)
    slots.start([NewSequences([2, 0], [11, 12, 13], sampling, (9,), [[3, 1], [7]])])
    assert slots.token_ids[[2, 0], :3].tolist() == [[11, 12, 13]] * 2
    assert slots.kv_loc_table[2, :8].tolist() == [12, 13, 14, 15, 4, 5, 6, 7]
    assert slots.kv_loc_table[0, :7].tolist() == [12, 13, 14, 28, 29, 30, 31]
    assert slots.kv_loc_table[4].tolist() == [80] * 16  # the dummy's location, behind all blocks
    assert slots.seeds[[2, 0]].tolist() == [-1, 0]
    row = slots.parameters[0]
    assert (row[Parameter.TEMPERATURE], row[Parameter.TOP_K], row[Parameter.TOP_P]) == (2.0, 7, 0.5)
    assert (row[Parameter.PROMPT_LEN], row[Parameter.PRESENCE_PENALTY]) == (3, 0.5)  # times the temperature


def test_a_chunk_is_a_slice_where_its_locations_are_consecutive() -> None:
    slots = SlotState(2, 16, 4, 20, CPU)
    slots.start([NewSequences([1], [5], SamplingParams(5), (), [[2, 3, 9]])])
    assert slots.chunk(1, 0, 6, 2).kv_locs == slice(8, 16)
    assert slots.chunk(1, 0, 6, 3).kv_locs.tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 36]


def test_a_slot_grows_from_a_position_on_and_a_run_of_blocks_goes_on() -> None:
    slots = SlotState(3, 18, 4, 20, CPU)
    slots.start([NewSequences([0, 1], [5] * 6, SamplingParams(9, n=2, top_k=2), (), [[2, 3], [9]])])
    slots.grow([(0, 8, [4]), (1, 10, [10, 7])])
    assert slots.chunk(0, 0, 11, 1).kv_locs == slice(8, 20)
    assert slots.kv_loc_table[1, :18].tolist() == [*range(8, 14), *range(36, 44), *range(28, 32)]
    before = slots.kv_loc_table[1].tolist()
    slots.grow([(0, 12, [5, 8, 9])])  # beyond the longest sequence there are no locations
    assert slots.kv_loc_table[1].tolist() == before
    assert slots.chunk(0, 0, 15, 1).kv_locs == slice(8, 24)
    assert slots.chunk(0, 0, 17, 1).kv_locs.tolist() == [*range(8, 24), 32, 33]
    slots.grow([(0, 12, [6])])  # blocks that were taken back and came again
    assert slots.chunk(0, 0, 13, 1).kv_locs.tolist() == [*range(8, 20), 24, 25]


def test_a_request_enters_again_with_its_tokens() -> None:
    """All that depends on the length of its prompt stays as it was; each sample keeps its seed."""
    slots = SlotState(4, 16, 4, 20, CPU)
    sampling = SamplingParams(9, top_k=7, n=3, random_seed=40, min_length=5, top_p_decay=0.5)
    new = NewSequences([3, 1], [5, 6], sampling, (9,), [[0, 1], [2]], [], [[7, 8, 9], [10, 11, 12]], [0, 2])
    slots.start([new])
    assert slots.token_ids[[3, 1], :5].tolist() == [[5, 6, 7, 8, 9], [5, 6, 10, 11, 12]]
    assert slots.kv_loc_table[1, :6].tolist() == [0, 1, 8, 9, 10, 11]
    assert slots.parameters[[3, 1], Parameter.PROMPT_LEN].tolist() == [2, 2]
    assert slots.unbanned_from[[3, 1]].tolist() == [7, 7]
    assert slots.seeds[[3, 1]].tolist() == [40, 42]
    assert slots.positions[[3, 1]].tolist() == [0, 2]  # the second one has its prompt from the first


def test_a_reorder_copies_indices_and_appends_tokens() -> None:
    slots = SlotState(3, 8, 2, 12, CPU)
    slots.start([NewSequences([0, 1, 2], [5, 6], SamplingParams(4, beam_width=3), (), [[0, 1], [4], [6]])])
    slots.token_ids[:3, 2] = torch.tensor([7, 8, 9])
    slots.reorder(BeamReorder([0, 1], [1, 0], 3, [20, 21], [-0.5, -1.5]))
    assert slots.token_ids[:2, :4].tolist() == [[5, 6, 8, 20], [5, 6, 7, 21]]
    assert slots.kv_loc_table[:2, :4].tolist() == [[0, 1, 8, 3], [0, 1, 2, 9]]  # each writes to its own place
    assert slots.positions[:3].tolist() == [3, 3, 2]  # the third one has its prompt from the first
    assert slots.beam_scores[:2].tolist() == [-0.5, -1.5]


def test_several_known_tokens_are_computed_in_one_step(
    converted: Callable[[int], Path], gpt2_source: tuple[Path, GPT2LMHeadModel]
) -> None:
    """A step may compute any number of a sequence's tokens: the token after them is that of one step for each."""
    executor = make_engine(converted(1), max_batch_size=4, block_size=4).executor
    prompt_ids = prompts(1)[0]
    expected = hf_greedy(gpt2_source[1], prompt_ids, 6)
    blocks = list(range(-(-(len(prompt_ids) + 8) // 4)))
    new = NewSequences([3], prompt_ids, SamplingParams(8), (), [blocks])
    first = executor.execute(Plan(chunks=[Chunk(3, 0, len(prompt_ids), [3])], new_sequences=[new])).wait()
    assert first.token_ids == expected[:1]
    known = torch.tensor(expected[:4])
    executor.slots.token_ids[3, len(prompt_ids) : len(prompt_ids) + 4] = known
    fifth = executor.execute(Plan(chunks=[Chunk(3, len(prompt_ids), 4, [3])])).wait()
    assert fifth.token_ids == expected[4:5]
    position = np.array([len(prompt_ids) + 4], dtype=np.int32)
    assert executor.slots.positions[3] == position[0]
    sixth = executor.execute(Plan(np.array([3], dtype=np.uint8), position)).wait()
    assert sixth.token_ids == expected[5:6]


def test_drafts_are_kept_up_to_the_first_wrong_one() -> None:
    """Slots with several rows, between slots with one."""
    slots = SlotState(5, 12, 4, 20, CPU)
    slots.write_drafts(
        [Chunk(3, 2, 4, [3], draft_ids=[20, 21, 22]), Chunk(1, 0, 1, [1]), Chunk(0, 5, 2, [0], None, [9])]
    )
    assert slots.token_ids[3, :7].tolist() == [0, 0, 0, 20, 21, 22, 0]
    assert slots.token_ids[0, :7].tolist() == [0] * 6 + [9]
    rows = {  # slot → its first position, and the tokens sampled from there on
        2: (4, [50]),
        3: (3, [20, 77, 22, 23]),  # the second draft is wrong; a later one that looks right does not count
        0: (6, [9, 10]),
        1: (1, [60]),
    }
    index = torch.tensor([slot for slot, (_, ids) in rows.items() for _ in ids])
    positions = torch.tensor([first + i for first, ids in rows.values() for i in range(len(ids))])
    slots.accept(index, positions, torch.tensor([token_id for _, ids in rows.values() for token_id in ids]))
    assert slots.positions.tolist() == [7, 1, 4, 4, 0, 0]
    assert slots.token_ids[3, :5].tolist() == [0, 0, 0, 20, 77]
    assert slots.token_ids[0, 6:8].tolist() == [9, 10]
    assert (slots.token_ids[2, 4], slots.token_ids[1, 1]) == (50, 60)


@pytest.mark.parametrize("count", [1, 3])
def test_the_only_slot_of_a_step_may_have_several_rows(count: int) -> None:
    slots = SlotState(2, 8, 4, 20, CPU)
    slots.token_ids[1, 2:5] = torch.tensor([5, 6, 7])
    positions = torch.arange(2, 2 + count)
    slots.accept(torch.ones(count, dtype=torch.int64), positions, torch.tensor([5, 6, 7][: count - 1] + [90]))
    assert slots.positions.tolist() == [0, 1 + count, 0]
    assert slots.token_ids[1, 1 + count] == 90


def test_rows_of_a_slot_choose_at_their_own_positions() -> None:
    """kernels.choose_tokens beside executor.sampler, on rows of all kinds; the slots stay as they are."""
    rows = mixed_rows(60, 211, CPU, seed=3)
    slots, positions = rows.on_device
    slots, positions = slots.repeat_interleave(3), (positions[:, None] - torch.tensor([2, 1, 0])).clamp(1).flatten()
    state = rows.state
    before = [tensor.clone() for tensor in state.tensors]
    logits = mixed_logits(180, 211, CPU)
    workspace = make_workspace(180, 211, 64, CPU)
    tokens = choose_tokens(logits, slots, state.tensors, workspace, positions)[0]
    expected = by_sampler(SamplingRows(state, slots.numpy(), positions.numpy()), logits)[0]
    assert tokens.tolist() == expected.tolist()
    assert all(torch.equal(one, other) for one, other in zip(state.tensors, before, strict=True))
