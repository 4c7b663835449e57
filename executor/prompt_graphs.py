"""Steps with pieces of prompts as CUDA graphs: one launch for all of a stage's kernels up to the hidden states.

A graph serves every step of up to its number of tokens. Its input has the slots, the positions and the tiles. A decode
row is a piece of one token. The LM head and the choice of tokens are launched while the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from executor.graphs import capture, release, sizes_up_to
from executor.kv_cache import KVCache
from executor.model import GPT, StepInput
from executor.slots import SlotState
from kernels.prompt_attention import TILE_ROWS, PromptMetadata, make_tiles
from weights.model_config import ModelConfig

# Larger steps take the GPU longer than their launches take the host.
_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_TILE_FIELDS = 4


def num_bytes(config: ModelConfig, max_step_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a GPU's memory that the graphs take, nearly."""
    widths = 6 * config.hidden_size + 2 * config.inter_size * (2 if config.activation_type == "swiglu" else 1)
    return sizes_up_to(max_step_tokens, _SIZES)[-1] * widths * dtype.itemsize


def _num_tiles(size: int) -> int:
    """Tiles of a graph: the full ones, and one that is not full for each piece, of up to 256."""
    return size // TILE_ROWS + min(size, 256)


class PromptGraphs:
    """One graph for each number of tokens, captured when this is made: every rank must make it."""

    def __init__(self, model: GPT, cache: KVCache, slots: SlotState, max_step_tokens: int) -> None:
        """Raises RuntimeError where a graph cannot be made."""
        self._model = model
        self._cache = cache
        self._slots = slots
        self._sizes = sizes_up_to(max_step_tokens, _SIZES)
        most = self._sizes[-1]
        # The slots and positions of a step's tokens, then its tiles. Zeros: captures write to the dummy's KV location.
        self._inputs = torch.zeros(2 * most + _TILE_FIELDS * _num_tiles(most), dtype=torch.int64, device=slots.device)
        self._received = model.new_residual(most)
        self._graphs = capture("steps with prompts", self._sizes, self._step, slots.device)

    def close(self) -> None:
        """Free the graphs."""
        release(self._graphs, self._slots.device)

    def compute(
        self, seq_slots: np.ndarray, positions: np.ndarray, pieces: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor | None:
        """Compute the stage's residual [tokens, hidden_size], not sent yet; None where no graph fits the step.

        seq_slots, positions: [tokens] int64; pieces: as `make_tiles` takes them. The next step overwrites the result.
        """
        num_tokens = len(seq_slots)
        size = next((size for size in self._sizes if size >= num_tokens), None)
        if size is None:
            return None
        tiles = make_tiles(pieces)
        if len(tiles) > _num_tiles(size):
            return None
        values = np.zeros(2 * size + _TILE_FIELDS * _num_tiles(size), dtype=np.int64)
        values[:size] = self._slots.dummy_slot
        values[:num_tokens] = seq_slots
        values[size : size + num_tokens] = positions
        values[2 * size : 2 * size + tiles.size] = tiles.ravel()
        self._inputs[: len(values)].copy_(torch.from_numpy(values), non_blocking=True)
        graph, residual = self._graphs[size]
        self._model.receive(num_tokens, self._received)
        graph.replay()
        return residual[:num_tokens]

    def _step(self, size: int) -> torch.Tensor:
        slots = self._slots
        seq_slots, positions = self._inputs[:size], self._inputs[size : 2 * size]
        tiles = self._inputs[2 * size :][: _TILE_FIELDS * _num_tiles(size)].view(-1, _TILE_FIELDS)
        kv_locs = slots.kv_loc_table[seq_slots, positions].long()
        prompts = PromptMetadata(slots.kv_loc_table, tiles)
        step = StepInput(slots.token_ids, seq_slots, positions, kv_locs, prompts=prompts)
        return self._model.compute(step, self._cache, self._received[:size])
