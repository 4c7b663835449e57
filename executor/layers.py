"""The building blocks: norm, linear, vocabulary embedding, LM head. Weights are this rank's shards.

All collectives of a forward pass are here, except those at the stage boundary in model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from executor.collectives import Comm
from executor.matmul import Matmul
from kernels.add_norm import add_norm


class Norm:
    """LayerNorm or RMSNorm over the last axis, after adding to the residual.

    With a bias: LayerNorm, (x − mean) / √(variance + eps) · weight + bias. Without: RMSNorm, x / √(mean of x² + eps) ·
    weight.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        """weight, bias: [hidden_size]"""
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, residual: torch.Tensor, hidden: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, hidden_size] both → (residual + hidden, its norm); without hidden: (residual, its norm)."""
        return add_norm(residual, hidden, self.weight, self.bias, self.eps)


class Linear:
    """y = x · W + b: all of a replicated weight, or a column-parallel shard of one."""

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None) -> None:
        """bias: [out]"""
        self.matmul = matmul
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]"""
        return self.matmul(x, self.bias)


class RowParallelLinear(Linear):
    """A linear that holds a part of W's rows and gets the same part of x's columns; the tp group sums the products.

    Only the group's first rank keeps the bias, so the sum has it once.
    """

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None, comm: Comm) -> None:
        super().__init__(matmul, bias if comm.parallel.tp_rank == 0 else None)
        self.comm = comm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in / tp] → [rows, out], the whole sum on every rank."""
        return self.comm.all_reduce(super().__call__(x))


class VocabEmbedding:
    """Token embedding, the vocabulary split over the tp group: each rank looks up its own ids, the group adds up."""

    def __init__(self, rows: torch.Tensor, first_id: int, comm: Comm) -> None:
        self.rows = rows  # [vocab_local, hidden]
        self.first_id = first_id
        self.comm = comm

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] → [tokens, hidden]"""
        if self.comm.parallel.tp == 1:
            return F.embedding(token_ids, self.rows)
        local_ids = token_ids - self.first_id
        is_here = (local_ids >= 0) & (local_ids < self.rows.shape[0])
        embedded = F.embedding(local_ids.where(is_here, 0), self.rows) * is_here[:, None]
        return self.comm.all_reduce(embedded)


class LMHead:
    """Hidden states → logits of the whole vocabulary, in fp32, on every rank of the tp group."""

    def __init__(self, matmul: Matmul, vocab_size: int, comm: Comm) -> None:
        """matmul: of this rank's part of the vocabulary, [hidden_size, vocab_local]."""
        self.linear = Linear(matmul, None)
        self.vocab_size = vocab_size
        self.comm = comm

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, hidden_size] → [rows, vocab]. Drops the padding at the end of an unevenly split vocabulary."""
        logits = self.comm.all_gather_last(self.linear(hidden))[:, : self.vocab_size]
        return logits.float() if out is None else out.copy_(logits)
