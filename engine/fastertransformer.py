"""Drives FasterTransformer's torch op, `torch.classes.FasterTransformer.ParallelGptOp`: one object per rank.

Argument order, weight order and the meaning of results were read from FasterTransformer's source
(th_op/multi_gpu_gpt/ParallelGptOp.cc and examples/pytorch/gpt/utils). The op checks little and reads wrong dtypes
as they lie in memory, so everything is made exactly as it wants it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.request import SamplingParams
from engine.weights import ShardReader, layer_specs, outer_specs

if TYPE_CHECKING:
    from engine.static import Batch

# A layer's matrices among its twelve weights: those that int8_mode 1 quantizes.
_MATRICES = (2, 4, 8, 10)
_MAX_TOP_K = 1024  # FasterTransformer clips silently


class BatchResult:
    """A finished batch's tokens, one list per request (rank 0 alone has valid ones)."""

    def __init__(self, tokens: list[list[int]]) -> None:
        self._tokens = tokens

    def wait(self) -> list[list[int]]:
        return self._tokens


class FasterTransformerExecutor:
    """Holds this rank's weights, the op around them (once `prepare` is called), and executes whole batches."""

    num_ahead = 0

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        engine_config: EngineConfig,
        parallel: ParallelConfig,
        device: torch.device,
        dtype: torch.dtype,
        lib_path: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Load the library and the weights. MPI must be initialized: the op takes its rank from MPI_COMM_WORLD."""
        if engine_config.int8_mode == 1 and dtype == torch.float32:
            raise ValueError("int8_mode is 1; FasterTransformer's int8 needs data_type fp16 or bf16")
        _load_library(lib_path)
        self.config = config
        self.device = device
        self.max_seq_len = engine_config.max_seq_len or config.max_pos_seq_len
        reader = ShardReader(folder, config, parallel.tp_rank, dtype)
        int8_mode = engine_config.int8_mode
        self._weights = read_weights(reader, parallel, int8_mode, device, progress)
        self._arguments = _constructor_arguments(config, parallel, int8_mode)

    def prepare(self) -> None:
        """Make the op, which joins the ranks by NCCL; it keeps the weights."""
        shared_contexts_ratio = 1.0
        self._op = torch.classes.FasterTransformer.ParallelGptOp(
            *self._arguments, *self._weights, shared_contexts_ratio
        )
        del self._weights

    @torch.inference_mode()
    def execute(self, batch: Batch) -> BatchResult:
        """Run a batch to its end on every rank; the tokens are the op's, end_id included, cut to each request."""
        lengths = [len(prompt) for prompt in batch.prompts]
        longest = max(lengths)
        # Right-padded with a token that exists; the op looks at no more than each row's own length.
        rows = [prompt + [self.config.end_id] * (longest - len(prompt)) for prompt in batch.prompts]
        output = self._op.forward(
            torch.tensor(rows, dtype=torch.int32, device=self.device),
            torch.tensor(lengths, dtype=torch.int32, device=self.device),
            batch.num_steps,
            1,  # beam_width
            *_sampling_arguments(batch.sampling),
            None,  # bad_words_list
            0,  # return_cum_log_probs
        )
        output_ids, sequence_lengths = (tensor.cpu()[:, 0].tolist() for tensor in output[:2])
        tokens = []
        for ids, end, length, params in zip(output_ids, sequence_lengths, lengths, batch.sampling, strict=True):
            # sequence_lengths counts from the padded prompt's end; the row itself has no padding inside.
            count = min(end - longest, params.max_new_tokens)
            tokens.append(ids[length : length + count])
        return BatchResult(tokens)


def _load_library(lib_path: Path) -> None:
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

    Another stage's layers are empty tensors; so are, with int8_mode 1, the matrices that int8_weights holds.
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
        for kind, spec in enumerate(layer_specs(config, layer)):
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
    """top_k … random_seed, one value per row, on the CPU; None where the op's default is what is meant.

    A greedy row is top_k 1: the op has no temperature 0. Seeds beyond 2^63 keep their bits.
    """
    greedy = [params.is_greedy for params in sampling]
    top_k = [1 if g else min(p.top_k, _MAX_TOP_K) for p, g in zip(sampling, greedy, strict=True)]
    top_p = [0.0 if g else p.top_p for p, g in zip(sampling, greedy, strict=True)]
    temperature = [1.0 if g else p.temperature for p, g in zip(sampling, greedy, strict=True)]
    seeds = [p.random_seed - (p.random_seed >> 63 << 64) for p in sampling]
    return [
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p, dtype=torch.float32),
        None,  # beam_search_diversity_rate
        torch.tensor(temperature, dtype=torch.float32),
        None,  # len_penalty
        None,  # repetition_penalty
        None,  # presence_penalty
        None,  # min_length
        torch.tensor(seeds, dtype=torch.int64),
    ]
