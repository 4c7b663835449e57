"""Parts that the benchmarks share: flags, random models of a given shape in memory, the JSON line of a report."""

from __future__ import annotations

import json
import platform
import subprocess
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from engine.flags import flag
from engine.world import World
from executor.startup import claim_cores
from weights.model_config import ModelConfig
from weights.table import WeightSpec, weight_specs

# heads × head size × layers; inner size 4 × hidden, tied embedding.
SHAPES = {
    "8M": (4, 64, 8, 4096),  # about the demo model
    "124M": (12, 64, 12, 50257),
    "350M": (16, 64, 24, 51200),
    "1.3B": (32, 64, 24, 51200),
    "6.7B": (32, 128, 32, 51200),
    "20B": (48, 128, 44, 51200),
}
# Of other families: the fields of ModelConfig that are not as GPT's. The head is the embedding here, too.
_LLAMA = dict(
    normalization_type="rmsnorm",
    activation_type="swiglu",
    has_positional_encoding=False,
    rotary_embedding=128,
    has_qkv_bias=False,
    has_dense_bias=False,
    has_mlp_bias=False,
    head_num=32,
    size_per_head=128,
    kv_head_num=8,
)
FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "Llama-8B": _LLAMA | dict(num_layer=32, inter_size=14336, vocab_size=128256, rotary_base=5e5),
    "Qwen3-8B": _LLAMA | dict(num_layer=36, inter_size=12288, vocab_size=151936, rotary_base=1e6, qk_layernorm=True),
}


@dataclass(frozen=True)
class BenchmarkFlags:
    """Flags of several benchmarks; each takes some of them, and may have its own defaults."""

    shape: str = flag("124M", "the model's shape", choices=tuple(SHAPES))
    shapes: tuple[str, ...] = flag(
        ("124M",), "models to time, one after another", nargs="+", type=str, choices=(*SHAPES, *FAMILY_SHAPES)
    )
    threads: int = flag(0, "CPU threads of a rank; 0: its share of the cores")
    batches: tuple[int, ...] = flag((1, 8), "batch sizes to time", nargs="+", type=int)
    input_len: int = flag(128, "tokens of a prompt")
    output_len: int = flag(64, "tokens to generate")
    requests: int = flag(256, "requests that are sent")
    repeats: int = flag(3, "times that each figure is taken")
    only: str = flag("", "only rows whose name has this text")
    folder: str = flag("", "where files are made, for a while; by default the system's temporary folder")


def model_config(shape: str, tp: int, max_pos_seq_len: int = 1024) -> ModelConfig:
    """The config of one of SHAPES or FAMILY_SHAPES."""
    fields = FAMILY_SHAPES.get(shape)
    if fields is None:
        heads, head_size, layers, vocab = SHAPES[shape]
        fields = dict(head_num=heads, size_per_head=head_size, num_layer=layers, vocab_size=vocab)
    return ModelConfig(
        **fields,
        start_id=fields["vocab_size"] - 1,
        end_id=fields["vocab_size"] - 1,
        max_pos_seq_len=max_pos_seq_len,
        layernorm_eps=1e-5,
        tensor_para_size=tp,
    )


class RandomReader:
    """Stands in for ShardReader: weights drawn on the device, normal with deviation 0.02, no file behind them.

    A weight is the same each time that it is read: quantized weights are compared with it.
    """

    def __init__(self, config: ModelConfig, tp_rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.tp_rank = tp_rank
        self.dtype = dtype
        self.device = device

    def has(self, spec: WeightSpec) -> bool:
        """Whether the model has this weight; the head is the embedding."""
        return spec.name != "lm_head.weight"

    def read(self, spec: WeightSpec, rows: slice = slice(None)) -> torch.Tensor:
        """This rank's shard, or rows of it; norms' weights are 1."""
        return self.map(spec)[rows]

    def map(self, spec: WeightSpec, tp_rank: int | None = None) -> torch.Tensor:
        """As `read`, also another rank's; no file is behind it."""
        shape = spec.shard_shape(self.config.tensor_para_size)
        if "norm.weight" in spec.name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        rank = 0 if spec.split_axis is None else self.tp_rank if tp_rank is None else tp_rank
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{spec.name}.{rank}".encode()))
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=0.02, generator=generator)


def claim_device(world: World, wish: str, threads: int) -> torch.device:
    """This rank's GPU, or the CPU with `threads` threads (0: the rank's share of the cores).

    wish: auto, cpu or cuda. Raises RuntimeError for cuda without a GPU.
    """
    if wish == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device is cuda, and torch sees no GPU")
    if torch.cuda.is_available() and wish != "cpu":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(threads or claim_cores(world.local_size))
    return torch.device("cpu")


def weight_bytes(config: ModelConfig, dtype: torch.dtype, weight_format: str = "none") -> int:
    """Bytes that one decode step must read: all weights but the embedding lookups; the tied head counts once.

    weight_format: of the layers' matrices, as in EngineConfig: a byte for each weight; w8a8: of the head's, too.
    """
    specs = [spec for spec in weight_specs(config) if spec.name not in ("wpe", "lm_head.weight")]

    def is_byte(spec: WeightSpec) -> bool:
        if spec.name == "wte":  # or as large as an untied head
            return weight_format == "w8a8"
        return spec.is_matrix and weight_format != "none"

    return sum(spec.num_elements(1) * (1 if is_byte(spec) else dtype.itemsize) for spec in specs)


def hardware(device: torch.device) -> str:
    """The processor's or GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def commit() -> str:
    """The measured commit, or unknown."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def report(device: torch.device, **figures: Any) -> None:
    """Print the JSON line that ends a benchmark's table."""
    print(json.dumps({"hardware": hardware(device), "torch": torch.__version__, "commit": commit(), **figures}))
