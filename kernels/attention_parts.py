"""What the kernels of decode rows' attention share: which tokens a split has, and the sums over splits. Stateless."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only torch comes without it
    triton = None


if triton is not None:

    @triton.jit
    def tokens_of_split(oldest, newest, split, window: tl.constexpr, num_splits: tl.constexpr, block: tl.constexpr):
        """(first, beyond): a split's blocks of the tokens that rows at the positions from oldest to newest see."""
        first_seen = 0
        if window:
            first_seen = tl.maximum(oldest + 1 - window, 0)
        split_len = tl.cdiv(tl.cdiv(newest + 1 - first_seen, block), num_splits) * block
        first = first_seen + split * split_len
        return first, first + split_len

    @triton.jit
    def combine_splits(
        partials,  # [lines, splits, head_dim + 2] fp32: the weighted values, the largest score, the weights' sum
        workspace,
        line,
        split,
        largest,
        weight_sum,
        sums,
        d,
        is_dim,
        num_splits: tl.constexpr,
        head_dim: tl.constexpr,
    ):
        """(is_last, weight_sum, sums): the last of a head's programs gets the sums of all its splits.

        line: the head's number among the heads of all rows. largest: a score times log2(e).
        """
        part = partials + (line * num_splits + split) * (head_dim + 2)
        tl.store(part + d, sums, mask=is_dim)
        tl.store(part + head_dim, largest)
        tl.store(part + head_dim + 1, weight_sum)
        tl.debug_barrier()  # all of the program's part is there before it counts
        is_last = tl.atomic_add(workspace + line, 1, sem="acq_rel") == num_splits - 1
        if is_last:
            lines = partials + (line * num_splits + tl.arange(0, num_splits)) * (head_dim + 2)
            maxima = tl.load(lines + head_dim, cache_modifier=".cg")
            shares = tl.exp2(maxima - tl.max(maxima, 0))  # of an empty part 0: its maximum is -inf
            weight_sum = tl.sum(shares * tl.load(lines + head_dim + 1, cache_modifier=".cg"), 0)
            parts = tl.load(lines[:, None] + d[None, :], mask=is_dim[None, :], other=0.0, cache_modifier=".cg")
            sums = tl.sum(shares[:, None] * parts, 0)
            tl.store(workspace + line, 0)
        return is_last, weight_sum, sums
