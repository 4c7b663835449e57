"""The building blocks: normalizations, linear, vocabulary embedding, LM head. Weights are this rank's shards.

The collectives of a forward pass are here (and at the stage boundary in model.py), nowhere else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from executor.collectives import Comm
from executor.quantization import Int8Matrix, product
from kernels.add_norm import add_norm

# Rows for which oneDNN chooses the packed layout. Measured at 1 to 128 rows, 64 is within noise of the best.
_PACK_ROWS = 64


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN's packed weights are to be had: on a CPU 1.3 to 3 times the speed of a plain product."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Norm:
    """LayerNorm, (x − mean) / √(variance + eps) · weight + bias, or, without a bias, RMSNorm, x / √(mean of x² + eps)
    · weight, over the last axis; weight and bias are [hidden]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, hidden] both → (x + delta, its norm)"""
        return add_norm(x, delta, self.weight, self.bias, self.eps)


class Linear:
    """y = x · W + b with W [in, out]: all of a replicated weight, or a column-parallel shard of one.

    An int8 weight has a product of its own; `is_packed` means the others.
    """

    def __init__(self, weight: torch.Tensor | Int8Matrix, bias: torch.Tensor | None, is_packed: bool) -> None:
        self.bias = bias
        self.is_packed = is_packed
        self.product = None
        if isinstance(weight, Int8Matrix):
            self.product = product(weight)
            return
        out_in = weight.t()  # [out, in], as torch and oneDNN take it
        if is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(out_in.contiguous(), _PACK_ROWS)
        else:
            self.weight = out_in

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is not None:
            return self.product(x, self.bias)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(Linear):
    """A linear whose input is split over the tp group: partial products are summed over it.

    Rank 0 of the group alone holds the bias, so the sum has it once.
    """

    def __init__(
        self, weight: torch.Tensor | Int8Matrix, bias: torch.Tensor | None, is_packed: bool, comm: Comm
    ) -> None:
        super().__init__(weight, bias if comm.parallel.tp_rank == 0 else None, is_packed)
        self.comm = comm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.comm.all_reduce(super().__call__(x))


class VocabEmbedding:
    """Token embedding, vocabulary split over the tp group: each rank looks up what it has, the sum is all."""

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

    def __init__(self, rows: torch.Tensor, vocab_size: int, is_packed: bool, comm: Comm) -> None:
        self.linear = Linear(rows.t(), None, is_packed)
        self.vocab_size = vocab_size
        self.comm = comm

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, hidden] → [rows, vocab]; the padding of an unevenly split vocabulary is at the end, cut."""
        logits = self.comm.all_gather_last(self.linear(hidden))[:, : self.vocab_size]
        return logits.float() if out is None else out.copy_(logits)
