"""Drives FasterTransformer's torch op, `torch.classes.FasterTransformer.ParallelGptOp`: one object per rank.

Owns the call of the op, not the requests behind its rows nor the end of a text (engine.static). Argument order, weight
order and the meaning of results come from FasterTransformer's source (th_op/multi_gpu_gpt/ParallelGptOp.cc and
examples/pytorch/gpt/utils). The op checks little and misreads wrong dtypes, so everything is made exactly as it
expects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.config import EngineConfig, ParallelConfig
from engine.request import Output, SamplingParams
from weights.model_config import ModelConfig
from weights.reader import ShardReader
from weights.table import layer_specs, outer_specs

if TYPE_CHECKING:
    from engine.static import Batch, RequestRow
    from executor.startup import Backend

# A layer's matrices among its twelve weights: those that int8_mode 1 quantizes.
_MATRICES = (2, 4, 8, 10)
_CUM_LOG_PROBS = 1  # return_cum_log_probs: of the generated tokens


class BatchResult:
    """A finished batch: per row its sequence, or its beams, best first (rank 0 alone has valid ones)."""

    def __init__(self, rows: list[list[Output]]) -> None:
        self._rows = rows

    def wait(self) -> list[list[Output]]:
        return self._rows


class FasterTransformerExecutor:
    """Holds this rank's weights, the op around them (once `prepare` is called), and executes whole batches."""

    num_ahead = 0
    num_stages = 1  # of several, all compute a batch to its end
    num_blocks = 0
    max_step_tokens = max_mixed_tokens = max_draft_rows = 0

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        engine_config: EngineConfig,
        parallel: ParallelConfig,
        backend: Backend,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Load the library and the weights. MPI must be initialized: the op takes its rank from MPI_COMM_WORLD."""
        int8_mode = int(engine_config.weight_format == "int8")
        if int8_mode and backend.dtype == torch.float32:
            raise ValueError("quantization is int8; FasterTransformer's int8 needs data_type fp16 or bf16")
        load_library(backend.lib_path)
        self.config = config
        self.device = backend.device
        self.max_seq_len = engine_config.max_seq_len or config.max_pos_seq_len
        reader = ShardReader(folder, config, parallel.tp_rank, backend.dtype)
        self._weights = read_weights(reader, parallel, int8_mode, backend.device, progress)
        self._arguments = _constructor_arguments(config, parallel, int8_mode)

    def prepare(self) -> None:
        """Make the op, which joins the ranks by NCCL; it keeps the weights."""
        shared_contexts_ratio = 1.0
        self._op = torch.classes.FasterTransformer.ParallelGptOp(
            *self._arguments, *self._weights, shared_contexts_ratio
        )
        del self._weights

    def close(self) -> None:
        """Nothing to free: the op leaves its groups when the process ends."""

    @torch.inference_mode()
    def execute(self, batch: Batch) -> BatchResult:
        """Run a batch to its end on every rank; each sequence has num_steps tokens, end_id repeated at its end."""
        arguments = _sampling_arguments([row.sampling for row in batch.rows])
        bad_words = _bad_words(batch.rows)
        lengths = [len(row.prompt_ids) for row in batch.rows]
        width = self._padded_len(batch, max(lengths))
        # Right-padded with a token that exists; the op attends to no more than each row's own length.
        rows = [row.prompt_ids + [self.config.end_id] * (width - len(row.prompt_ids)) for row in batch.rows]
        # Where a sequence ends shows in its tokens; the op's count of them is unsafe for beams, whose threads race for
        # it (update_kernel, gatherTree).
        output_ids, _, log_probs = self._op.forward(
            torch.tensor(rows, dtype=torch.int32, device=self.device),
            torch.tensor(lengths, dtype=torch.int32, device=self.device),
            batch.num_steps,
            batch.beam_width,
            *arguments,
            bad_words if bad_words is None else bad_words.to(self.device),
            _CUM_LOG_PROBS,
        )
        return BatchResult(
            [
                # The generated tokens follow the prompt: the op takes the padding out.
                [Output(ids[length : length + batch.num_steps], cum_log_prob=p) for ids, p in zip(*row, strict=True)]
                for length, *row in zip(lengths, output_ids.cpu().tolist(), log_probs.cpu().tolist(), strict=True)
            ]
        )

    def _padded_len(self, batch: Batch, longest: int) -> int:
        """The longest prompt's; 2 where the op, seeing one token only, would forget a penalty (BaseSamplingLayer)."""
        if batch.beam_width == 1 and any(row.sampling.has_penalty for row in batch.rows):
            return max(longest, min(2, self.max_seq_len - batch.num_steps))
        return longest


def load_library(lib_path: Path) -> None:
    """Load FasterTransformer's library into torch. Raises RuntimeError where it cannot be loaded."""
    try:
        torch.classes.load_library(str(lib_path))
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"lib_path is {lib_path}, which torch cannot load: {' '.join(str(error).split())}") from None


def read_weights(
    reader: ShardReader,
    parallel: ParallelConfig,
    int8_mode: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """(weights, int8_weights, scales) in the op's order: kind by kind, each over all layers, then the outer ones.

    Other stages' layers are empty tensors. With int8_mode 1, so are the matrices in int8_weights.
    """
    config, dtype = reader.config, reader.dtype
    empty = torch.empty(0, dtype=dtype, device=device)
    num_layer = config.num_layer
    weights = [empty] * (12 * num_layer)
    num_int8 = 4 * num_layer if int8_mode else 0
    int8_weights = [torch.empty(0, dtype=torch.int8, device=device)] * num_int8
    scales = [torch.empty(0, dtype=dtype, device=device)] * num_int8
    own_layers = parallel.layers(num_layer)
    for layer in own_layers:
        specs = layer_specs(config, layer)
        assert len(specs) == 12, specs  # startup refuses models without all biases
        for kind, spec in enumerate(specs):
            tensor = reader.read(spec)
            if spec.name.endswith(("query_key_value.weight", "query_key_value.bias")):
                tensor = tensor.flatten(-2)  # [h, 3, h/t] as one matrix, which the quantizer needs
            if int8_mode and kind in _MATRICES:
                place = _MATRICES.index(kind) * num_layer + layer
                quantized, scale = quantize(tensor)
                int8_weights[place], scales[place] = quantized.to(device), scale.to(device)
            else:
                weights[kind * num_layer + layer] = tensor.to(device)
        progress(layer - own_layers.start + 1, len(own_layers) + 1)
    by_name = {}
    for spec in outer_specs(config):
        if reader.has(spec):
            by_name[spec.name] = reader.read(spec).to(device)
        elif spec.name == "lm_head.weight":
            by_name[spec.name] = by_name["wte"]
        else:
            reader.read(spec)  # raises for the missing file
    progress(len(own_layers) + 1, len(own_layers) + 1)
    return weights + list(by_name.values()) + [empty] * num_layer, int8_weights, scales


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's per-column symmetric int8 of a matrix on the CPU: (int8 in its own layout, scales)."""
    operation = torch.ops.fastertransformer.symmetric_quantize_last_axis_of_batched_matrix
    quantized, scale = operation(matrix.contiguous(), torch.int8)
    return quantized, scale


def _constructor_arguments(config: ModelConfig, parallel: ParallelConfig, int8_mode: int) -> list[Any]:
    """The op's arguments before its weights."""
    return [
        config.head_num,
        config.size_per_head,
        config.inter_size,
        config.num_layer,
        0,  # expert_num
        0,  # moe_k
        [],  # moe_layer_index
        config.vocab_size,
        config.start_id,
        config.end_id,
        parallel.tp,
        parallel.pp,
        int8_mode,
        config.layernorm_eps,
        config.layernorm_type,
        config.activation_type,
        config.has_positional_encoding,
        config.has_pre_decoder_layernorm,
        config.has_post_decoder_layernorm,
        config.has_adapters,
        config.adapter_inter_size,
        config.use_attention_linear_bias,
    ]


def _sampling_arguments(sampling: Sequence[SamplingParams]) -> list[torch.Tensor | None]:
    """top_k … random_seed, one value per row, on the CPU; None where all rows mean the op's default.

    A greedy row is top_k 1: the op has no temperature 0. It keeps its temperature only where that tells, with a
    presence penalty, so that its log-probabilities are the model's own. Seeds beyond 2^63 keep their bits.
    """
    is_beam = sampling[0].beam_width > 1
    greedy = [params.is_greedy and not is_beam for params in sampling]
    top_k = [1 if g else p.top_k for p, g in zip(sampling, greedy, strict=True)]
    top_p = [0.0 if g else p.top_p for p, g in zip(sampling, greedy, strict=True)]
    temperature = [
        1.0 if g and p.presence_penalty == 0 else p.temperature or 1.0 for p, g in zip(sampling, greedy, strict=True)
    ]
    seeds = [p.random_seed - (p.random_seed >> 63 << 64) for p in sampling]
    repetition = _column([p.repetition_penalty for p in sampling], torch.float32, 1.0)
    presence = _column([p.presence_penalty for p in sampling], torch.float32, 0.0)
    assert repetition is None or presence is None, "the op takes one of the two penalties"
    return [
        None if is_beam else _column(top_k, torch.int32),
        None if is_beam else _column(top_p, torch.float32),
        _column([p.beam_search_diversity_rate for p in sampling], torch.float32, 0.0) if is_beam else None,
        _column(temperature, torch.float32, 1.0),
        _column([p.len_penalty for p in sampling], torch.float32, None) if is_beam else None,
        repetition,
        presence,
        _column([min(p.min_length, p.max_new_tokens) for p in sampling], torch.int32, 0),
        None if is_beam else _column(seeds, torch.int64),
    ]


def _column(values: Sequence[Any], dtype: torch.dtype, *default: Any) -> torch.Tensor | None:
    """One value per row, or None where there is a default and all values are that."""
    if default and all(value == default[0] for value in values):
        return None
    return torch.tensor(values, dtype=dtype)


def _bad_words(rows: Sequence[RequestRow]) -> torch.Tensor | None:
    """[rows, 2, len] int32: the words' tokens, one word behind the other, then where each ends, padded with -1."""
    tokens = [[token_id for word in row.bad_word_ids for token_id in word] for row in rows]
    ends = [list(accumulate(map(len, row.bad_word_ids))) for row in rows]
    width = max(map(len, tokens))
    if width == 0:
        return None
    padded = [
        [ids + [0] * (width - len(ids)), e + [-1] * (width - len(e))] for ids, e in zip(tokens, ends, strict=True)
    ]
    return torch.tensor(padded, dtype=torch.int32)
