"""The building blocks: norm, linear, vocabulary embedding, LM head. Weights are this rank's shards.

All collectives of a forward pass are here, except those at the stage boundary in model.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from executor.collectives import Comm
from executor.matmul import Matmul
from kernels.add_norm import add_norm
from kernels.embed import embed
from kernels.peer_sum import peer_sum_add_norm

# Up to as many rows, each rank of a tp group gathers all logits and chooses for all rows. For more, each rank gets the
# logits of its share of the rows, which takes another collective. An estimate: 10 µs for that, against 0.15 µs of
# choosing, and 0.3 µs of transfer, for each row of 50 000 logits.
FEW_ROWS = 32


def rows_of_a_rank(rows: int, tp: int) -> int:
    """How many of a step's rows a rank of the tp group chooses for; the last ranks may have fewer, or none."""
    return rows if rows <= FEW_ROWS else -(-rows // tp)


class Norm:
    """LayerNorm or RMSNorm over the last axis, after adding the tp group's products to the residual.

    With a bias: LayerNorm, (x − mean) / √(variance + eps) · weight + bias. Without: RMSNorm, x / √(mean of x² + eps) ·
    weight.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, comm: Comm) -> None:
        """weight, bias: [hidden_size]"""
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.comm = comm

    def __call__(self, residual: torch.Tensor, addend: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, hidden_size] both → (residual + the sum of all ranks' addends, its norm).

        Without an addend: (residual, its norm). An addend may be written over.
        """
        if addend is not None:
            peers = self.comm.peers_for(addend)
            if peers is not None:
                return peer_sum_add_norm(addend, peers, residual, self.weight, self.bias, self.eps)
            addend = self.comm.all_reduce(addend)
        return add_norm(residual, addend, self.weight, self.bias, self.eps)


class Linear:
    """y = activation(x · W + b): all of a replicated weight, or a column-parallel shard of one."""

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None, activation: str = "none") -> None:
        """bias: [out]; activation: a name of kernels.activation."""
        self.matmul = matmul
        self.bias = bias
        self.activation = activation

    def __call__(self, x: torch.Tensor, input_activation: str = "none") -> torch.Tensor:
        """[rows, in] → [rows, out]; swiglu halves it. input_activation: of x first."""
        return self.matmul(x, self.bias, self.activation, input_activation=input_activation)


class RowParallelLinear(Linear):
    """A linear that holds a part of W's rows and gets the same part of x's columns: [rows, in / tp] → [rows, out].

    The result is this rank's addend of a sum over the tp group, which the next norm makes. Only the group's first rank
    keeps the bias, so the sum has it once.
    """

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None, tp_rank: int) -> None:
        super().__init__(matmul, bias if tp_rank == 0 else None)


class VocabEmbedding:
    """Token embedding, the vocabulary split over the tp group: each rank looks up its own ids, the group adds up.

    Only the group's first rank adds position embeddings, so the sum has them once.
    """

    def __init__(self, rows: torch.Tensor, position_rows: torch.Tensor | None, first_id: int, comm: Comm) -> None:
        self.rows = rows  # [vocab_local, hidden]
        self.position_rows = position_rows if comm.parallel.tp_rank == 0 else None  # [max_pos_seq_len, hidden]
        self.first_id = first_id
        self.comm = comm

    def __call__(self, token_ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embeds token_ids[slots, positions]: [slots, max_seq_len], [tokens], [tokens] → [tokens, hidden]"""
        return self.comm.all_reduce(embed(token_ids, slots, positions, self.rows, self.position_rows, self.first_id))


class LMHead:
    """Hidden states → logits, the vocabulary split over the tp group; and each row's token, chosen from whole rows."""

    def __init__(self, matmul: Matmul, bias: torch.Tensor | None, vocab_size: int, comm: Comm) -> None:
        """matmul, bias: of this rank's part of the vocabulary, [hidden_size, vocab_local] and [vocab_local]."""
        self.matmul = matmul
        self.bias = bias
        self.vocab_size = vocab_size
        self.comm = comm

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, hidden_size] → this rank's part of the logits [rows, vocab_local], in `out` if given.

        fp32 at tp 1, which has all of them; else as hidden.
        """
        if out is None and self.comm.parallel.tp == 1:
            out = torch.empty(len(hidden), self.vocab_size, dtype=torch.float32, device=hidden.device)
        return self.matmul(hidden, self.bias, out=out)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Each rank's part [rows, vocab_local] → [rows, vocab] fp32 on every rank of the tp group."""
        return self._whole(self.comm.all_gather_last(logits))

    def choose(self, logits: torch.Tensor, choose_rows: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
        """Choose each row's token: [2, rows] fp64, the same on every rank of the tp group.

        logits: this rank's part [rows, vocab_local]. choose_rows: takes the whole logits [n, vocab] fp32, contiguous,
        of the rows in a slice, and returns [2, n] fp64.
        """
        rows, tp, tp_rank = len(logits), self.comm.parallel.tp, self.comm.parallel.tp_rank
        share = rows_of_a_rank(rows, tp)
        if share == rows:
            return choose_rows(self.gather(logits), slice(0, rows))
        padding = tp * share - rows
        padded = F.pad(logits, (0, 0, 0, padding)) if padding else logits
        whole = self._whole(self.comm.all_to_all(padded))  # [share, vocab]
        first, end = (min(share * rank, rows) for rank in (tp_rank, tp_rank + 1))
        chosen = whole.new_empty(2, 0, dtype=torch.float64)
        if first < end:
            chosen = choose_rows(whole[: end - first], slice(first, end))
        return self.comm.all_gather_last(F.pad(chosen, (0, share - chosen.shape[1])))[:, :rows]

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """In fp32, without the padding at the end of an unevenly split vocabulary."""
        return logits[:, : self.vocab_size].float().contiguous()
