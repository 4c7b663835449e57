"""The torch executor: turns plans into tensors, runs the stage, samples. One per rank.

It knows slots, tokens and blocks from the plans it is given, and never the scheduler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.cache import KVCache
from engine.comm import Comm
from engine.config import EngineConfig
from engine.model import GPT, StepInput
from engine.request import SamplingParams
from engine.sampling import sample
from engine.weights import TORCH_DTYPES, ShardReader

if TYPE_CHECKING:
    from engine.scheduler import Plan


_CGROUP = Path("/sys/fs/cgroup")


class StepResult:
    """The sampled tokens of one step, perhaps still on their way from the device."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._event = None
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens = tokens

    def wait(self) -> list[int]:
        """The tokens, one per sampled slot in the plan's order."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class TorchExecutor:
    """Holds a stage's weights, its key-value cache (once `prepare` is called) and the slots' state; executes plans."""

    def __init__(
        self,
        reader: ShardReader,
        engine_config: EngineConfig,
        comm: Comm,
        device: torch.device,
        local_size: int = 1,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.comm = comm
        self.device = device
        self._limits = engine_config
        self._local_size = local_size
        # On a GPU the next step is launched before the last one's tokens are read.
        self.num_ahead = 1 if device.type == "cuda" else 0
        with torch.inference_mode():
            self.model = GPT(comm, reader, device, progress)
        self.max_seq_len = engine_config.max_seq_len or reader.config.max_pos_seq_len
        self.max_step_tokens = engine_config.max_step_tokens or (512 if device.type == "cpu" else 8192)
        self._prompts: dict[int, np.ndarray] = {}  # slot -> prompt token ids
        self._sampling: dict[int, SamplingParams] = {}
        self._last_tokens = torch.zeros(engine_config.max_batch_size, dtype=torch.int64, device=device)

    def prepare(self) -> None:
        """Allocate the key-value cache, as large on every rank as the rank with the least memory can."""
        config, limits, comm = self.model.config, self._limits, self.comm
        shape = dict(
            num_layers=len(comm.parallel.layers(config.num_layer)),
            block_size=limits.block_size,
            heads_local=config.head_num // comm.parallel.tp,
            head_dim=config.size_per_head,
            dtype=self.model.dtype,
        )
        most = limits.max_batch_size * -(-self.max_seq_len // limits.block_size)
        memory = _memory_left(self.device, self._local_size) * limits.kv_cache_fraction
        self.num_blocks = comm.min_over_ranks(min(most, int(memory / KVCache.bytes_per_block(**shape))))
        if self.num_blocks < 1:
            raise RuntimeError(f"no memory is left on {self.device} for a key-value cache; use more ranks")
        self.cache = KVCache(num_blocks=self.num_blocks, device=self.device, **shape)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult | None:
        """Compute one plan. Returns the sampled tokens on the first stage's ranks, None elsewhere."""
        logits = self.forward(plan)
        sampled = [chunk for chunk in plan.chunks if chunk.samples]
        if logits is not None:
            positions = [chunk.start + chunk.length for chunk in sampled]
            tokens = sample(logits, [self._sampling[chunk.slot] for chunk in sampled], positions)
        else:
            tokens = torch.empty(len(sampled), dtype=torch.int64, device=self.device)
        if sampled:
            tokens = self.comm.return_tokens(tokens)
        if not self.comm.parallel.is_first_stage:
            return None
        self._last_tokens[self._tensor([chunk.slot for chunk in sampled])] = tokens
        return StepResult(tokens)

    @torch.inference_mode()
    def forward(self, plan: Plan) -> torch.Tensor | None:
        """One pass over the plan's tokens: on the last stage, logits [sampled chunks, vocab] fp32."""
        for admission in plan.admissions:
            self._prompts[admission.slot] = np.asarray(admission.prompt_ids, dtype=np.int64)
            self._sampling[admission.slot] = admission.sampling
            self.cache.assign(admission.slot, admission.block_ids)
        return self.model.forward(self._input(plan), self.cache)

    def _input(self, plan: Plan) -> StepInput:
        decode_slots = []
        prompt_ids, positions, places, segments, sampled_rows = [], [], [], [], []
        row = 0
        for chunk in plan.chunks:
            prompt = self._prompts[chunk.slot]
            end = chunk.start + chunk.length
            if chunk.start >= len(prompt):
                decode_slots.append(chunk.slot)
            else:
                prompt_ids.append(prompt[chunk.start : end])
            positions.append(np.arange(chunk.start, end))
            places.append(self.cache.places(chunk.slot, chunk.start, chunk.length))
            segments.append(self.cache.segment(chunk.slot, row, chunk.start, chunk.length))
            row += chunk.length
            if chunk.samples:
                sampled_rows.append(row - 1)
        token_ids = self._last_tokens[self._tensor(decode_slots)]  # decodes come first in a plan
        if prompt_ids:
            token_ids = torch.cat([token_ids, self._tensor(np.concatenate(prompt_ids))])
        return StepInput(
            token_ids,
            self._tensor(np.concatenate(positions)),
            self._tensor(np.concatenate(places)),
            segments,
            self._tensor(sampled_rows),
        )

    def _tensor(self, values: np.ndarray | list[int]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


def _memory_left(device: torch.device, local_size: int) -> int:
    """Bytes that this rank may still take: the GPU's free memory, or its share of half the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where it has one
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, max(0, limit - used))
    return available // 2 // local_size


def computation_dtype(data_type: str, device: torch.device) -> torch.dtype:
    """The torch dtype for --data-type; raises ValueError for one that the device cannot compute well."""
    if data_type == "auto":
        data_type = "bf16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and data_type == "fp16":
        raise ValueError("data_type is fp16; on a CPU it must be fp32 or bf16")
    return TORCH_DTYPES[data_type]
