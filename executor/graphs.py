"""Decode steps as CUDA graphs: one launch for the kernels of a step.

Owns the graphs and the memory that they read and write. A graph reads tokens, positions and KV locations from the
slots' state, so a step needs its slots only. Padding rows use the dummy slot. A pipeline stage's graphs are its part of
the step; what stages send each other is sent between graphs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from executor.chooser import Chooser, most_rows
from executor.kv_cache import KVCache
from executor.model import GPT, StepInput
from executor.slots import SlotState
from executor.token_choice import MOST_ROWS_ASKED
from kernels import choose_tokens
from kernels.compile_ahead import compile_ahead
from kernels.decode_attention import DecodeMetadata

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SMALL_THINGS = 256 << 20  # bytes of all that `num_bytes` does not count one by one
_LOG = logging.getLogger("engine")


def num_bytes(num_slots: int, draft_rows: int, vocab_size: int, max_seq_len: int, dtype: torch.dtype, tp: int) -> int:
    """Bytes of a GPU's memory that the graphs of `num_slots` sequences take, nearly.

    draft_rows: rows that a step may have beyond one for each sequence.
    """
    most = sizes_up_to(num_slots, _SIZES)[-1] + draft_rows
    chosen = most_rows(max_rows(num_slots + draft_rows), tp)
    # This rank's part of the vocabulary: the graphs', and a step's without a graph, which may be computed in 16 bits.
    local = 2 * (4 if tp == 1 else dtype.itemsize) + dtype.itemsize
    # Whole rows, to choose from, at tp 1 without a copy; and those that were asked for, with what comes of them.
    whole = 2 * dtype.itemsize + 4  # gathered over the ranks; put side by side; in fp32
    num_whole = min(most, MOST_ROWS_ASKED) + (chosen if tp > 1 else 0)
    logits = most * -(-vocab_size // tp) * local + num_whole * vocab_size * whole
    return _SMALL_THINGS + logits + choose_tokens.workspace_bytes(chosen, vocab_size, max_seq_len)


def sizes_up_to(most: int, sizes: Sequence[int]) -> list[int]:
    """The sizes of graphs for steps of at most `most`; larger steps than the last have none."""
    larger = [size for size in sizes if size >= most]
    return [size for size in sizes if size < most] + larger[:1]


def max_rows(num_slots: int) -> int:
    """The most rows that any step has, padding rows included."""
    return max(num_slots, sizes_up_to(num_slots, _SIZES)[-1])


Graphs = dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]]  # size → a graph, and what it computes


def capture(name: str, sizes: Sequence[int], step: Callable[[int], torch.Tensor], device: torch.device) -> Graphs:
    """A graph of step(size) for each size, ascending; they share their memory.

    Raises RuntimeError with the name where one cannot be made.
    """
    _LOG.info("making %d CUDA graphs of %s", len(sizes), name)
    started = time.monotonic()
    graphs: Graphs = {}
    stream, pool = torch.cuda.Stream(), None
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            with compile_ahead(device):
                for size in sizes:
                    step(size)
            compiled = time.monotonic()
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                step(size)  # makes what must not be made while capturing
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                # thread_local: NCCL's own thread asks for its events meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    values = step(size)
                pool = pool or graph.pool()
                graphs[size] = graph, values
    except Exception as error:  # Triton's and CUDA's own kinds too
        cause = error.__context__ or error  # ending a capture that failed fails again
        raise RuntimeError(f"the CUDA graphs of {name} cannot be made: {cause}") from error
    torch.cuda.current_stream().wait_stream(stream)
    seconds = compiled - started, time.monotonic() - compiled
    _LOG.info("%d CUDA graphs of %s: compiled in %.1f s, captured in %.1f s", len(graphs), name, *seconds)
    return graphs


def release(graphs: Graphs, device: torch.device) -> None:
    """Free graphs: NCCL would wait for ever to leave a group whose operations one of them holds."""
    torch.cuda.synchronize(device)
    for graph, _ in graphs.values():
        graph.reset()
    graphs.clear()


class DecodeGraphs:
    """One graph for each batch size, captured when this is made: every rank must make it."""

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        slots: SlotState,
        workspace: torch.Tensor,
        chooser: Chooser | None,
    ) -> None:
        """slots: graphs read and write it. workspace: of kernels.decode_attention. chooser: on the last stage only.
        Both are for `max_rows` of as many slots.

        Raises RuntimeError where a graph cannot be made.
        """
        self._model = model
        self._cache = cache
        self._slots = slots
        self._workspace = workspace
        self._sizes = sizes_up_to(slots.dummy_slot, _SIZES)
        self.most = self._sizes[-1]
        # The slots of a step.
        self._inputs = torch.full((self.most,), slots.dummy_slot, dtype=torch.int64, device=slots.device)
        # One for all graphs: a buffer for each would add up to gigabytes with a large vocabulary.
        self._logits = model.new_local_logits(self.most if chooser is not None else 0)
        self._received = model.new_residual(self.most)
        self._chooser = chooser
        self._graphs = capture("decode steps", self._sizes, self._step, slots.device)

    def close(self) -> None:
        """Free the graphs."""
        release(self._graphs, self._slots.device)

    def run(self, seq_slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compute the next token of each slot [rows], at most `most`, and choose the token after it.

        Returns ([2, rows] fp64: the chosen tokens, then their log-probabilities; this rank's part of the logits, as of
        GPT.local_logits). The chosen tokens go into the slots' state, as their next ones. The next step overwrites both
        results. A stage before the last one sends its residual instead, and returns None.
        """
        rows = len(seq_slots)
        size = next(size for size in self._sizes if size >= rows)
        padded = np.full(size, self._slots.dummy_slot, dtype=np.int64)
        padded[:rows] = seq_slots
        self._inputs[:size].copy_(torch.from_numpy(padded), non_blocking=True)
        graph, values = self._graphs[size]
        self._model.receive(rows, self._received)
        graph.replay()
        if self._chooser is None:
            self._model.send(values[:rows])
            return None
        return values[:, :rows], self._logits[:rows]

    def _step(self, size: int) -> torch.Tensor:
        slots, seq_slots = self._slots, self._inputs[:size]
        positions = slots.positions[seq_slots]
        decodes = DecodeMetadata(slots.kv_loc_table, seq_slots, positions, self._workspace)
        step = StepInput(slots.token_ids, seq_slots, positions, None, decodes)
        hidden = self._model.compute(step, self._cache, self._received[:size])
        if self._chooser is None:
            return hidden
        return self._chooser.append(self._model.local_logits(hidden, out=self._logits[:size]), seq_slots)
