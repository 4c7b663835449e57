"""Decode steps as CUDA graphs: one launch for the kernels of a step.

Owns the graphs and the memory that they read and write. A graph reads tokens, positions and KV locations from the
slots' state, so a step needs its slots only. Padding rows use the dummy slot.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from executor.kv_cache import DecodeMetadata, KVCache
from executor.model import GPT, StepInput
from executor.slots import SlotState

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SMALL_THINGS = 256 << 20  # bytes of all that `num_bytes` does not count one by one
_LOG = logging.getLogger("engine")


def num_bytes(num_slots: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes of a GPU's memory that the graphs of `num_slots` sequences take, nearly."""
    wide = 4 + 4  # the logits, and as much while their logsumexp is computed
    parts = 3 * dtype.itemsize  # as they are computed; gathered over the ranks; put side by side
    return _SMALL_THINGS + _sizes(num_slots)[-1] * vocab_size * (wide + parts)


def _sizes(num_slots: int) -> list[int]:
    """The graphs' sizes where at most `num_slots` sequences run; larger steps than the last have none."""
    larger = [size for size in _SIZES if size >= num_slots]
    return [size for size in _SIZES if size < num_slots] + larger[:1]


def max_rows(num_slots: int) -> int:
    """The most rows that any step has, padding rows included."""
    return max(num_slots, _sizes(num_slots)[-1])


class DecodeGraphs:
    """One graph for each batch size, captured when this is made: every rank must make it."""

    def __init__(self, model: GPT, cache: KVCache, slots: SlotState, workspace: torch.Tensor) -> None:
        """slots: graphs read and write it. workspace: of kernels.decode_attention, for `max_rows` of as many slots.

        Raises RuntimeError where a graph cannot be made.
        """
        self._model = model
        self._cache = cache
        self._slots = slots
        self._workspace = workspace
        self._sizes = _sizes(slots.dummy_slot)
        self.most = self._sizes[-1]
        self._inputs = torch.zeros(self.most, dtype=torch.int64, device=slots.device)  # the slots of a step
        # One for all graphs: a buffer for each would add up to gigabytes with a large vocabulary.
        self._logits = torch.empty(self.most, model.config.vocab_size, dtype=torch.float32, device=slots.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        started = time.monotonic()
        try:
            self._capture()
        except Exception as error:  # Triton's and CUDA's own kinds too
            cause = error.__context__ or error  # ending a capture that failed fails again
            raise RuntimeError(f"the CUDA graphs of decode steps cannot be made: {cause}") from error
        _LOG.info("%d CUDA graphs captured in %.1f s", len(self._graphs), time.monotonic() - started)

    def close(self) -> None:
        """Free the graphs: NCCL would wait for ever to leave a group whose operations one of them holds."""
        torch.cuda.synchronize(self._slots.device)
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def run(self, seq_slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the next token of each slot [rows], at most `most`, and the logits after it.

        Returns ([2 · rows] fp64: each row's likeliest token, then its log-probability; logits [rows, vocab] fp32). The
        likeliest token goes into the slots' state, as their next one. The next step overwrites both results.
        """
        rows = len(seq_slots)
        size = next(size for size in self._sizes if size >= rows)
        padded = np.full(size, self._slots.dummy_slot, dtype=np.int64)
        padded[:rows] = seq_slots
        self._inputs[:size].copy_(torch.from_numpy(padded), non_blocking=True)
        graph, values = self._graphs[size]
        graph.replay()
        return values[:, :rows].flatten(), self._logits[:rows]

    def _capture(self) -> None:
        stream, pool = torch.cuda.Stream(), None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._inputs[:size] = self._slots.dummy_slot
                self._step(size)  # compiles, and makes what must not be made while capturing
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                # thread_local: NCCL's own thread asks for its events meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    values = self._step(size)
                pool = pool or graph.pool()
                self._graphs[size] = graph, values
        torch.cuda.current_stream().wait_stream(stream)

    def _step(self, size: int) -> torch.Tensor:
        slots, seq_slots = self._slots, self._inputs[:size]
        positions = slots.positions[seq_slots]
        kv_locs = slots.kv_loc_table[seq_slots, positions].long()
        decodes = DecodeMetadata(slots.kv_loc_table, seq_slots, positions, self._workspace)
        step = StepInput(slots.token_ids[seq_slots, positions], positions, kv_locs, [], decodes)
        hidden = self._model.forward(step, self._cache)
        assert hidden is not None, "graphs are made for one pipeline stage only"
        logits = self._model.logits(hidden, out=self._logits[:size])
        log_probs, token_ids = logits.max(dim=-1)
        log_probs = log_probs - logits.logsumexp(dim=-1)
        slots.append(seq_slots, positions + slots.advance[seq_slots], token_ids)
        return torch.stack([token_ids.double(), log_probs.double()])
