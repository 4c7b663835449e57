"""The second kernel of choose_tokens: each row's token, from the parts' results.

min-p, top-k and top-p each keep a prefix of the tokens in order of their logits, equal ones by id. A bound (key, id) is
the last token of a prefix. The token is the one with the best score in the shortest prefix. So nothing is sorted: a
token is the answer if it has the best score within the bound of min-p and top-k, and if the mass before it is below
top_p. If it is not, it becomes the bound, itself excluded, and the best score within it is looked for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import gumbel
from kernels import slot_parameters as columns
from kernels.survey_logits import LOWEST, is_short

_NO_KEY = tl.constexpr(-(2**31))
_KEY_OF_MINUS_INF = tl.constexpr(-0x7F800001)
# Of a sum of fp32 exponentials, relative to the sum over the row: 20 times what rounding can do, for logits within
# exp(-30) of the largest; smaller ones add nothing. Within it fp64 decides.
_MASS_ERROR = tl.constexpr(1e-4)


@triton.jit
def pick(
    logits,  # [rows, vocab_size] fp32
    adjusted,  # as survey left it, and everything else down to groups
    floats,
    ids,
    groups,
    short_lists,  # [rows, num_groups] int32: the tokens that a row with a short top_k looks at
    values,  # [2, rows] fp64: the tokens, their log-probabilities
    row_slots,
    row_positions,
    token_ids,  # gets the token at its position, without has_positions
    positions,  # gets the token's position, likewise
    advance,
    parameters,
    seeds,
    max_seq_len,
    column,
    num_parts,
    has_positions: tl.constexpr,
    vocab_size: tl.constexpr,
    most_parts: tl.constexpr,
    num_groups: tl.constexpr,
    block: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    # Nothing above reads memory: what an earlier kernel wrote is read from here on.
    slot = tl.load(row_slots + row)
    own = parameters + slot * columns.NUM_PARAMETERS
    position = columns.position_of(row, slot, row_positions, positions, advance, has_positions)
    part = tl.arange(0, most_parts)
    is_part = part < num_parts
    part += row.to(tl.int32) * most_parts
    raw_largest = tl.load(floats + part, mask=is_part, other=LOWEST)
    sums = tl.load(floats + column + part, mask=is_part, other=0.0)
    maxima = tl.load(floats + 2 * column + part, mask=is_part, other=LOWEST)
    at_largest = tl.load(ids + part, mask=is_part, other=vocab_size)
    raw_max = tl.max(raw_largest, 0)
    logsumexp = raw_max + tl.log(tl.sum(sums * tl.exp(raw_largest - raw_max), 0))
    largest = tl.max(maxima, 0)
    chosen = tl.min(tl.where(maxima == largest, at_largest, vocab_size), 0)
    raw = logits + row * vocab_size

    if columns.is_sampled(own) & (largest > LOWEST):
        source = raw
        if columns.is_adjusted(own, position):
            source = adjusted + row * vocab_size
        temperature = tl.load(own + columns.TEMPERATURE)
        top_k = tl.load(own + columns.TOP_K)
        top_p = _current_top_p(own, token_ids + slot * max_seq_len, position, block)
        row_state = gumbel.row_state_of(tl.load(seeds + slot), position.to(tl.int64))
        short_list = short_lists + row * num_groups
        num_items = chosen * 0 + vocab_size
        is_listed = num_items == 0
        key, last = chosen * 0 + _NO_KEY, num_items
        if (top_k > 0) & (top_k < vocab_size):
            lowest = (chosen * 0 + _KEY_OF_MINUS_INF).to(tl.int64)
            k = top_k.to(tl.int32)
            if is_short(top_k, vocab_size):
                lowest = _bound_of_top_k(groups + row * num_groups, k, num_groups)
                num_found = _list_from(source, short_list, lowest.to(tl.int32), vocab_size, num_groups, block)
                is_listed = num_found <= num_groups
                num_items = tl.where(is_listed, num_found, vocab_size)
                tl.debug_barrier()  # the list is there
            items = source, short_list, is_listed, num_items
            key, last = _last_of_top_k(items, k, lowest, _key(largest).to(tl.int64) + 1, vocab_size, block)
        items = source, short_list, is_listed, num_items
        key, last = _bound_of_min_p(own, largest, temperature, key, last, vocab_size)

        # The survey's best token, unless another's score is too near to its, or the bound excludes it.
        bests = tl.load(floats + 3 * column + part, mask=is_part, other=LOWEST)
        winners = tl.load(ids + column + part, mask=is_part, other=vocab_size)
        seconds = tl.load(floats + 4 * column + part, mask=is_part, other=LOWEST)
        best = tl.max(bests, 0)
        winner = tl.min(tl.where(bests == best, winners, vocab_size), 0)
        second = tl.max(tl.where(winners == winner, seconds, bests), 0)
        winner_key = _key(tl.load(source + winner))
        is_known = (best > LOWEST) & _is_within(winner_key, winner, key, last)
        floor = tl.where(is_known, best - 2 * _score_error(best), -float("inf"))
        is_known = is_known & (second < floor)
        if is_known:
            chosen = winner

        bound_key, bound_last = key, last
        is_open = chosen >= 0
        while is_open:
            if is_known == 0:
                if is_listed:  # short: fp64 of fewer tokens at once
                    winner = _best(items, key, last, floor, row_state, temperature, vocab_size, num_groups)
                else:
                    winner = _best(items, key, last, floor, row_state, temperature, vocab_size, block)
                chosen = tl.where(winner < vocab_size, winner, chosen)
            is_open = is_open & (top_p < 1.0)
            if is_open:
                key, last = _key(tl.load(source + chosen)), chosen - 1
                is_open = _is_beyond(items, bound_key, bound_last, key, last, largest, temperature, top_p, block)
            is_known = chosen < 0
            floor = tl.full((), -float("inf"), tl.float32)

    log_prob = tl.load(raw + chosen) - logsumexp
    tl.store(values + row, chosen.to(tl.float64))
    tl.store(values + tl.num_programs(0) + row, log_prob.to(tl.float64))
    if not has_positions:
        tl.store(token_ids + slot * max_seq_len + position, chosen.to(tl.int64))
        tl.store(positions + slot, position.to(tl.int64))


@triton.jit
def _bound_of_min_p(own, largest, temperature, key, last, vocab_size: tl.constexpr):
    """The bound (key, last), or min_p's where it is nearer."""
    min_p = tl.load(own + columns.MIN_P)
    if min_p > 0:
        least = largest.to(tl.float64) + temperature * tl.log(min_p)
        rounded = least.to(tl.float32)
        min_key = _key(rounded)
        min_last = tl.where(rounded.to(tl.float64) >= least, vocab_size, -1)  # -1: rounded itself is too small
        is_nearer = (min_key > key) | ((min_key == key) & (min_last < last))
        last = tl.where(is_nearer, min_last, last)
        key = tl.where(is_nearer, min_key, key)
    return key, last


@triton.jit
def _is_beyond(items, bound_key, bound_last, key, last, largest, temperature, top_p, block: tl.constexpr):
    """Whether top_p excludes the token that follows (key, last): the mass up to there reaches top_p of the bound's."""
    total, before = _masses(items, bound_key, bound_last, key, last, largest, temperature, tl.float32, block)
    is_beyond = (before > 0) & (before >= top_p * total)
    if (before > 0) & (tl.abs(before - top_p * total) <= _MASS_ERROR * total):
        total, before = _masses(items, bound_key, bound_last, key, last, largest, temperature, tl.float64, block)
        is_beyond = (before > 0) & (before >= top_p * total)
    return is_beyond


@triton.jit
def _current_top_p(own, history, position, block: tl.constexpr):
    """top_p after its decay, fp64; 1 where it cuts nothing: executor.penalties.current_top_p."""
    first_top_p, decay = tl.load(own + columns.TOP_P), tl.load(own + columns.TOP_P_DECAY)
    top_p = tl.where(first_top_p == 0, 1.0, first_top_p)
    if (decay < 1) & (first_top_p > 0):
        since = tl.load(own + columns.PROMPT_LEN).to(tl.int32)
        reset_id = tl.load(own + columns.TOP_P_RESET_ID).to(tl.int64)
        latest = tl.zeros((block,), tl.int32) + since
        for start in range(since, position, block):
            place = start + tl.arange(0, block)
            is_reset = tl.load(history + place, mask=place < position, other=-1) == reset_id
            latest = tl.where(is_reset & (place < position), place + 1, latest)
        num_steps = position - tl.max(latest, 0)
        if num_steps > 0:
            top_p = tl.maximum(top_p * tl.exp(num_steps * tl.log(decay)), tl.load(own + columns.TOP_P_MIN))
    return top_p


@triton.jit
def _key(values):
    """int32 in the order of fp32 values; -0 is 0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _is_within(keys, tokens, key, last):
    return (keys > key) | ((keys == key) & (tokens <= last))


@triton.jit
def _load(items, start, block: tl.constexpr):
    """Some of a row's items, (source, short_list, is_listed, num_items): tokens, their values, which of them exist."""
    source, short_list, is_listed, num_items = items
    token = start + tl.arange(0, block)
    is_item = token < num_items
    if is_listed:
        token = tl.load(short_list + token, mask=is_item, other=0)
    return token, tl.load(source + token, mask=is_item, other=-float("inf")), is_item


@triton.jit
def _count(items, key, last, block: tl.constexpr):
    """How many items are within the bound."""
    counts = tl.zeros((block,), tl.int32)
    for start in range(0, items[3], block):
        token, value, is_item = _load(items, start, block)
        counts += (_is_within(_key(value), token, key, last) & is_item).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _masses(items, key, last, own_key, own_last, largest, temperature, dtype: tl.constexpr, block: tl.constexpr):
    """Sums of exp(logit / temperature), over the largest's, fp64: within a bound, and within a nearer one too."""
    totals, befores = tl.zeros((block,), dtype), tl.zeros((block,), dtype)
    scale = (1.0 / temperature).to(dtype)
    for start in range(0, items[3], block):
        token, value, is_item = _load(items, start, block)
        keys = _key(value)
        if dtype == tl.float64:
            mass = tl.exp((value.to(tl.float64) - largest) / temperature)
        else:
            mass = tl.exp((value - largest) * scale)
        mass = tl.where(is_item & _is_within(keys, token, key, last), mass, 0.0)
        totals += mass
        befores += tl.where(_is_within(keys, token, own_key, own_last), mass, 0.0)
    return tl.sum(totals, 0).to(tl.float64), tl.sum(befores, 0).to(tl.float64)


@triton.jit
def _score_error(score):
    """How far a score in fp32, near `score`, may be from the one in fp64: the noise's error and the logit's, doubled.

    The noise is between -4 and 38, so the logit over the temperature, that is rounded, is not larger than |score| + 38.
    """
    return 5e-4 + (tl.abs(score) + 40.0) * 4.8e-7


@triton.jit
def _best(items, key, last, floor, row_state, temperature, vocab_size: tl.constexpr, block: tl.constexpr):
    """The token with the best score within the bound, fp64, or vocab_size if every score is -inf.

    fp64 is slow. A block computes in it only if a score in fp32 reaches `floor` and the best score so far.
    """
    best = temperature * 0 - float("inf")
    at_best = last * 0 + vocab_size
    scale = (1.0 / temperature).to(tl.float32)
    for start in range(0, items[3], block):
        token, value, is_item = _load(items, start, block)
        is_item = is_item & _is_within(_key(value), token, key, last)
        bits = gumbel.noise_bits(row_state, token)
        rough = tl.max(tl.where(is_item, value * scale + gumbel.rough_gumbel(bits), -float("inf")), 0)
        if (rough >= floor) & (rough + _score_error(rough) >= best):
            scores = value.to(tl.float64) / temperature + gumbel.exact_gumbel(bits)
            scores = tl.where(is_item, scores, -float("inf"))
            block_best = tl.max(scores, 0)
            if block_best > best:
                at_best = tl.min(tl.where(scores == block_best, token, vocab_size), 0)
                best = block_best
    return at_best


@triton.jit
def _bound_of_top_k(groups, k, num_groups: tl.constexpr):
    """A key, int64, that at least k tokens of a row reach: the k-th largest of its groups' maxima, or a lower one."""
    keys = _key(tl.load(groups + tl.arange(0, num_groups)))
    low, high = tl.min(keys, 0).to(tl.int64), tl.max(keys, 0).to(tl.int64) + 1
    found = k * 0 + num_groups
    while (high - low > 1) & (found != k):
        middle = (low + high) >> 1
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0)
        is_enough = count >= k
        found = tl.where(is_enough, count, found)
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
    return low


@triton.jit
def _list_from(source, short_list, key, vocab_size: tl.constexpr, most: tl.constexpr, block: tl.constexpr):
    """List the tokens from the key on, at most `most`, in order. Returns how many there are."""
    num_found = key * 0
    for start in range(0, vocab_size, block):
        token = start + tl.arange(0, block)
        value = tl.load(source + token, mask=token < vocab_size, other=-float("inf"))
        is_found = ((_key(value) >= key) & (token < vocab_size)).to(tl.int32)
        place = num_found + tl.cumsum(is_found, 0) - 1
        tl.store(short_list + place, token, mask=(is_found > 0) & (place < most))
        num_found += tl.sum(is_found, 0)
    return num_found


@triton.jit
def _last_of_top_k(items, k, low, high, vocab_size: tl.constexpr, block: tl.constexpr):
    """The bound of the first k items; at least k reach the key `low`, and none reaches `high`, both int64."""
    found = k * 0 + items[3]
    while (high - low > 1) & (found != k):
        middle = (low + high) >> 1
        count = _count(items, middle.to(tl.int32), vocab_size, block)
        is_enough = count >= k
        found = tl.where(is_enough, count, found)
        low, high = tl.where(is_enough, middle, low), tl.where(is_enough, high, middle)
    key = low.to(tl.int32)
    last, too_small = k * 0 + vocab_size, k * 0 - 1
    if found > k:  # of those that equal the last one, the first ones
        while last - too_small > 1:
            middle = (last + too_small) >> 1
            is_enough = _count(items, key, middle, block) >= k
            last, too_small = tl.where(is_enough, middle, last), tl.where(is_enough, too_small, middle)
    return key, last
