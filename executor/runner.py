"""The torch executor: turns plans into tensors, runs the stage, chooses tokens. One per rank.

Knows slots, tokens and blocks from plans, and never the scheduler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.config import EngineConfig
from engine.memory import most_blocks
from engine.plan import Plan, StepOutput
from executor import graphs, prompt_graphs
from executor.chooser import Chooser
from executor.collectives import Comm, Transfer
from executor.draft_graphs import DraftGraphs
from executor.graphs import DecodeGraphs, max_rows
from executor.kv_cache import CacheShape, KVCache, PrefillChunk
from executor.matmul import leave_out_amx
from executor.model import GPT, StepInput
from executor.output_layout import OutputLayout
from executor.probe import calibrate
from executor.prompt_graphs import PromptGraphs
from executor.returning import ReturningResults
from executor.sampling_rows import SamplingRows
from executor.slots import SlotState
from executor.token_choice import choose, gather, in_batches
from kernels import runs_on
from kernels.decode_attention import DecodeMetadata, make_workspace
from kernels.fp8 import FP8
from kernels.prompt_attention import PromptMetadata, make_tiles
from kernels.ragged_attention import MIN_ROWS, can_batch
from weights.reader import TORCH_DTYPES, ShardReader

# A GPU takes the time to read the weights for up to 32 rows (kernels.linear). A CPU takes 2.3 times as long for 16 rows
# as for one (GPT-2 124M, fp32).
_MAX_DRAFT_ROWS = {"cuda": 32, "cpu": 16}
_CGROUP = Path("/sys/fs/cgroup")


class StepResult:
    """What one step gave, perhaps still on its way from the device, or from the last stage."""

    def __init__(
        self,
        values: torch.Tensor,
        layout: OutputLayout,
        transfer: Transfer | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """transfer: of the values, if they come from another stage. stream: then a GPU's, for the copy to the host."""
        self._layout = layout
        self._event = None
        self._transfer = transfer  # the values stay allocated until the copy is done
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._event = torch.cuda.Event()
            with torch.cuda.stream(stream):
                if transfer is not None:
                    transfer.wait()
                self._values.copy_(values, non_blocking=True)
                self._event.record()
        else:
            self._values = values

    def wait(self) -> StepOutput:
        """Tokens, and what else was asked for."""
        if self._event is not None:
            self._event.synchronize()
        elif self._transfer is not None:
            self._transfer.wait()
        return self._layout.parse(self._values)


class TorchExecutor:
    """Executes plans. Holds a stage's weights and, once `prepare` is called, its KV cache and its slots' state."""

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
        self.num_stages = comm.parallel.pp
        if engine_config.weight_format == "w8a8":
            leave_out_amx()
        with torch.inference_mode():
            self.model = GPT(comm, reader, device, progress, engine_config.weight_format)
        self.max_seq_len = engine_config.max_seq_len or reader.config.max_pos_seq_len
        self.max_step_tokens = engine_config.max_step_tokens or (512 if device.type == "cpu" else 8192)
        self.max_mixed_tokens = engine_config.max_mixed_tokens
        self.max_draft_rows = _MAX_DRAFT_ROWS[device.type]
        self.num_blocks = 0
        self._workspace: torch.Tensor | None = None  # of kernels.decode_attention, on a GPU
        self._chooser: Chooser | None = None  # on a GPU, on the last stage
        self._returning: ReturningResults | None = None  # on the first of several stages
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # of results, beside the steps
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        self._draft_graphs: DraftGraphs | None = None

    def prepare(self) -> None:
        """Allocate the KV cache, as large on every rank as the rank with the least memory can."""
        config, limits, comm = self.model.config, self._limits, self.comm
        num_slots, max_seq_len = limits.max_batch_size, self.max_seq_len
        draft_rows = self.max_draft_rows if limits.speculative != "none" else 0
        if limits.all_reduce == "auto":
            comm.share_memory(config.hidden_size, self.model.dtype)
        shape = CacheShape(
            num_layers=len(comm.parallel.layers(config.num_layer)),
            block_size=limits.block_size,
            kv_heads_local=config.kv_heads_local(comm.parallel.tp),
            head_dim=config.size_per_head,
            dtype=FP8 if limits.kv_cache_dtype == "fp8" else self.model.dtype,
        )
        with torch.inference_mode():
            scales = calibrate(self.model, limits.weight_format, shape, max_seq_len)
        most = most_blocks(num_slots, max_seq_len, limits.block_size)
        memory = _memory_left(self.device, self._local_size) - SlotState.num_bytes(num_slots, max_seq_len)
        has_kernels = runs_on(self.device)  # then decode rows go through them, and steps of them through graphs
        if has_kernels:
            dtype, tp = self.model.dtype, comm.parallel.tp
            memory -= graphs.num_bytes(num_slots, draft_rows, config.vocab_size, max_seq_len, dtype, tp)
            memory -= prompt_graphs.num_bytes(config, self.max_step_tokens, self.model.dtype)
        most_bytes = max(0, memory) * limits.kv_cache_fraction
        self.num_blocks = comm.min_over_ranks(min(most, int(most_bytes / shape.bytes_per_block)))
        if self.num_blocks < 1:
            raise RuntimeError(f"no memory is left on {self.device} for a key-value cache; use more ranks")
        self.cache = KVCache(shape, self.num_blocks, self.device, scales)
        self.slots = SlotState(num_slots, max_seq_len, limits.block_size, self.num_blocks, self.device)
        if comm.parallel.pp > 1 and comm.parallel.is_first_stage:
            self._returning = ReturningResults(num_slots, self._keep_tokens)
        if has_kernels:
            heads_local = config.head_num // comm.parallel.tp
            rows = max_rows(num_slots + draft_rows)
            self._workspace = make_workspace(rows, heads_local, self.device)
            if comm.parallel.is_last_stage:
                self._chooser = Chooser(self.model.lm_head, self.slots, rows)
            if not limits.enforce_eager:
                with torch.inference_mode():
                    self._graphs = DecodeGraphs(self.model, self.cache, self.slots, self._workspace, self._chooser)
                    self._prompt_graphs = PromptGraphs(self.model, self.cache, self.slots, self.max_step_tokens)
                    if draft_rows and self._chooser is not None and comm.parallel.pp == 1:
                        self._draft_graphs = DraftGraphs(
                            self.model, self.cache, self.slots, self._workspace, self._chooser, draft_rows
                        )

    def close(self) -> None:
        """Receive what is on its way, and free what must go before the ranks leave their groups."""
        if self._returning is not None:
            self._returning.settle()
            self._returning = None  # it refers back: the executor's memory would stay until a collection
        self.comm.settle()
        for captured in (self._graphs, self._prompt_graphs, self._draft_graphs):
            if captured is not None:
                captured.close()

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult | None:
        """Compute one plan. Returns its output on rank 0, None elsewhere."""
        decode_graphs = self._graphs
        if decode_graphs is not None and not plan.chunks and len(plan.decode_slots) <= decode_graphs.most:
            return self._replay(plan, decode_graphs)
        if self._draft_graphs is not None and self._draft_graphs.fits(plan):
            return self._replay_drafts(plan, self._draft_graphs)
        hidden = self.hidden(plan)
        if self._is_middle_stage:
            return None
        layout = OutputLayout.of(plan, self.slots, self.model.config.vocab_size)
        if hidden is None:
            return self._deliver(layout, None)
        sampled = hidden[self.slots.tensor(layout.token_index)]
        logits = self.model.local_logits(sampled) if len(layout.rows) else hidden.new_empty(0)
        chosen = self._choose(layout, logits)
        row_logits = partial(self._row_logits, logits)
        return self._deliver(layout, gather(layout, chosen, row_logits, lambda part: self.model.logits(hidden[part])))

    @torch.inference_mode()
    def hidden(self, plan: Plan) -> torch.Tensor | None:
        """One pass over the plan's tokens: on the last stage, their hidden states [tokens, hidden]."""
        self._update(plan)
        self.slots.write_drafts(plan.chunks)
        self._leave_prompts(plan)
        num_decodes = len(plan.decode_slots)
        decode_rows = zip(plan.decode_slots.tolist(), plan.decode_positions.tolist(), strict=True)
        pieces = [(slot, position, 1) for slot, position in decode_rows]
        pieces += [(chunk.seq_slot, chunk.start, chunk.length) for chunk in plan.chunks]
        slots = np.repeat([slot for slot, *_ in pieces], [length for *_, length in pieces])
        positions = np.concatenate([np.arange(start, start + length) for _, start, length in pieces])
        if self._prompt_graphs is not None:
            residual = self._prompt_graphs.compute(slots, positions, pieces)
            if residual is not None:
                return self.model.send(residual)
        return self.model.forward(self._input(slots, positions, pieces, num_decodes), self.cache)

    def _replay(self, plan: Plan, decode_graphs: DecodeGraphs) -> StepResult | None:
        """A step of decode rows only, through a graph, which chooses the tokens of all rows but a few."""
        self._update(plan)
        if self._is_middle_stage:  # it gets no tokens, whose places are the next positions
            slots, positions = self.slots.tensor(np.stack([plan.decode_slots, plan.decode_positions]))
            self.slots.positions[slots] = positions
        found = decode_graphs.run(plan.decode_slots)
        if self._is_middle_stage:
            return None
        layout = OutputLayout.of(plan, self.slots, self.model.config.vocab_size)
        if found is None:
            return self._deliver(layout, None)
        return self._deliver(layout, self._values(layout, *found))

    def _replay_drafts(self, plan: Plan, draft_graphs: DraftGraphs) -> StepResult | None:
        """A step of drafts and decode rows through a graph, which chooses and appends all tokens but a few."""
        self._update(plan)
        layout = OutputLayout.of(plan, self.slots, self.model.config.vocab_size)
        values = self._values(layout, *draft_graphs.run(plan, layout.rows))
        return StepResult(values, layout) if self.comm.parallel.rank == 0 else None

    def _values(self, layout: OutputLayout, chosen: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the layout holds, of a step through a graph. Kernels can choose for all rows of slots with drafts."""
        chosen = self._choose_beyond(layout.rows, chosen, logits, appends=True)
        if layout.has_extras:
            return gather(layout, chosen, partial(self._row_logits, logits), lambda part: logits[:0])
        return chosen.flatten()

    def _row_logits(self, logits: torch.Tensor, index: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Some rows of the logits that each rank has its part of: [n, vocab] fp32, on every rank of the tp group."""
        return self.model.lm_head.gather(logits[self.slots.tensor(index)])

    @property
    def _is_middle_stage(self) -> bool:
        return not (self.comm.parallel.is_first_stage or self.comm.parallel.is_last_stage)

    def _deliver(self, layout: OutputLayout, values: torch.Tensor | None) -> StepResult | None:
        """Keep a step's tokens, and bring its output from the last stage, where `values` is given, to the first one."""
        is_rank_0 = self.comm.parallel.rank == 0
        if values is None:
            assert self._returning is not None
            # A number at least: so the first stage is never further ahead of the last one than its plans are.
            values = torch.empty(max(1, sum(layout.sizes)), dtype=torch.float64, device=self.device)
            transfer = self.comm.receive_results(values)
            self._returning.add(layout, transfer)
            return StepResult(values, layout, transfer, self._copies) if is_rank_0 else None
        # Kernels append the tokens that they choose, but not where there are drafts.
        if self._chooser is None or layout.has_drafts:
            self._keep_tokens(layout, values)
        if self.num_stages > 1:  # the next step writes over a graph's values
            self.comm.return_results(values.clone() if len(values) else values.new_zeros(1))
        return StepResult(values, layout) if is_rank_0 else None

    def _choose(self, layout: OutputLayout, logits: torch.Tensor) -> torch.Tensor:
        """Choose each row's token: [2, rows] fp64. Kernels also append it to its sequence, if there are no drafts."""
        rows = layout.rows
        if not len(rows):
            return logits.new_empty(2, 0, dtype=torch.float64)
        if self._chooser is None:
            return self.model.lm_head.choose(logits, lambda whole, part: choose(rows.part(part), whole))
        slots, positions = rows.on_device
        if layout.has_drafts:  # a slot may have several rows
            chosen = self._chooser.choose(logits, slots, positions)
        else:
            self.slots.positions[slots] = positions - self.slots.advance[slots]
            chosen = self._chooser.append(logits, slots)
        return self._choose_beyond(rows, chosen, logits, appends=not layout.has_drafts)

    def _choose_beyond(
        self, rows: SamplingRows, chosen: torch.Tensor, logits: torch.Tensor, appends: bool
    ) -> torch.Tensor:
        """Choose again for the rows that kernels cannot choose for; appends: and append those tokens."""
        for index in in_batches(rows.beyond_kernels()):
            own = rows.part(index)
            own_chosen = choose(own, self._row_logits(logits, index))
            if appends:
                slots, positions = own.on_device
                self.slots.append(slots, positions, own_chosen[0].long())
            chosen = chosen.index_copy(1, self.slots.tensor(index), own_chosen)
        return chosen

    def _keep_tokens(self, layout: OutputLayout, values: torch.Tensor) -> None:
        rows = layout.rows
        if len(rows):
            slots, positions = rows.on_device
            keep = self.slots.accept if layout.has_drafts else self.slots.append
            keep(slots, positions, values[: len(rows)].long())

    def _update(self, plan: Plan) -> None:
        if self._returning is not None:
            self._returning.take_for(plan)
        self.slots.start(plan.new_sequences)
        self.slots.grow(plan.new_blocks)
        for reorder in plan.beam_reorders:
            self.slots.reorder(reorder)

    def _input(
        self, slots: np.ndarray, positions: np.ndarray, pieces: Sequence[tuple[int, int, int]], num_decodes: int
    ) -> StepInput:
        """slots, positions: [tokens]; pieces: (slot, first position, length), the first `num_decodes` of one token."""
        state = self.slots
        table = state.kv_loc_table
        seq_slots, token_positions = state.tensor(np.stack([slots, positions]))
        decode_slots, decode_positions = seq_slots[:num_decodes], token_positions[:num_decodes]
        decodes = prompts = ragged = None
        chunks: list[PrefillChunk] = []
        first_loc = 0  # the decode kernel stores keys and values of the rows before it
        if self._workspace is not None:
            first_loc = num_decodes
            if num_decodes:
                decodes = DecodeMetadata(table, decode_slots, decode_positions, self._workspace)
            if len(pieces) > num_decodes:
                prompts = PromptMetadata(table, state.tensor(make_tiles(pieces[num_decodes:])))
        else:
            row = 0
            if num_decodes >= MIN_ROWS and can_batch(self.cache.dtype, self.device):
                row = num_decodes
                ragged = self.model.attention.ragged_rows(table, decode_slots, decode_positions, self.cache.num_locs)
            for slot, start, length in pieces[row:]:
                chunks.append(state.chunk(slot, row, start, length))
                row += length
        kv_locs = None
        if len(slots) > first_loc:
            kv_locs = table[seq_slots[first_loc:], token_positions[first_loc:]].long()
        return StepInput(state.token_ids, seq_slots, token_positions, kv_locs, decodes, prompts, ragged, chunks)

    def _leave_prompts(self, plan: Plan) -> None:
        """Set the positions of sequences whose chunk samples nothing: the next step goes on after it."""
        ends = [(chunk.seq_slot, chunk.start + chunk.length) for chunk in plan.chunks if not chunk.sampled_slots]
        if ends:
            slots, positions = self.slots.tensor(np.array(ends).T)
            self.slots.positions[slots] = positions


def _memory_left(device: torch.device, local_size: int) -> int:
    """Bytes that this rank may still take: the GPU's free memory, or its share of half the host's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took and gave back
        return torch.cuda.mem_get_info(device)[0]
    return host_memory() // 2 // local_size


def host_memory() -> int:
    """Bytes that new programs may take without swapping: of this host or, where it has a limit, this container."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where it has one
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, max(0, limit - used))
    return available


def computation_dtype(data_type: str, device: torch.device) -> torch.dtype:
    """The torch dtype for --data-type; raises ValueError for one that the device cannot compute well."""
    if data_type == "auto":
        data_type = "fp32"
        if device.type == "cuda":
            data_type = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and data_type == "fp16":
        raise ValueError("data_type is fp16; on a CPU it must be fp32 or bf16")
    return TORCH_DTYPES[data_type]
