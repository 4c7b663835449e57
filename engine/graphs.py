"""Decode steps as CUDA graphs: one launch for a step of up to so many sequences, where each kernel took its own.

Owns the graphs and the memory they read and write. A graph looks up its tokens and their places on the device, so
that a step needs its slots and positions only; rows that fill it up belong to a slot of nobody's.
"""

from __future__ import annotations

import torch

from engine.cache import Decodes, KVCache
from engine.model import GPT, StepInput

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def max_rows(num_slots: int) -> int:
    """Of the largest graph, where at most `num_slots` sequences run."""
    return next((size for size in _SIZES if size >= num_slots), num_slots)


class DecodeGraphs:
    """One graph for each batch size, captured when this is made: every rank must make it."""

    def __init__(self, model: GPT, cache: KVCache, tokens: torch.Tensor, counters: torch.Tensor) -> None:
        """tokens: [slots + 1, max_seq_len] int64, what each slot has so far; graphs read it and write to it.

        counters: of kernels.decode_attention, for `max_rows` of as many slots.
        """
        self._model = model
        self._cache = cache
        self._tokens = tokens
        self._nobody = len(tokens) - 1
        self._counters = counters
        device, most = tokens.device, max_rows(self._nobody)
        self._sizes = [size for size in _SIZES if size < most] + [most]
        self._inputs = torch.zeros(2, most, dtype=torch.int64, device=device)
        self._inputs[0] = self._nobody
        # One for all graphs: a buffer each would add up to gigabytes with a large vocabulary.
        self._logits = torch.empty(most, model.config.vocab_size, dtype=torch.float32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._capture()

    def run(self, slots: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the tokens at the positions [rows], one per slot, and what follows each.

        Returns ([2 · rows] fp64: each row's likeliest token, then its log-probability; logits [rows, vocab] fp32). The
        likeliest token is written to `tokens` at the position that follows. Both are overwritten by the next step.
        """
        rows = len(slots)
        size = next(size for size in self._sizes if size >= rows)
        fill = size - rows
        own = torch.tensor([slots + [self._nobody] * fill, positions + [0] * fill])
        self._inputs[:, :size].copy_(own, non_blocking=True)
        graph, values = self._graphs[size]
        graph.replay()
        return values[:, :rows].flatten(), self._logits[:rows]

    def _capture(self) -> None:
        stream, pool = torch.cuda.Stream(), None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
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
        slots, positions = self._inputs[:, :size]
        places = self._cache.table[slots, positions].long()
        decodes = Decodes(self._cache.table, slots, positions, self._counters)
        x = self._model.forward(StepInput(self._tokens[slots, positions], positions, places, [], decodes), self._cache)
        logits = self._model.logits(x, out=self._logits[:size])
        log_probs, token_ids = logits.max(dim=-1)
        log_probs = log_probs - logits.logsumexp(dim=-1)
        following = (positions + 1).clamp_max(self._tokens.shape[1] - 1)
        self._tokens[slots, following] = token_ids
        return torch.stack([token_ids.double(), log_probs.double()])
