"""Start-up's measure of what quantization costs, and the scales of an fp8 cache: a few passes over probe tokens.

The probe has a few sequences: the model's start token, then random ids of its vocabulary. Real text is more certain of
its next tokens, so its share of equal tokens is higher than the probe's. The unquantized model is never in memory as a
whole: its layers are read again, one at a time, while the probe passes through them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from executor.collectives import Comm
from executor.kv_cache import CacheShape, KVCache, KVScales, PrefillChunk
from executor.model import GPT, StepInput
from kernels import runs_on
from kernels.fp8 import FP8, FP8_MAX
from kernels.prompt_attention import PromptMetadata, make_tiles

_LOG = logging.getLogger("engine")
_SEQUENCES = 4
_LENGTH = 64  # tokens of each, or as many as the model takes
_MARGIN = 2.0  # a head's scale leaves room for keys and values this many times the probe's largest


def calibrate(model: GPT, weight_format: str, shape: CacheShape, max_seq_len: int) -> list[KVScales] | None:
    """Log the error of quantized weights and of an fp8 cache; return the scales of the latter, one pair a layer.

    shape: of the cache to come. Collective: all ranks pass the probe on as they do any step.
    """
    if weight_format == "none" and shape.dtype != FP8:
        return None
    probe = _Probe(model, shape, max_seq_len)
    logits, cache = probe.run()
    if weight_format != "none":
        plain_logits, _ = probe.run(is_quantized=False)
        _report(f"{weight_format} weights", model.comm, logits, plain_logits, model.device)
    scales = None
    if shape.dtype == FP8:
        scales = [KVScales(*(head_scales(part[:-1]) for part in (layer.keys, layer.values))) for layer in cache.layers]
        rounded_logits, _ = probe.run(scales)
        _report("fp8 key-value cache", model.comm, rounded_logits, logits, model.device)
    del cache
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what the passes took is the cache's now
    return scales


def head_scales(part: torch.Tensor) -> torch.Tensor:
    """Scales [kv_heads] fp32 of keys or values [tokens, kv_heads, head_dim], so that fp8 holds _MARGIN times each.

    They are powers of two. A head of zeros, or with a value that is not finite, has the scale 1.
    """
    most = part.float().abs().amax((0, 2)) * (_MARGIN / FP8_MAX)
    is_usable = most.isfinite() & (most > 0)
    return torch.where(is_usable, most.where(is_usable, 1).log2().ceil().exp2(), 1)


class _Probe:
    """The probe's tokens as one step of prompts."""

    def __init__(self, model: GPT, shape: CacheShape, max_seq_len: int) -> None:
        config, device = model.config, model.device
        length = min(_LENGTH, max_seq_len)
        token_ids = np.random.default_rng(0).integers(0, config.vocab_size, (_SEQUENCES, length))
        token_ids[:, 0] = config.start_id
        self._model = model
        self._shape = shape._replace(block_size=length)
        kv_locs = torch.arange(_SEQUENCES * length, device=device)
        prompts, chunks = None, []
        if runs_on(device):
            tiles = make_tiles((slot, 0, length) for slot in range(_SEQUENCES))
            table = kv_locs.view(_SEQUENCES, length).int()
            prompts = PromptMetadata(table, torch.from_numpy(tiles).to(device))
        else:
            firsts = range(0, len(kv_locs), length)
            chunks = [PrefillChunk(first, length, length, slice(first, first + length)) for first in firsts]
        self._step = StepInput(
            token_ids=torch.from_numpy(token_ids).to(device),
            slots=kv_locs // length,
            positions=kv_locs % length,
            kv_locs=kv_locs,
            prompts=prompts,
            chunks=chunks,
        )

    def run(
        self, scales: Sequence[KVScales] | None = None, is_quantized: bool = True
    ) -> tuple[torch.Tensor | None, KVCache]:
        """Logits [tokens, vocab] fp32 on the last stage, and the cache that was written, with the dummy location.

        scales: of an fp8 cache; None: it is in the computation's dtype. is_quantized: by the loaded weights, not by
        those in the computation's dtype.
        """
        model = self._model
        dtype = model.dtype if scales is None else FP8
        cache = KVCache(self._shape._replace(dtype=dtype), _SEQUENCES, model.device, scales)
        hidden = model.forward(self._step, cache, None if is_quantized else model.unquantized_layers())
        if hidden is None:
            return None, cache
        return model.logits(hidden, lm_head=None if is_quantized else model.unquantized_lm_head()), cache


def _report(
    name: str, comm: Comm, logits: torch.Tensor | None, expected: torch.Tensor | None, device: torch.device
) -> None:
    """Rank 0 logs ‖logits − expected‖ / ‖expected‖ and the share of tokens with the same largest logit."""
    figures = torch.zeros(3, dtype=torch.float64, device=device)
    if logits is not None and expected is not None:
        figures[0] = (logits - expected).norm() / expected.norm()
        figures[1] = (logits.argmax(1) == expected.argmax(1)).double().mean()
        figures[2] = len(logits)
    if comm.parallel.pp > 1 and comm.parallel.is_last_stage:
        comm.return_results(figures)
    elif comm.parallel.pp > 1 and comm.parallel.is_first_stage:
        comm.receive_results(figures).wait()
    if comm.parallel.rank == 0:
        error, share, count = figures.tolist()
        _LOG.info(
            "%s: relative error of the logits %.2e, the same next token at %.1f %% of %d probe tokens",
            name,
            error,
            100 * share,
            count,
        )
