"""Decode steps as CUDA graphs: one launch for a step of up to so many sequences, where each kernel took its own.

Owns the graphs and the memory they read and write. A graph looks up its tokens and their kv_locs on the device, so
that a step needs its slots and positions only; rows that fill it up belong to a slot of nobody's.
"""

from __future__ import annotations

import logging
import time

import torch

from executor.kv_cache import DecodeMetadata, KVCache
from executor.model import GPT, StepInput

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SMALL_THINGS = 256 << 20  # bytes of all that `num_bytes` does not count one by one
_LOG = logging.getLogger("engine")


def num_bytes(num_slots: int, max_seq_len: int, vocab_size: int, dtype: torch.dtype) -> int:
    """About what the graphs of so many sequences, and the table of kv_locs, take of a GPU's memory."""
    wide = 4 + 4  # the logits, and as much while their logsumexp is computed
    parts = 3 * dtype.itemsize  # as they are computed; gathered over the ranks; put side by side
    return _SMALL_THINGS + num_slots * max_seq_len * 4 + _sizes(num_slots)[-1] * vocab_size * (wide + parts)


def _sizes(num_slots: int) -> list[int]:
    """The graphs' sizes where at most `num_slots` sequences run; larger steps than the last have none."""
    larger = [size for size in _SIZES if size >= num_slots]
    return [size for size in _SIZES if size < num_slots] + larger[:1]


def max_rows(num_slots: int) -> int:
    """The most rows that any step has, those of nobody included."""
    return max(num_slots, _sizes(num_slots)[-1])


class DecodeGraphs:
    """One graph for each batch size, captured when this is made: every rank must make it."""

    def __init__(self, model: GPT, cache: KVCache, tokens: torch.Tensor, workspace: torch.Tensor) -> None:
        """tokens: [slots + 1, max_seq_len] int64, what each slot has so far; graphs read it and write to it.

        workspace: of kernels.decode_attention, for `max_rows` of as many slots. Raises RuntimeError where a graph
        cannot be made.
        """
        self._model = model
        self._cache = cache
        self._tokens = tokens
        self._nobody = len(tokens) - 1
        self._workspace = workspace
        self._sizes = _sizes(self._nobody)
        self.most = self._sizes[-1]
        # Slots and positions of a step, one after the other, so that one copy brings both.
        self._inputs = torch.zeros(2 * max(2, self.most), dtype=torch.int64, device=tokens.device)
        # One for all graphs: a buffer each would add up to gigabytes with a large vocabulary.
        self._logits = torch.empty(self.most, model.config.vocab_size, dtype=torch.float32, device=tokens.device)
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
        torch.cuda.synchronize(self._tokens.device)
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def run(self, slots: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the tokens at the positions [rows], one per slot, at most `most`, and what follows each.

        Returns ([2 · rows] fp64: each row's likeliest token, then its log-probability; logits [rows, vocab] fp32). The
        likeliest token is written to `tokens` at the position that follows. Both are overwritten by the next step.
        """
        rows = len(slots)
        size = next(size for size in self._sizes if size >= rows)
        inputs = self._inputs_of(size)
        fill = inputs.shape[1] - rows
        own = torch.tensor([slots + [self._nobody] * fill, positions + [0] * fill])
        inputs.copy_(own, non_blocking=True)
        graph, values = self._graphs[size]
        graph.replay()
        return values[:, :rows].flatten(), self._logits[:rows]

    def _inputs_of(self, size: int) -> torch.Tensor:
        """[2, size] int64, slots and positions; of an even size, as kernels are compiled anew for odd addresses."""
        width = max(2, size)
        return self._inputs[: 2 * width].view(2, width)

    def _capture(self) -> None:
        stream, pool = torch.cuda.Stream(), None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._inputs_of(size)[0] = self._nobody
                self._inputs_of(size)[1] = 0
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
        slots, positions = self._inputs_of(size)[:, :size]
        kv_locs = self._cache.table[slots, positions].long()
        decodes = DecodeMetadata(self._cache.table, slots, positions, self._workspace)
        x = self._model.forward(StepInput(self._tokens[slots, positions], positions, kv_locs, [], decodes), self._cache)
        logits = self._model.logits(x, out=self._logits[:size])
        log_probs, token_ids = logits.max(dim=-1)
        log_probs = log_probs - logits.logsumexp(dim=-1)
        following = (positions + 1).clamp_max(self._tokens.shape[1] - 1)
        self._tokens[slots, following] = token_ids
        return torch.stack([token_ids.double(), log_probs.double()])
