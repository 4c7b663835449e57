"""What the kernels that choose tokens read of each sequence. Its slot is a row of every tensor."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None

MOST_LISTED = 1024  # entries of a slot's list on the device


class Parameter(enum.IntEnum):
    """Columns of SlotTensors.parameters. Penalties that are subtracted are there as before the temperature divides."""

    PROMPT_LEN = 0
    TEMPERATURE = 1
    TOP_K = 2
    TOP_P = 3
    TOP_P_DECAY = 4
    TOP_P_MIN = 5
    TOP_P_RESET_ID = 6
    REPETITION_PENALTY = 7
    PRESENCE_PENALTY = 8
    FREQUENCY_PENALTY = 9
    OUTPUT_PRESENCE_PENALTY = 10  # of tokens that the output has; PRESENCE_PENALTY counts the prompt too
    MIN_P = 11
    MIN_LENGTH = 12
    HAS_PENALTY = 13  # 0 or 1
    NUM_BIASES = 14
    NUM_BANNED = 15  # of them, the first NUM_END_IDS are banned before MIN_LENGTH only
    NUM_END_IDS = 16


class SlotTensors(NamedTuple):
    """Tensors by slot, all contiguous. Rows of zeros in `parameters` and `advance` belong to the dummy slot."""

    token_ids: torch.Tensor  # [slots, max_seq_len] int64: each sequence's tokens so far
    positions: torch.Tensor  # [slots] int64: of the last of them
    advance: torch.Tensor  # [slots] int64: from there to the token to choose
    parameters: torch.Tensor  # [slots, len(Parameter)] fp64
    seeds: torch.Tensor  # [slots] int64, the bits of a uint64
    bias_ids: torch.Tensor  # [slots, MOST_LISTED] int32, each id at most once
    biases: torch.Tensor  # [slots, MOST_LISTED] fp32
    banned_ids: torch.Tensor  # [slots, MOST_LISTED] int32


if triton is not None:
    PROMPT_LEN = tl.constexpr(int(Parameter.PROMPT_LEN))
    TEMPERATURE = tl.constexpr(int(Parameter.TEMPERATURE))
    TOP_K = tl.constexpr(int(Parameter.TOP_K))
    TOP_P = tl.constexpr(int(Parameter.TOP_P))
    TOP_P_DECAY = tl.constexpr(int(Parameter.TOP_P_DECAY))
    TOP_P_MIN = tl.constexpr(int(Parameter.TOP_P_MIN))
    TOP_P_RESET_ID = tl.constexpr(int(Parameter.TOP_P_RESET_ID))
    REPETITION_PENALTY = tl.constexpr(int(Parameter.REPETITION_PENALTY))
    PRESENCE_PENALTY = tl.constexpr(int(Parameter.PRESENCE_PENALTY))
    FREQUENCY_PENALTY = tl.constexpr(int(Parameter.FREQUENCY_PENALTY))
    OUTPUT_PRESENCE_PENALTY = tl.constexpr(int(Parameter.OUTPUT_PRESENCE_PENALTY))
    MIN_P = tl.constexpr(int(Parameter.MIN_P))
    MIN_LENGTH = tl.constexpr(int(Parameter.MIN_LENGTH))
    HAS_PENALTY = tl.constexpr(int(Parameter.HAS_PENALTY))
    NUM_BIASES = tl.constexpr(int(Parameter.NUM_BIASES))
    NUM_BANNED = tl.constexpr(int(Parameter.NUM_BANNED))
    NUM_END_IDS = tl.constexpr(int(Parameter.NUM_END_IDS))
    NUM_PARAMETERS = tl.constexpr(len(Parameter))
    NUM_LISTED = tl.constexpr(MOST_LISTED)

    @triton.jit
    def position_of(row, slot, row_positions, positions, advance, has_positions: tl.constexpr):
        """Of the token that the row chooses, int32: its own, or its slot's next one."""
        if has_positions:
            position = tl.load(row_positions + row)
        else:
            position = tl.load(positions + slot) + tl.load(advance + slot)
        return position.to(tl.int32)

    @triton.jit
    def is_sampled(own):
        """Whether the row at `own` of the parameters is not greedy (engine.request.SamplingParams.is_greedy)."""
        top_k = tl.load(own + TOP_K)
        is_cut = (top_k > 0) | (tl.load(own + TOP_P) > 0)
        return (tl.load(own + TEMPERATURE) > 0) & (top_k != 1) & is_cut

    @triton.jit
    def first_banned(own, position):
        """The first banned id that counts, int32: end ids come first, and count before MIN_LENGTH only."""
        is_early = position - tl.load(own + PROMPT_LEN) < tl.load(own + MIN_LENGTH)
        return tl.where(is_early, 0, tl.load(own + NUM_END_IDS)).to(tl.int32)

    @triton.jit
    def is_adjusted(own, position):
        """Whether biases, penalties or bans change the row's logits."""
        is_changed = (tl.load(own + HAS_PENALTY) > 0) | (tl.load(own + NUM_BIASES) > 0)
        return is_changed | (tl.load(own + NUM_BANNED).to(tl.int32) > first_banned(own, position))
