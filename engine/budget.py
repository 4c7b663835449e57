"""Which prompts a step computes, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence


def share_budget(remaining: Sequence[int], budget: int) -> list[int]:
    """How many tokens each prompt gets of a step's budget; remaining: their tokens to compute, oldest first.

    Half of the budget, rounded up, goes to the oldest prompts, one after another. The rest goes to the shortest ones.
    So short ones end first, long ones go on at half of the rate at least, and few prompts are cut into pieces.

    With a budget of B tokens in each step, a prompt of r tokens is computed after at most
    - ⌈(A + r) / ⌈B / 2⌉⌉ steps, where A counts the older prompts' tokens, whatever comes after it;
    - ⌈(S + r) / ⌊B / 2⌋⌉ steps if r ≤ ⌊B / 2⌋, where S counts the tokens of prompts that are not longer, also of those
      that come meanwhile. Behind any number of long prompts, this is one step for a prompt of one token.
    """
    shares = [0] * len(remaining)
    left = budget - budget // 2
    for index, count in enumerate(remaining):
        shares[index] = min(count, left)
        left -= shares[index]
        if left == 0:
            break
    left += budget // 2
    for index in sorted(range(len(remaining)), key=remaining.__getitem__):  # stable: of the same length, the older one
        more = min(remaining[index] - shares[index], left)
        shares[index] += more
        left -= more
        if left == 0:
            break
    return shares
