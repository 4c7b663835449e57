"""The split of the model over ranks, and the engine's settings: frozen, checked once. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.flags import flag
from weights.model_config import DATA_TYPES


@dataclass(frozen=True)
class ParallelConfig:
    """One rank's position in the tp × pp grid; rank = pp_rank · tp + tp_rank, as in FasterTransformer."""

    tp: int = 1
    pp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "pp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; tp {self.tp} × pp {self.pp} has ranks 0 to {self.world_size - 1}")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def layers(self, num_layer: int, pp_rank: int | None = None) -> range:
        """The layers of this rank's stage, or of another. Raises ValueError where pp is above num_layer.

        Where pp does not divide num_layer, the first num_layer % pp stages have one layer more than the others: the
        last stage computes the LM head as well.
        """
        if self.pp > num_layer:
            raise ValueError(f"pp {self.pp} is above this model's {num_layer} layers; possible: 1 to {num_layer}")
        stage = self.pp_rank if pp_rank is None else pp_rank
        size, num_larger = divmod(num_layer, self.pp)
        first = stage * size + min(stage, num_larger)
        return range(first, first + size + (stage < num_larger))


_INT8_MODES = {1: "int8", 2: "w8a8"}  # FasterTransformer's numbers


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings: sizes, data types, device, limits."""

    engine: str = flag(
        "auto",
        "the executor: torch (built in), fastertransformer (the library's op), or auto",
        choices=("auto", "torch", "fastertransformer"),
    )
    device: str = flag("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    data_type: str = flag(
        "auto",
        "number format of the computation; auto: bf16 on a GPU (fp16 before compute capability 8.0), fp32 on a CPU",
        choices=("auto", *DATA_TYPES),
    )
    quantization: str = flag(
        "none",
        "stores the layers' matrices in one byte per number, with a scale for each column; fp8 needs a GPU of compute "
        "capability 8.9, or a CPU, which computes it slowly; w8a8 is int8 that also rounds activations and has the LM "
        "head in int8, for a CPU with VNNI",
        choices=("none", "int8", "fp8", "w8a8"),
    )
    int8_mode: int = flag(
        0, "FasterTransformer's names: 1 is --quantization int8, 2 is --quantization w8a8", choices=(0, 1, 2)
    )
    kv_cache_dtype: str = flag(
        "auto",
        "number format of the key-value cache; auto: data_type; fp8: half of bf16's bytes, with a scale for each layer "
        "and head, and the same needs as --quantization fp8",
        choices=("auto", "fp8"),
    )
    max_batch_size: int = flag(256, "sequences that run at once (each sample or beam counts); further ones wait")
    max_queue_size: int = flag(2048, "requests that may wait; further ones are refused (HTTP 503)")
    max_seq_len: int = flag(
        0,
        "tokens of a request, prompt and output together; 0: the model's positions, or for a model without positions "
        "(BLOOM) its training length (2048 if unknown); such a model takes any length that fits in memory",
    )
    max_step_tokens: int = flag(0, "tokens computed in one step; 0: 512 on a CPU, 8192 on a GPU")
    max_mixed_tokens: int = flag(
        0,
        "tokens computed in one step that has other requests' next tokens, which wait for those of prompts; both kinds "
        "count; at least max_batch_size; 0: as max_step_tokens",
    )
    block_size: int = flag(16, "tokens in one block of the key-value cache")
    no_prefix_cache: bool = flag(
        False, "compute every prompt whole, also where an earlier request began with the same tokens"
    )
    kv_cache_fraction: float = flag(0.9, "share of the memory left after loading that the key-value cache may take")
    speculative: str = flag(
        "none",
        "ngram: a step verifies several tokens that follow the last ones where these stood before; the tokens stay the "
        "same, and texts that repeat parts of the prompt or of themselves come faster",
        choices=("none", "ngram"),
    )
    speculative_tokens: int = flag(8, "tokens that a step verifies of a sequence, at most, with --speculative")
    all_reduce: str = flag(
        "auto",
        "how GPUs of a tp group sum their results; auto: few rows through each other's memory, where the GPUs reach "
        "it, and many through NCCL",
        choices=("auto", "nccl"),
    )
    enforce_eager: bool = flag(False, "launch the kernels of a decode step one by one, without CUDA graphs")
    step_timeout_s: float = flag(25.0, "seconds; a step that takes longer counts as a hung rank and ends the job")

    def __post_init__(self) -> None:
        for name, least in (
            ("max_batch_size", 1),
            ("max_queue_size", 1),
            ("max_seq_len", 0),
            ("max_step_tokens", 0),
            ("max_mixed_tokens", 0),
            ("block_size", 1),
            ("speculative_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.kv_cache_fraction < 1:
            raise ValueError(f"kv_cache_fraction is {self.kv_cache_fraction}; it must lie between 0 and 1")
        if not self.step_timeout_s > 0:
            raise ValueError(f"step_timeout_s is {self.step_timeout_s}; it must be above 0")
        if self.int8_mode and self.quantization not in ("none", self.weight_format):
            raise ValueError(
                f"quantization is {self.quantization}, and int8_mode is {self.int8_mode}, which is quantization "
                f"{self.weight_format}; set one of them"
            )

    @property
    def weight_format(self) -> str:
        """none, int8, fp8 or w8a8: `quantization`, or what FasterTransformer's `int8_mode` names."""
        return _INT8_MODES.get(self.int8_mode, self.quantization)
