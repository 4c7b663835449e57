"""From a converted folder to an executor: pick executor, device and data type, then load this rank's weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, ParallelConfig
from engine.world import World
from executor.collectives import Comm
from executor.model import GPT, check_supported, read_order
from executor.runner import TorchExecutor, computation_dtype
from kernels.fp8 import has_fp8
from weights.model_config import ModelConfig
from weights.reader import ShardReader

if TYPE_CHECKING:
    from engine.engine import Executor

_LOG = logging.getLogger("engine")

# Head sizes that FasterTransformer's decoder attention is built for (decoder_masked_multihead_attention.cu).
_FT_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256)


@dataclass(frozen=True)
class Backend:
    """The engine that runs the model, with its device and data type, and the reason for the engine (logged)."""

    engine: str  # torch or fastertransformer
    reason: str
    device: torch.device
    dtype: torch.dtype
    lib_path: Path  # FasterTransformer's library


@dataclass(frozen=True)
class WeightFolder:
    """A converted folder and its config.ini."""

    path: Path
    config: ModelConfig

    @classmethod
    def read(cls, path: Path) -> WeightFolder:
        """Read the folder's config.ini. Raises ValueError for a bad one."""
        return cls(path, ModelConfig.read(path / "config.ini"))


def pick_backend(
    engine_config: EngineConfig, model_config: ModelConfig, lib_path: Path, local_rank: int, pp: int = 1
) -> Backend:
    """Pick engine, device and dtype. Raises ValueError or RuntimeError if the machine cannot do what a flag asks."""
    device = pick_device(engine_config.device, local_rank)
    dtype = computation_dtype(engine_config.data_type, device)
    engine, reason = engine_config.engine, "chosen by --engine"
    if engine == "auto":
        missing = _why_not_fastertransformer(engine_config, model_config, lib_path, device, pp)
        engine = "torch" if missing else "fastertransformer"
        reason = missing or f"{lib_path} is there"
    positions = model_config.max_pos_seq_len
    if model_config.has_positional_encoding and engine_config.max_seq_len > positions:
        raise ValueError(f"max_seq_len is {engine_config.max_seq_len}; the model has {positions} positions")
    longest, window = engine_config.max_seq_len or positions, model_config.sliding_window
    if model_config.full_attention_layers is None and 0 < window < longest:
        raise ValueError(
            f"max_seq_len is {longest}; config.ini has sliding_window {window} and no full_attention_layers: convert "
            f"the checkpoint again for more"
        )
    if engine == "torch":
        check_supported(model_config)
        _check_formats(engine_config, device)
    elif not lib_path.is_file():
        raise ValueError(f"lib_path is {lib_path}, and there is no such file")
    elif lacking := _what_fastertransformer_lacks(engine_config, model_config, pp):
        raise ValueError(lacking)
    elif (model_config.activation_type, model_config.gelu_form) == ("gelu", "erf"):
        _LOG.warning("gelu_form is erf, and FasterTransformer computes the tanh form: results differ slightly")
    return Backend(engine, reason, device, dtype, lib_path)


def pick_device(wish: str, local_rank: int) -> torch.device:
    """This rank's device; wish: of --device. Raises RuntimeError where there is none for it."""
    count = torch.cuda.device_count() if wish != "cpu" else 0
    if wish == "cuda" and count == 0:
        raise RuntimeError("device is cuda, and torch sees no GPU")
    if count == 0:
        return torch.device("cpu")
    if local_rank >= count:
        raise RuntimeError(
            f"rank {local_rank} of this node has no GPU of its own: torch sees {count}; start one rank per GPU"
        )
    return torch.device("cuda", local_rank)


def connect(world: World, parallel: ParallelConfig, backend: Backend) -> Comm | None:
    """Join the tp and pp groups; collective. None for FasterTransformer's op, which makes its own groups."""
    if backend.device.type == "cuda":
        torch.cuda.set_device(backend.device)
    return Comm(world, parallel, backend.device) if backend.engine == "torch" else None


def load(
    weights: WeightFolder,
    engine_config: EngineConfig,
    parallel: ParallelConfig,
    world: World,
    comm: Comm | None,
    backend: Backend,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Executor:
    """Load this rank's weights into its executor.

    comm: of `connect`. progress: called with (parts loaded, parts in all).
    Raises ValueError or RuntimeError for bad weights, possibly on one rank only: the ranks must agree on success before
    the executor's `prepare`, which is collective.
    """
    num_cores = claim_cores(world.local_size)  # for a GPU's ranks too: several threads read their weights
    if backend.device.type == "cpu":
        torch.set_num_threads(num_cores)
    if comm is None:
        from executor.fastertransformer import FasterTransformerExecutor

        return FasterTransformerExecutor(weights.path, weights.config, engine_config, parallel, backend, progress)
    num_layer = weights.config.num_layer
    if parallel.rank == 0 and num_layer % parallel.pp:
        sizes = [len(parallel.layers(num_layer, stage)) for stage in range(parallel.pp)]
        _LOG.info(
            "pp %d does not divide %d layers: the stages have %s", parallel.pp, num_layer, ", ".join(map(str, sizes))
        )
    reader = ShardReader(weights.path, weights.config, parallel.tp_rank, backend.dtype, backend.device)
    counter = _Counter(GPT.num_load_steps(weights.config, comm), progress)
    # A CPU computes with the mapped files themselves, or packs them, which takes longer than to read them.
    is_read_ahead = backend.device.type == "cuda"
    with reader.read_ahead(read_order(reader, parallel)) if is_read_ahead else nullcontext():
        return TorchExecutor(reader, engine_config, comm, backend.device, world.local_size, counter)


class _Counter:
    """Turns the loader's bare ticks into (done, total)."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self.done = 0
        self.total = total
        self.report = report

    def __call__(self) -> None:
        self.done += 1
        self.report(self.done, self.total)


def claim_cores(local_size: int) -> int:
    """The number of threads for this rank: OMP_NUM_THREADS, else SLURM_CPUS_PER_TASK under srun, else its share.

    local_size: ranks on this node. With few ranks, mpirun binds each one to a single core: the other cores would be
    idle, and Triton would share that core. This binding is removed; bindings of taskset, numactl or Slurm are kept.
    OMP_THREAD_LIMIT is a ceiling: with more threads, oneDNN's packed linear gives wrong results.
    """
    threads = _wished_threads() or _share_of_cores(local_size)
    return min(threads, _positive("OMP_THREAD_LIMIT") or threads)


def _wished_threads() -> int:
    is_under_mpirun = "OMPI_COMM_WORLD_SIZE" in os.environ
    return _positive("OMP_NUM_THREADS") or (0 if is_under_mpirun else _positive("SLURM_CPUS_PER_TASK"))


def _share_of_cores(local_size: int) -> int:
    is_bound_by_mpirun = "OMPI_COMM_WORLD_SIZE" in os.environ and "SLURM_JOB_ID" not in os.environ
    share = max(1, (os.cpu_count() or 1) // local_size)
    if is_bound_by_mpirun and len(os.sched_getaffinity(0)) < share:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the kernel removes cores outside the container
        return max(1, len(os.sched_getaffinity(0)) // local_size)
    return max(1, min(share, len(os.sched_getaffinity(0))))


def _positive(variable: str) -> int:
    """An environment variable's whole number; 0 for an absent one or another text."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 0


def _check_formats(engine_config: EngineConfig, device: torch.device) -> None:
    """Raise RuntimeError with the setting's and the GPU's name where a format is asked for that the device lacks."""
    if engine_config.weight_format == "w8a8" and (device.type != "cpu" or not torch.cpu._is_vnni_supported()):
        here = "this CPU has none" if device.type == "cpu" else "a GPU computes int8 and fp8"
        raise RuntimeError(f"quantization is w8a8, which needs a CPU with VNNI; {here}")
    for name in ("quantization", "kv_cache_dtype"):
        if getattr(engine_config, name) == "fp8" and not has_fp8(device):
            major, minor = torch.cuda.get_device_capability(device)
            raise RuntimeError(
                f"{name} is fp8, which needs compute capability 8.9 or later; "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
            )


def _why_not_fastertransformer(
    engine_config: EngineConfig, config: ModelConfig, lib_path: Path, device: torch.device, pp: int
) -> str | None:
    if not lib_path.is_file():
        return f"no FasterTransformer library at {lib_path}"
    if device.type != "cuda":
        return "FasterTransformer needs a GPU"
    if config.size_per_head not in _FT_HEAD_SIZES:
        return f"FasterTransformer has no kernel for size_per_head {config.size_per_head}"
    return _what_fastertransformer_lacks(engine_config, config, pp)


def _what_fastertransformer_lacks(engine_config: EngineConfig, config: ModelConfig, pp: int) -> str | None:
    """The reason why its op, or our driver of it, cannot run this model, with the key's name; None: it can."""
    if engine_config.weight_format not in ("none", "int8"):
        return f"quantization is {engine_config.weight_format}; FasterTransformer's GPT computes none and int8 only"
    for name, refused, computed in (
        ("kv_cache_dtype", "fp8", "auto"),
        ("speculative", "ngram", "none"),
    ):
        if getattr(engine_config, name) == refused:
            return f"{name} is {refused}; FasterTransformer's GPT computes {computed} only"
    if config.apply_residual_connection_post_layernorm:
        return "apply_residual_connection_post_layernorm is True; FasterTransformer computes False only"
    for key, known in (
        ("normalization_type", ("layernorm",)),
        ("activation_type", ("gelu", "relu")),
        ("kv_head_num", (config.head_num,)),
        ("rotary_embedding", (0,)),
        ("hidden_size", (config.attention_size,)),
        ("sliding_window", (0,)),
        ("qk_layernorm", (False,)),
        ("use_parallel_residual", (False,)),
        ("has_lm_head_bias", (False,)),
        ("has_qkv_bias", (True,)),
        ("has_dense_bias", (True,)),
        ("has_mlp_bias", (True,)),
    ):
        if getattr(config, key) not in known:
            computed = " and ".join(map(str, known))
            return f"{key} is {getattr(config, key)}; FasterTransformer's GPT computes {computed} only"
    if len(config.end_ids) > 1:
        return (
            f"end_ids is {', '.join(map(str, config.end_ids))}; FasterTransformer's GPT ends a text at one token only"
        )
    if config.has_adapters:
        return "has_adapters is True; the fastertransformer engine loads no adapters"
    if config.num_layer % pp:
        return f"pp is {pp}; FasterTransformer's must divide the model's {config.num_layer} layers"
    return None
