"""Chooses each row's token from its logits by its slot's parameters, and appends it to its sequence, without the host.

Where each row has its position, it does not append: a slot has several rows in a step with drafts, and a rank has some
of the rows only where the tp group shares them out (executor.chooser).

Two kernels: kernels.survey_logits goes over parts of rows, kernels.pick_tokens over rows. Scores decide between tokens:
logit / temperature + Gumbel noise (executor.sampler). Scores in fp32 are enough unless two are near each other: in that
case the kernel computes these again in fp64. So the tokens are those of fp64. Each row depends on its own slot only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import runs_on
from kernels.gumbel import gumbel, row_states
from kernels.slot_parameters import Parameter, SlotTensors

try:
    import triton

    from kernels.pick_tokens import pick
    from kernels.survey_logits import survey
except ImportError:  # a CPU-only torch comes without it
    triton = None

_WANTED_PROGRAMS = 1024  # of the survey: few of a GPU's bytes are on their way for one program
_MOST_PARTS = 64
_SURVEY_BLOCK = 1024  # also how many groups a row's maxima have, and the longest short list
_FEW_ROWS = 128  # of up to as many, a row has a multiprocessor of its own


class Workspace(NamedTuple):
    """Memory that a call of `choose_tokens` writes before it reads; `make_workspace` makes it."""

    adjusted: torch.Tensor  # [rows, vocab] fp32: logits after biases, penalties and bans
    carried: torch.Tensor  # [rows, max_seq_len] fp32
    floats: torch.Tensor  # [5, rows, parts] fp32
    ids: torch.Tensor  # [2, rows, parts] int32
    groups: torch.Tensor  # [rows, groups] fp32
    short_lists: torch.Tensor  # [rows, groups] int32


def make_workspace(num_rows: int, vocab_size: int, max_seq_len: int, device: torch.device) -> Workspace:
    """For calls of at most `num_rows` rows. On a device without kernels there is nothing in it."""
    if not runs_on(device):
        num_rows = 0
    return Workspace(
        torch.empty(num_rows, vocab_size, dtype=torch.float32, device=device),
        torch.empty(num_rows, max_seq_len, dtype=torch.float32, device=device),
        torch.empty(5, num_rows, _MOST_PARTS, dtype=torch.float32, device=device),
        torch.empty(2, num_rows, _MOST_PARTS, dtype=torch.int32, device=device),
        torch.empty(num_rows, _SURVEY_BLOCK, dtype=torch.float32, device=device),
        torch.empty(num_rows, _SURVEY_BLOCK, dtype=torch.int32, device=device),
    )


def workspace_bytes(num_rows: int, vocab_size: int, max_seq_len: int) -> int:
    """Bytes of `make_workspace`."""
    return 4 * num_rows * (vocab_size + max_seq_len + 7 * _MOST_PARTS + 2 * _SURVEY_BLOCK)


def choose_tokens(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    slots: SlotTensors,
    workspace: Workspace,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose a token per row, write it to its slot's token_ids at the next position, and set this position.

    logits: [rows, vocab] fp32 contiguous, not changed; row_slots: [rows] int64, different but for the dummy's.
    positions: of the tokens to choose, [rows] int64; then a slot may have several rows, and nothing is written.
    Returns [2, rows] fp64: the tokens, and their log-probabilities by the logits as they are.
    """
    if not runs_on(logits.device):
        return reference(logits, row_slots, slots, positions)
    has_positions = positions is not None
    row_positions = row_slots if positions is None else positions
    rows, vocab_size = logits.shape
    adjusted, carried, floats, ids, groups, short_lists = workspace
    num_parts, part_len = _parts(rows, vocab_size)
    block = 4096 if rows <= _FEW_ROWS else 2048
    values = torch.empty(2, rows, dtype=torch.float64, device=logits.device)
    # Penalties must round as torch's: no fused multiply-add.
    survey[(rows, num_parts)](
        logits,
        adjusted,
        adjusted.view(torch.int32),
        carried,
        floats,
        ids,
        groups,
        row_slots,
        row_positions,
        *slots,
        slots.token_ids.shape[1],
        floats.stride(0),
        has_positions,
        vocab_size,
        num_parts,
        part_len,
        _MOST_PARTS,
        _SURVEY_BLOCK,
        _SURVEY_BLOCK,
        num_warps=4,
        maxnreg=64,  # all the wanted programs run at once on 132 SMs
        enable_fp_fusion=False,
    )
    pick[(rows,)](
        logits,
        adjusted,
        floats,
        ids,
        groups,
        short_lists,
        values,
        row_slots,
        row_positions,
        *slots[:5],
        slots.token_ids.shape[1],
        floats.stride(0),
        num_parts,
        has_positions,
        vocab_size,
        _MOST_PARTS,
        _SURVEY_BLOCK,
        block,
        num_warps=block // 256,
        enable_fp_fusion=False,
    )
    return values


def _parts(rows: int, vocab_size: int) -> tuple[int, int]:
    """How many parts the survey cuts each row into, and tokens of a part."""
    num_parts = min(_MOST_PARTS, max(1, _WANTED_PROGRAMS // rows), max(1, vocab_size // 256))
    num_parts = 1 << num_parts.bit_length() - 1  # a power of two: few variants of the kernel
    part_len = -(-vocab_size // num_parts)
    return num_parts, part_len + -part_len % 16  # aligned where rows are


def reference(
    logits: torch.Tensor, row_slots: torch.Tensor, slots: SlotTensors, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain torch, on any device, row by row."""
    values = torch.empty(2, len(logits), dtype=torch.float64, device=logits.device)
    for row, slot in enumerate(row_slots.tolist()):
        own = slots.parameters[slot].tolist()
        position = int(slots.positions[slot] + slots.advance[slot] if positions is None else positions[row])
        history = slots.token_ids[slot, :position]
        adjusted = _adjust(logits[row].clone(), history, own, slots, slot)
        if _is_sampled(own):
            token_id = _sample(adjusted, own, history, slots.seeds[slot])
        else:
            token_id = int(adjusted.argmax())
        values[0, row] = token_id
        values[1, row] = logits[row, token_id] - logits[row].logsumexp(0)
        if positions is None:
            slots.token_ids[slot, position] = token_id
            slots.positions[slot] = position
    return values


def _is_sampled(own: list[float]) -> bool:
    top_k, top_p = own[Parameter.TOP_K], own[Parameter.TOP_P]
    return own[Parameter.TEMPERATURE] > 0 and top_k != 1 and (top_k > 0 or top_p > 0)


def _adjust(
    values: torch.Tensor, history: torch.Tensor, own: list[float], slots: SlotTensors, slot: int
) -> torch.Tensor:
    """Biases, penalties, bans, in this order. values: [vocab] fp32, written over."""
    num_biases = int(own[Parameter.NUM_BIASES])
    values[slots.bias_ids[slot, :num_biases].long()] += slots.biases[slot, :num_biases]
    prompt_len = int(own[Parameter.PROMPT_LEN])
    if own[Parameter.HAS_PENALTY]:
        repetition, presence, frequency, output_presence = torch.tensor(
            own[Parameter.REPETITION_PENALTY : Parameter.OUTPUT_PRESENCE_PENALTY + 1], device=values.device
        )  # fp32
        seen = history.unique()
        value, count = values[seen], history[prompt_len:].bincount(minlength=len(values))[seen].float()
        value = torch.where(value < 0, value * repetition, value / repetition) - presence
        values[seen] = value - (count * frequency + (count > 0) * output_presence)
    is_early = len(history) - prompt_len < own[Parameter.MIN_LENGTH]
    first = 0 if is_early else int(own[Parameter.NUM_END_IDS])
    values[slots.banned_ids[slot, first : int(own[Parameter.NUM_BANNED])].long()] = float("-inf")
    return values


def _sample(logits: torch.Tensor, own: list[float], history: torch.Tensor, seed: torch.Tensor) -> int:
    """The best score among the tokens that min-p, top-k and top-p leave. logits: [vocab] fp32."""
    if float(logits.max()) == float("-inf"):
        return 0
    temperature = own[Parameter.TEMPERATURE]
    ordered, token_ids = logits.sort(descending=True, stable=True)
    scaled = ordered.double() / temperature
    if own[Parameter.MIN_P] > 0:
        least = ordered[0].double() + temperature * torch.tensor(own[Parameter.MIN_P]).double().log()
        scaled = scaled[ordered.double() >= least]
    if own[Parameter.TOP_K] > 0:
        scaled = scaled[: int(own[Parameter.TOP_K])]
    top_p = _current_top_p(own, history)
    if top_p < 1:
        mass_before = scaled.softmax(0).cumsum(0).roll(1)
        mass_before[0] = -1.0  # the first is always kept
        scaled = scaled[mass_before < top_p]
    token_ids = token_ids[: len(scaled)]  # each of the three leaves the first ones
    noise = gumbel(row_states(seed[None], seed.new_tensor([len(history)]))[:, None], token_ids)[0]
    return int(token_ids[(scaled + noise).argmax()])


def _current_top_p(own: list[float], history: torch.Tensor) -> float:
    """top_p after its decay; 1 where it cuts nothing."""
    top_p, decay = own[Parameter.TOP_P], own[Parameter.TOP_P_DECAY]
    if top_p == 0:
        return 1.0
    prompt_len = int(own[Parameter.PROMPT_LEN])
    resets = (history[prompt_len:] == own[Parameter.TOP_P_RESET_ID]).nonzero()
    num_steps = len(history) - prompt_len - (int(resets[-1]) + 1 if len(resets) else 0)
    if decay == 1 or num_steps == 0:
        return top_p
    return max(top_p * decay**num_steps, own[Parameter.TOP_P_MIN])
