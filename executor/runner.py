"""The torch executor: turns plans into tensors, runs the stage, samples. One per rank.

It knows slots, tokens and blocks from the plans it is given, and never the scheduler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from engine.config import EngineConfig
from engine.plan import BeamReorder, NewSequences, Plan, StepOutput
from executor.collectives import Comm
from executor.graphs import DecodeGraphs, max_rows, num_bytes
from executor.kv_cache import DecodeMetadata, KVCache
from executor.model import GPT, StepInput
from executor.output_layout import Admitted, Layout, choose
from kernels import runs_on
from kernels.decode_attention import make_workspace
from weights.reader import TORCH_DTYPES, ShardReader

_CGROUP = Path("/sys/fs/cgroup")


class StepResult:
    """What one step gave, perhaps still on its way from the device."""

    def __init__(self, values: torch.Tensor, layout: Layout) -> None:
        self._layout = layout
        self._event = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def wait(self) -> StepOutput:
        """Tokens, and what else was asked for."""
        if self._event is not None:
            self._event.synchronize()
        return self._layout.parse(self._values)


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
            self.model = GPT(comm, reader, device, progress, engine_config.int8_mode)
        self.max_seq_len = engine_config.max_seq_len or reader.config.max_pos_seq_len
        self.max_step_tokens = engine_config.max_step_tokens or (512 if device.type == "cpu" else 8192)
        self.num_blocks = 0
        self._admitted: dict[int, Admitted] = {}  # per slot
        num_slots = engine_config.max_batch_size
        self._workspace: torch.Tensor | None = None  # kernels.decode_attention's, on a GPU
        self._graphs: DecodeGraphs | None = None
        # The last row is nobody's, as the cache's last place.
        self._tokens = torch.zeros(num_slots + 1, self.max_seq_len, dtype=torch.int64, device=device)
        self._beam_scores = torch.zeros(num_slots, device=device)

    def prepare(self) -> None:
        """Allocate the key-value cache, as large on every rank as the rank with the least memory can."""
        config, limits, comm = self.model.config, self._limits, self.comm
        shape = dict(
            num_layers=len(comm.parallel.layers(config.num_layer)),
            block_size=limits.block_size,
            kv_heads_local=config.kv_heads_local(comm.parallel.tp),
            head_dim=config.size_per_head,
            dtype=self.model.dtype,
        )
        most = limits.max_batch_size * -(-self.max_seq_len // limits.block_size)
        memory = _memory_left(self.device, self._local_size)
        slots = {}
        if runs_on(self.device):  # decoding rows go through the kernels, and steps of them through graphs
            slots = dict(num_slots=limits.max_batch_size, max_seq_len=self.max_seq_len)
            memory -= num_bytes(**slots, vocab_size=config.vocab_size, dtype=self.model.dtype)
        memory = max(0, memory) * limits.kv_cache_fraction
        self.num_blocks = comm.min_over_ranks(min(most, int(memory / KVCache.bytes_per_block(**shape))))
        if self.num_blocks < 1:
            raise RuntimeError(f"no memory is left on {self.device} for a key-value cache; use more ranks")
        self.cache = KVCache(num_blocks=self.num_blocks, device=self.device, **shape, **slots)
        if slots:
            heads_local = config.head_num // comm.parallel.tp
            self._workspace = make_workspace(max_rows(limits.max_batch_size), heads_local, self.device)
            if comm.parallel.pp == 1 and not limits.enforce_eager:
                with torch.inference_mode():
                    self._graphs = DecodeGraphs(self.model, self.cache, self._tokens, self._workspace)

    def close(self) -> None:
        """Free what must go before the ranks leave their groups."""
        if self._graphs is not None:
            self._graphs.close()

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult | None:
        """Compute one plan. Returns what it gives on rank 0, None elsewhere."""
        parallel = self.comm.parallel
        if self._graphs is not None and plan.is_decode and len(plan.chunks) <= self._graphs.most:
            return self._replay(plan)
        x = self.hidden(plan)
        if not (parallel.is_first_stage or parallel.is_last_stage):
            return None
        layout = Layout.of(plan, self._admitted, self.model.config.vocab_size)
        if x is not None:
            logits = self.model.logits(x[self._tensor(layout.token_index)]) if layout.rows else x.new_empty(0)
            values = choose(layout, logits, self._tokens, self._beam_scores, lambda part: self.model.logits(x[part]))
        else:
            values = torch.empty(sum(layout.sizes), dtype=torch.float64, device=self.device)
        if len(values):
            values = self.comm.return_results(values)
        self._keep_tokens(layout, values)
        return StepResult(values, layout) if parallel.rank == 0 else None

    @torch.inference_mode()
    def hidden(self, plan: Plan) -> torch.Tensor | None:
        """One pass over the plan's tokens: on the last stage, their hidden states [tokens, hidden]."""
        self._update(plan)
        return self.model.forward(self._input(plan), self.cache)

    @torch.inference_mode()
    def forward(self, plan: Plan) -> torch.Tensor | None:
        """One pass over the plan's tokens: on the last stage, logits [sampled rows, vocab] fp32."""
        x = self.hidden(plan)
        if x is None:
            return None
        layout = Layout.of(plan, self._admitted, self.model.config.vocab_size)
        return self.model.logits(x[self._tensor(layout.token_index)])

    def _replay(self, plan: Plan) -> StepResult | None:
        """A step of decodes only, through a graph; rows that want more than the likeliest token choose anew."""
        self._update(plan)
        layout = Layout.of(plan, self._admitted, self.model.config.vocab_size)
        values, logits = self._graphs.run([c.slot for c in plan.chunks], [c.start for c in plan.chunks])
        if not layout.is_plain:
            values = choose(layout, logits, self._tokens, self._beam_scores, lambda part: logits[:0])
            self._keep_tokens(layout, values)
        return StepResult(values, layout) if self.comm.parallel.rank == 0 else None

    def _keep_tokens(self, layout: Layout, values: torch.Tensor) -> None:
        if layout.rows:
            slots, positions = zip(*((row.slot, row.position) for row in layout.rows), strict=True)
            self._tokens[self._tensor(slots), self._tensor(positions)] = values[: len(slots)].long()

    def _update(self, plan: Plan) -> None:
        for admission in plan.new_sequences:
            self._admit(admission)
        for reorder in plan.beam_reorders:
            self._reorder(reorder)

    def _admit(self, admission: NewSequences) -> None:
        slots, prompt_len = admission.slots, len(admission.prompt_ids)
        banned = self._tensor(admission.banned_ids) if admission.banned_ids else None
        self._tokens[self._tensor(slots), :prompt_len] = self._tensor(admission.prompt_ids)
        for index, (slot, block_ids) in enumerate(zip(slots, admission.block_ids, strict=True)):
            self._admitted[slot] = Admitted(admission, admission.sampling.for_sample(index), banned)
            if index == 0:
                self.cache.assign(slot, block_ids)
            else:
                self.cache.fork(slot, slots[0], prompt_len, block_ids)

    def _reorder(self, reorder: BeamReorder) -> None:
        slots, length = self._tensor(reorder.slots), reorder.length
        self._tokens[slots, :length] = self._tokens[self._tensor(reorder.parents), :length]
        self._tokens[slots, length] = self._tensor(reorder.token_ids)
        self._beam_scores[slots] = torch.tensor(reorder.scores, dtype=torch.float32).to(self.device)
        self.cache.reorder(reorder.slots, reorder.parents, length)

    def _input(self, plan: Plan) -> StepInput:
        slots, positions, places, segments = [], [], [], []
        num_decodes = row = 0
        if self._workspace is not None:
            num_decodes = sum(1 for _ in takewhile(lambda chunk: chunk.length == 1, plan.chunks))
        for chunk in plan.chunks:
            slots.append(np.full(chunk.length, chunk.slot))
            positions.append(np.arange(chunk.start, chunk.start + chunk.length))
            places.append(self.cache.kv_locs(chunk.slot, chunk.start, chunk.length))
            if row >= num_decodes:
                segments.append(self.cache.chunk(chunk.slot, row, chunk.start, chunk.length))
            row += chunk.length
        own_positions = self._tensor(np.concatenate(positions))
        own_slots = self._tensor(np.concatenate(slots))
        decodes = None
        if num_decodes:
            first = own_slots[:num_decodes], own_positions[:num_decodes]
            decodes = DecodeMetadata(self.cache.table, *first, self._workspace)
        token_ids = self._tokens[own_slots, own_positions]
        return StepInput(token_ids, own_positions, self._tensor(np.concatenate(places)), segments, decodes)

    def _tensor(self, values: np.ndarray | Sequence[int]) -> torch.Tensor:
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
        data_type = "fp32"
        if device.type == "cuda":
            data_type = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and data_type == "fp16":
        raise ValueError("data_type is fp16; on a CPU it must be fp32 or bf16")
    return TORCH_DTYPES[data_type]
