"""The first kernel of choose_tokens: adjusts logits, and finds maxima, sums and best scores of parts of each row.

Biases, penalties and bans change tokens one by one, so a part needs nothing of the row's other parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import gumbel
from kernels import slot_parameters as columns

LOWEST = tl.constexpr(-3.0e38)  # instead of -inf: differences from it are numbers
MOST_SHORT = tl.constexpr(512)  # a larger top_k is searched in the whole row


@triton.jit
def is_short(top_k, vocab_size):
    """Whether a row looks for its top_k among the tokens above a bound, of which few are expected."""
    return (top_k > 0) & (top_k <= MOST_SHORT) & (top_k < vocab_size)


@triton.jit
def survey(
    logits,  # [rows, vocab_size] fp32
    adjusted,  # as logits; written for the rows that biases, penalties or bans change
    counts,  # the same memory as adjusted, int32
    carried,  # [rows, max_seq_len] fp32
    floats,  # [5, any rows, most_parts] fp32: raw maximum, sum of exp, maximum, best score, second best
    ids,  # [2, any rows, most_parts] int32: of the maximum, of the best score
    groups,  # [rows, num_groups] fp32: maxima of disjoint groups of the row's tokens, where top_k is short
    row_slots,  # [rows] int64
    row_positions,  # as row_slots, with has_positions
    token_ids,
    positions,
    advance,
    parameters,
    seeds,
    bias_ids,
    biases,
    banned_ids,
    max_seq_len,
    column,  # elements from a column of floats or ids to the next
    has_positions: tl.constexpr,
    vocab_size: tl.constexpr,
    num_parts: tl.constexpr,
    part_len: tl.constexpr,
    most_parts: tl.constexpr,
    num_groups: tl.constexpr,
    block: tl.constexpr,
):
    """One part of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # Nothing above reads memory: what an earlier kernel wrote is read from here on.
    slot = tl.load(row_slots + row)
    own = parameters + slot * columns.NUM_PARAMETERS
    position = columns.position_of(row, slot, row_positions, positions, advance, has_positions)
    num_biases = tl.load(own + columns.NUM_BIASES).to(tl.int32)
    first_banned = columns.first_banned(own, position)
    num_banned = tl.load(own + columns.NUM_BANNED).to(tl.int32)
    has_penalty = tl.load(own + columns.HAS_PENALTY) > 0
    is_adjusted = columns.is_adjusted(own, position)
    raw, changed = logits + row * vocab_size, adjusted + row * vocab_size

    lane = tl.arange(0, block)
    first = part * part_len
    end = tl.minimum(first + part_len, vocab_size)
    largest, at_largest, total = _survey_raw(raw, changed, is_adjusted, first, end, lane, block)
    part_largest = tl.max(largest, 0)
    place = row * most_parts + part
    tl.store(floats + place, part_largest)
    tl.store(floats + column + place, tl.sum(total * tl.exp(largest - part_largest), 0))

    if is_adjusted:
        listed = slot * columns.NUM_LISTED
        tl.debug_barrier()  # the part's copy is there
        _add_biases(changed, bias_ids + listed, biases + listed, num_biases, first, end, lane, block)
        if has_penalty:
            tl.debug_barrier()
            history, own_carried = token_ids + slot * max_seq_len, carried + row * max_seq_len
            own_counts = counts + row * vocab_size
            _penalize(changed, own_counts, own_carried, history, own, position, first, end, lane, block)
        tl.debug_barrier()
        _ban(changed, banned_ids + listed, first_banned, num_banned, first, end, lane, block)
        tl.debug_barrier()
        largest, at_largest = _largest(changed, first, end, lane, block)
        part_largest = tl.max(largest, 0)
    tl.store(floats + 2 * column + place, part_largest)
    # Equal logits go by id. A part of -inf only gives its first token.
    tl.store(ids + place, tl.min(tl.where(largest == part_largest, at_largest, vocab_size), 0))

    if columns.is_sampled(own):
        best, second, at_best = part_largest * 0 + LOWEST, part_largest * 0 + LOWEST, first
        if is_short(tl.load(own + columns.TOP_K), vocab_size):
            per_part: tl.constexpr = num_groups // num_parts
            if per_part == block:
                maxima = largest
            else:
                maxima = tl.max(tl.reshape(largest, (per_part, block // per_part)), 1)
            tl.store(groups + row * num_groups + part * per_part + tl.arange(0, per_part), maxima)
        else:
            row_state = gumbel.row_state_of(tl.load(seeds + slot), position.to(tl.int64))
            source = raw
            if is_adjusted:
                source = changed
            scale = (1.0 / tl.load(own + columns.TEMPERATURE)).to(tl.float32)
            best, second, at_best = _best_scores(source, scale, row_state, first, end, lane, vocab_size, block)
        tl.store(floats + 3 * column + place, best)
        tl.store(floats + 4 * column + place, second)
        tl.store(ids + column + place, at_best)


@triton.jit
def _survey_raw(raw, changed, is_adjusted, first, end, lane, block: tl.constexpr):
    """Per lane the largest logit, its token and the sum of exp over the largest's; copies the logits to be adjusted."""
    largest = tl.full((block,), LOWEST, tl.float32)
    at_largest = first + lane
    total = tl.zeros((block,), tl.float32)
    for start in range(first, end, block):
        token = start + lane
        values = tl.load(raw + token, mask=token < end, other=-float("inf"))
        if is_adjusted:
            tl.store(changed + token, values, mask=token < end)
        new_largest = tl.maximum(largest, values)
        total = total * tl.exp(largest - new_largest) + tl.exp(values - new_largest)
        at_largest = tl.where(values > largest, token, at_largest)
        largest = new_largest
    return largest, at_largest, total


@triton.jit
def _largest(source, first, end, lane, block: tl.constexpr):
    """Per lane the largest logit and its token."""
    largest = tl.full((block,), LOWEST, tl.float32)
    at_largest = first + lane
    for start in range(first, end, block):
        token = start + lane
        values = tl.load(source + token, mask=token < end, other=-float("inf"))
        at_largest = tl.where(values > largest, token, at_largest)
        largest = tl.maximum(largest, values)
    return largest, at_largest


@triton.jit
def _best_scores(source, scale, row_state, first, end, lane, vocab_size: tl.constexpr, block: tl.constexpr):
    """The part's best and second best score in fp32, and the best one's token."""
    scores = tl.full((block,), LOWEST, tl.float32)
    seconds = tl.full((block,), LOWEST, tl.float32)
    winners = first + lane
    for start in range(first, end, block):
        token = start + lane
        values = tl.load(source + token, mask=token < end, other=-float("inf"))
        score = values * scale + gumbel.rough_gumbel(gumbel.noise_bits(row_state, token))
        winners = tl.where(score > scores, token, winners)
        seconds = tl.maximum(seconds, tl.minimum(score, scores))
        scores = tl.maximum(scores, score)
    best = tl.max(scores, 0)
    at_best = tl.min(tl.where(scores == best, winners, vocab_size), 0)
    return best, tl.max(tl.where(winners == at_best, seconds, scores), 0), at_best


@triton.jit
def _add_biases(values, bias_ids, biases, num_biases, first, end, lane, block: tl.constexpr):
    for start in range(0, num_biases, block):
        is_listed = start + lane < num_biases
        token = tl.load(bias_ids + start + lane, mask=is_listed, other=-1)
        is_own = (token >= first) & (token < end)
        bias = tl.load(biases + start + lane, mask=is_own, other=0.0)
        tl.store(values + token, tl.load(values + token, mask=is_own, other=0.0) + bias, mask=is_own)


@triton.jit
def _ban(values, banned_ids, first_banned, num_banned, first, end, lane, block: tl.constexpr):
    for start in range(first_banned, num_banned, block):
        is_listed = start + lane < num_banned
        token = tl.load(banned_ids + start + lane, mask=is_listed, other=-1)
        tl.store(values + token, -float("inf"), mask=(token >= first) & (token < end))


@triton.jit
def _penalize(values, counts, carried, history, own, position, first, end, lane, block: tl.constexpr):
    """Penalties of one part, [first, end), of a row: executor.penalties.penalize, in the same fp32 arithmetic.

    The counts of the history's tokens in the output take these tokens' places among the values (counts and values are
    the same memory). Meanwhile the values are carried by the history's places. A token that the history has several
    times is counted, computed and written several times, with the same result.
    """
    prompt_len = tl.load(own + columns.PROMPT_LEN).to(tl.int32)
    repetition = tl.load(own + columns.REPETITION_PENALTY).to(tl.float32)
    presence = tl.load(own + columns.PRESENCE_PENALTY).to(tl.float32)
    frequency = tl.load(own + columns.FREQUENCY_PENALTY).to(tl.float32)
    output_presence = tl.load(own + columns.OUTPUT_PRESENCE_PENALTY).to(tl.float32)
    for start in range(0, position, block):
        token, is_own = _past_tokens(history, start + lane, position, first, end)
        tl.store(carried + start + lane, tl.load(values + token, mask=is_own, other=0.0), mask=is_own)
    tl.debug_barrier()
    for start in range(0, position, block):
        token, is_own = _past_tokens(history, start + lane, position, first, end)
        tl.store(counts + token, 0, mask=is_own)
    tl.debug_barrier()
    for start in range(prompt_len, position, block):
        token, is_own = _past_tokens(history, start + lane, position, first, end)
        tl.atomic_add(counts + token, 1, mask=is_own, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, position, block):
        token, is_own = _past_tokens(history, start + lane, position, first, end)
        # Atomics count in L2: a line of L1 may be older.
        count = tl.load(counts + token, mask=is_own, other=0, cache_modifier=".cg").to(tl.float32)
        value = tl.load(carried + start + lane, mask=is_own, other=0.0)
        value = tl.where(value < 0, value * repetition, tl.div_rn(value, repetition)) - presence
        value -= count * frequency + tl.where(count > 0, output_presence, 0.0)
        tl.store(carried + start + lane, value, mask=is_own)
    tl.debug_barrier()
    for start in range(0, position, block):
        token, is_own = _past_tokens(history, start + lane, position, first, end)
        tl.store(values + token, tl.load(carried + start + lane, mask=is_own, other=0.0), mask=is_own)


@triton.jit
def _past_tokens(history, place, position, first, end):
    """The tokens at these places, and which of them are before the position and in [first, end)."""
    token = tl.load(history + place, mask=place < position, other=-1).to(tl.int32)
    return token, (token >= first) & (token < end)
