"""The GPT of one rank: its pipeline stage's layers, over its tensor-parallel shards.

Axis names: tokens - the rows of a step, all requests' new tokens one after another; hidden_size - of the residual;
heads_local - head_num / tp; kv_heads_local - kv_head_num / tp, at least 1; head_dim - size_per_head; inter_local -
inter_size / tp; vocab_local - the vocabulary's rows on this rank, ⌈vocab / tp⌉ (padded on the last ranks); rows -
tokens with logits to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from engine.config import ParallelConfig
from executor.attention import Attention, AttentionStep
from executor.collectives import Comm
from executor.kv_cache import KVCache, PrefillChunk
from executor.layers import Linear, LMHead, Norm, RowParallelLinear, VocabEmbedding
from executor.matmul import make_matmul
from executor.quantization import QuantizedMatrix, largest_of_columns, quantize, read_quantized
from kernels.decode_attention import DecodeMetadata
from kernels.head_norm import HeadNorms, head_norm
from kernels.layer_cache import LayerCache
from kernels.prompt_attention import PromptMetadata
from kernels.ragged_attention import RaggedRows
from weights.model_config import ModelConfig
from weights.read_ahead import FileRange
from weights.reader import ShardReader
from weights.table import WeightSpec, layer_specs, outer_specs


def check_supported(config: ModelConfig) -> None:
    """Raise ValueError with the key's name for a model that this executor does not support."""
    if config.has_adapters:
        raise ValueError("has_adapters is True; the torch engine computes False only")


def activation(config: ModelConfig) -> str:
    """The function between the MLP's linears, by its name in kernels.activation."""
    if config.activation_type == "gelu":
        return "gelu_erf" if config.gelu_form == "erf" else "gelu_tanh"
    return config.activation_type


@dataclass(frozen=True)
class StepInput:
    """One step's tensors, the same on every rank except for the device."""

    token_ids: torch.Tensor  # [slots, max_seq_len] int64: the tokens of each slot
    slots: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64, in each token's own request
    kv_locs: torch.Tensor | None  # [tokens after `decodes`] int64, where their keys and values go; None: no such tokens
    decodes: DecodeMetadata | None = None  # the first rows
    prompts: PromptMetadata | None = None  # the other rows
    # Where no kernels run:
    # By window: the first rows, if each has one token and there are several.
    ragged: Mapping[int, RaggedRows] | None = None
    chunks: Sequence[PrefillChunk] = ()  # the other rows


def read_order(reader: ShardReader, parallel: ParallelConfig) -> Iterator[FileRange]:
    """What a rank's GPT reads, in its order, for `ShardReader.read_ahead`; without the few and small weights.

    Raises ValueError at a missing file or a wrong size.
    """
    config = reader.config
    outer = {spec.name: spec for spec in outer_specs(config)}
    vocab = _vocab_local(config, parallel)
    if parallel.is_first_stage:
        yield reader.locate(outer["wte"], vocab)
    for layer in parallel.layers(config.num_layer):
        for spec in layer_specs(config, layer):
            yield reader.locate(spec)
    if parallel.is_last_stage:
        is_tied = not reader.has(outer["lm_head.weight"])
        if not (is_tied and parallel.is_first_stage):
            yield reader.locate(outer["wte" if is_tied else "lm_head.weight"], vocab)


def _vocab_local(config: ModelConfig, parallel: ParallelConfig) -> slice:
    """The tokens of this rank's part of the vocabulary; on the last ranks it may reach past the end."""
    count = -(-config.vocab_size // parallel.tp)
    return slice(parallel.tp_rank * count, (parallel.tp_rank + 1) * count)


class GPT:
    """A pipeline stage: token ids (first stage) or hidden states → hidden states; and logits (last stage)."""

    def __init__(
        self,
        comm: Comm,
        reader: ShardReader,
        device: torch.device,
        progress: Callable[[], None],
        weight_format: str = "none",
    ) -> None:
        """Read this rank's weights. Calls `progress` after each part.

        weight_format: of the layers' matrices: none (the computation's dtype), int8, fp8 or w8a8; w8a8 is the LM
        head's too.
        """
        config = reader.config
        check_supported(config)
        self.config = config
        self.comm = comm
        self.device = device
        self.dtype = reader.dtype
        self._reader = reader
        parallel = comm.parallel
        outer = {spec.name: spec for spec in outer_specs(config)}
        self.attention = Attention(config, parallel, reader.dtype, device)
        vocab = _vocab_local(config, parallel)
        self._weight_format = weight_format
        if parallel.is_first_stage:
            has_positions, has_layernorm = config.has_positional_encoding, config.has_pre_decoder_layernorm
            position_rows = self._load(outer["wpe"]) if has_positions else None  # [max_pos_seq_len, hidden]
            self.embedding = VocabEmbedding(self._vocab_rows(outer["wte"], vocab), position_rows, vocab.start, comm)
            self.pre_decoder_layernorm = self._norm(outer, "pre_decoder_layernorm") if has_layernorm else None
            progress()
        self.layers = []
        for layer in parallel.layers(config.num_layer):
            self.layers.append(self._layer(layer, weight_format))
            progress()
        if parallel.is_last_stage:
            has_layernorm = config.has_post_decoder_layernorm
            self.final_layernorm = self._norm(outer, "final_layernorm") if has_layernorm else None
            self.lm_head = self._lm_head(weight_format)
            progress()

    @staticmethod
    def num_load_steps(config: ModelConfig, comm: Comm) -> int:
        """The number of `progress` calls while this rank loads."""
        parallel = comm.parallel
        return len(parallel.layers(config.num_layer)) + parallel.is_first_stage + parallel.is_last_stage

    def _load(self, spec: WeightSpec) -> torch.Tensor:
        return self._reader.read(spec).to(self.device)

    def _layer(self, layer: int, weight_format: str) -> Layer:
        weights: dict[str, torch.Tensor | QuantizedMatrix] = {}
        for spec in layer_specs(self.config, layer):
            name = spec.name.split(".", 2)[2]
            if spec.is_matrix and weight_format != "none":
                weights[name] = read_quantized(self._reader, spec, weight_format, self.device)
            else:
                weights[name] = self._load(spec)
        return Layer(self.config, self.comm, weights, self.attention, self.config.window(layer))

    def _lm_head(self, weight_format: str) -> LMHead:
        outer = {spec.name: spec for spec in outer_specs(self.config)}
        vocab = _vocab_local(self.config, self.comm.parallel)
        is_tied = not self._reader.has(outer["lm_head.weight"])
        if is_tied and self.comm.parallel.is_first_stage:
            rows = self.embedding.rows
        else:
            rows = self._vocab_rows(outer["wte" if is_tied else "lm_head.weight"], vocab)
        weight: torch.Tensor | QuantizedMatrix = rows.t()
        if weight_format == "w8a8":
            weight = quantize(rows.t(), largest_of_columns(rows.t()), weight_format)
        spec = outer.get("lm_head.bias")
        bias = None if spec is None else self._vocab_rows(spec, vocab)
        return LMHead(make_matmul(weight), bias, self.config.vocab_size, self.comm)

    def unquantized_lm_head(self) -> LMHead:
        """The last stage's LM head in the computation's dtype: the loaded one, or read when it is asked for."""
        return self._lm_head("none") if self._weight_format == "w8a8" else self.lm_head

    def unquantized_layers(self) -> Iterator[Layer]:
        """The stage's layers in the computation's dtype, each read when it is asked for: for `forward`."""
        for layer in self.comm.parallel.layers(self.config.num_layer):
            yield self._layer(layer, "none")

    def _norm(self, outer: dict[str, WeightSpec], name: str) -> Norm:
        weight, bias = outer[f"{name}.weight"], outer.get(f"{name}.bias")
        return Norm(self._load(weight), self._load(bias) if bias else None, self.config.layernorm_eps, self.comm)

    def _vocab_rows(self, spec: WeightSpec, vocab: slice) -> torch.Tensor:
        """This rank's rows of a vocabulary's table or bias; rows past its end are zeros."""
        rows, count = self._reader.read(spec, vocab), vocab.stop - vocab.start
        if rows.shape[0] < count:
            rows = F.pad(rows, (*(0, 0) * (rows.ndim - 1), 0, count - rows.shape[0]))
        return rows.to(self.device)

    def forward(self, step: StepInput, cache: KVCache, layers: Iterable[Layer] | None = None) -> torch.Tensor | None:
        """Run this stage between its neighbours. Returns what `send` returns.

        layers: instead of the loaded ones.
        """
        return self.send(self.compute(step, cache, self.receive(step.positions.shape[0]), layers))

    def receive(self, num_tokens: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The residual of the stage before [num_tokens, hidden_size], in the first rows of `out` if given.

        The first stage has none before it: its residual has no columns.
        """
        residual = self.new_residual(num_tokens) if out is None else out[:num_tokens]
        return residual if self.comm.parallel.is_first_stage else self.comm.receive_forward(residual)

    def new_residual(self, num_tokens: int) -> torch.Tensor:
        """Zeros for `receive` to write to."""
        columns = 0 if self.comm.parallel.is_first_stage else self.config.hidden_size
        return torch.zeros(num_tokens, columns, dtype=self.dtype, device=self.device)

    def compute(
        self, step: StepInput, cache: KVCache, residual: torch.Tensor, layers: Iterable[Layer] | None = None
    ) -> torch.Tensor:
        """The residual of the stage before, as `receive` gives it → that of this stage [tokens, hidden_size].

        The last stage's residual is the hidden states.
        """
        if self.comm.parallel.is_first_stage:
            residual = self.embedding(step.token_ids, step.slots, step.positions)
            if self.pre_decoder_layernorm is not None:
                _, residual = self.pre_decoder_layernorm(residual)
        else:  # as the embedding, the copy starts the step's chain of dependent launches
            residual = residual.clone()
        attention_step = self.attention.step(
            step.positions, step.kv_locs, step.decodes, step.prompts, step.ragged, step.chunks
        )
        hidden = None
        for layer, layer_cache in zip(layers or self.layers, cache.layers, strict=True):
            residual, hidden = layer.forward(residual, hidden, attention_step, layer_cache)
        return residual if hidden is None else residual + self.comm.all_reduce(hidden)

    def send(self, residual: torch.Tensor) -> torch.Tensor | None:
        """Send the residual to the next stage. The last stage has none: it returns its hidden states."""
        if self.comm.parallel.is_last_stage:
            return residual
        self.comm.send_forward(residual.clone())  # the next step writes over a graph's residual
        return None

    def logits(self, hidden: torch.Tensor, lm_head: LMHead | None = None) -> torch.Tensor:
        """The last stage's hidden states [rows, hidden_size] → logits [rows, vocab] fp32, on every rank.

        lm_head: instead of the loaded one.
        """
        lm_head = lm_head or self.lm_head
        return lm_head.gather(lm_head(self._final_norm(hidden)))

    def local_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The same for this rank's part of the vocabulary, [rows, vocab_local], in `out` of `new_local_logits`."""
        return self.lm_head(self._final_norm(hidden), out)

    def new_local_logits(self, num_rows: int) -> torch.Tensor:
        """Memory for `local_logits` to write to."""
        tp = self.comm.parallel.tp
        shape, dtype = (num_rows, -(-self.config.vocab_size // tp)), self.dtype if tp > 1 else torch.float32
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)[1]


class Layer:
    """A transformer layer. The configuration decides the place of the norms:

    pre_layernorm: x + attention(ln(x)), then x + mlp(ln(x)); post_layernorm: ln(x + attention(x)), then
    ln(x + mlp(x)). With apply_residual_connection_post_layernorm the first becomes ln(x) + attention(ln(x)), then
    ln(x) + mlp(ln(x)). With use_parallel_residual it is x + attention(ln(x)) + mlp(ln(x)), of two norms or of one.
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: Comm,
        weights: dict[str, torch.Tensor | QuantizedMatrix],
        attention: Attention,
        window: int = 0,
    ) -> None:
        """weights: by their names within a layer, as `layer_specs` has them; the matrices may be quantized. window:
        tokens that a query sees, itself included, 0 for all."""
        self.is_post_layernorm = config.layernorm_type == "post_layernorm"
        self.is_residual_normed = config.apply_residual_connection_post_layernorm
        self.is_parallel = config.use_parallel_residual

        def vector(name: str) -> torch.Tensor | None:
            value = weights.get(name)
            assert not isinstance(value, QuantizedMatrix), name  # only matrices are
            return value

        def norm(name: str) -> Norm:
            weight = vector(f"{name}.weight")
            assert weight is not None, name
            return Norm(weight, vector(f"{name}.bias"), config.layernorm_eps, comm)

        def linear(name: str, kind: Callable[..., Linear]) -> Linear:
            weight, bias = weights.pop(f"{name}.weight"), vector(f"{name}.bias")
            matmul = make_matmul(weight if isinstance(weight, QuantizedMatrix) else weight.flatten(1))
            return kind(matmul, None if bias is None else bias.flatten())

        row_parallel = partial(RowParallelLinear, tp_rank=comm.parallel.tp_rank)
        self.input_layernorm = norm("input_layernorm")
        self.mlp_layernorm = norm("post_attention_layernorm") if config.has_post_attention_layernorm else None
        self.query_key_value = linear("attention.query_key_value", Linear)
        self.head_norms = None
        if config.qk_layernorm:
            q, k = norm("attention.q_norm"), norm("attention.k_norm")
            self.head_norms = HeadNorms(q.weight, k.weight, q.bias, k.bias, config.layernorm_eps)
        self.attention = attention
        self.window = window
        self.dense = linear("attention.dense", row_parallel)
        self.up = linear("mlp.dense_h_to_4h", partial(Linear, activation=activation(config)))
        self.down = linear("mlp.dense_4h_to_h", row_parallel)

    def forward(
        self, residual: torch.Tensor, hidden: torch.Tensor | None, step: AttentionStep, cache: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(residual, hidden) of the layer before → the same of this layer; [tokens, hidden_size] each.

        hidden is this rank's addend: the next norm sums the tp group's, and adds the sum to the residual. Writes the
        tokens' keys and values into the cache.
        """
        if self.is_parallel:
            residual, normed = self.input_layernorm(residual, hidden)
            attended = self.attend(normed, step, cache)
            if self.mlp_layernorm is not None:
                _, normed = self.mlp_layernorm(residual)
            return residual, attended + self.mlp(normed)
        assert self.mlp_layernorm is not None, "only a parallel residual does without"
        if self.is_post_layernorm:
            _, residual = self.input_layernorm(residual, self.attend(residual, step, cache))
            return self.mlp_layernorm(residual, self.mlp(residual))[1], None
        residual, normed = self.input_layernorm(residual, hidden)
        residual = normed if self.is_residual_normed else residual
        residual, normed = self.mlp_layernorm(residual, self.attend(normed, step, cache))
        return normed if self.is_residual_normed else residual, self.mlp(normed)

    def attend(self, hidden: torch.Tensor, step: AttentionStep, cache: LayerCache) -> torch.Tensor:
        """[tokens, hidden_size] → this rank's addend, [tokens, hidden_size]"""
        qkv = self.query_key_value(hidden)
        if self.head_norms is not None:
            head_norm(qkv, self.attention.layout, self.head_norms)
        return self.dense(self.attention(qkv, cache, step, self.window))

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] → this rank's addend, [tokens, hidden_size]"""
        if self.down.matmul.activates_input(len(hidden), hidden.dtype):
            return self.down(self.up.matmul(hidden, self.up.bias), self.up.activation)
        return self.down(self.up(hidden))
