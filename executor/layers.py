"""The building blocks: norm, linear, vocabulary embedding, LM head. Weights are this rank's shards.

All collectives of a forward pass are here, except those at the stage boundary in model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from executor.collectives import Comm
from executor.matmul import Matmul
from kernels.add_norm import add_norm
from kernels.embed import embed


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
    """y = activation(x · W + b): all of a replicated weight, or a column-parallel shard of one."""

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None, activation: str = "none") -> None:
        """bias: [out]; activation: a name of kernels.activation."""
        self.matmul = matmul
        self.bias = bias
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, out]; swiglu halves it."""
        return self.matmul(x, self.bias, self.activation)


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
    """Token embedding, the vocabulary split over the tp group: each rank looks up its own ids, the group adds up.

    Position embeddings, which every rank has, are added after that.
    """

    def __init__(self, rows: torch.Tensor, position_rows: torch.Tensor | None, first_id: int, comm: Comm) -> None:
        self.rows = rows  # [vocab_local, hidden]
        self.position_rows = position_rows  # [max_pos_seq_len, hidden]
        self.first_id = first_id
        self.comm = comm

    def __call__(self, token_ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embeds token_ids[slots, positions]: [slots, max_seq_len], [tokens], [tokens] → [tokens, hidden]"""
        if self.comm.parallel.tp == 1:
            return embed(token_ids, slots, positions, self.rows, self.position_rows)
        local_ids = token_ids[slots, positions] - self.first_id
        is_here = (local_ids >= 0) & (local_ids < self.rows.shape[0])
        embedded = self.comm.all_reduce(F.embedding(local_ids.where(is_here, 0), self.rows) * is_here[:, None])
        return embedded if self.position_rows is None else embedded + F.embedding(positions, self.position_rows)


class LMHead:
    """Hidden states → logits of the whole vocabulary, in fp32, on every rank of the tp group."""

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None, vocab_size: int, comm: Comm) -> None:
        """matmul, bias: of this rank's part of the vocabulary, [hidden_size, vocab_local] and [vocab_local]."""
        self.matmul = matmul
        self.bias = bias
        self.vocab_size = vocab_size
        self.comm = comm

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, hidden_size] → [rows, vocab], in `out` if given.

        Drops the padding at the end of an unevenly split vocabulary.
        """
        if self.comm.parallel.tp == 1:
            if out is None:
                out = torch.empty(len(hidden), self.vocab_size, dtype=torch.float32, device=hidden.device)
            return self.matmul(hidden, self.bias, out=out)
        logits = self.comm.all_gather_last(self.matmul(hidden, self.bias))[:, : self.vocab_size]
        return logits.float() if out is None else out.copy_(logits)
