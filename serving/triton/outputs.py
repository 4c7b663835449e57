"""Generations → Triton's output tensors.

A batched answer is [rows, sequences, …], a row per prompt and a sequence per sample or beam. A stream's answers have
no batch dimension. Strings end in a dimension of 1, as in FasterTransformer's examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.request import CANCELLED, Output
from serving.generation import Generation, Update

# name -> (dtype, shape without the batch's dimension)
OUTPUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "sentences": (bytes, (-1, 1)),
    "sequence_length": (np.int64, (-1,)),
    "cum_log_probs": (np.float32, (-1,)),
    "finish_reason": (bytes, (-1, 1)),
    "output_ids": (np.int32, (-1, -1)),
    # where asked for:
    "output_log_probs": (np.float32, (-1, -1)),
    "top_token_ids": (np.int32, (-1, -1, -1)),
    "top_log_probs": (np.float32, (-1, -1, -1)),
    "prompt_log_probs": (np.float32, (-1,)),
    "next_token_logits": (np.float32, (-1,)),
}


class Answers:
    """Makes the arrays of answers.

    end_ids: the model's; its first one pads output_ids where a request has none. vocab_size: values of
    next_token_logits.
    """

    def __init__(self, end_ids: tuple[int, ...], vocab_size: int) -> None:
        self._pad_id = end_ids[0] if end_ids else 0
        self._vocab_size = vocab_size

    def whole(self, generations: Sequence[Generation]) -> dict[str, np.ndarray]:
        """The batched answer of prompts that have ended."""
        return self._batched(generations, [generation.texts() for generation in generations])

    def piece(self, update: Update) -> dict[str, np.ndarray]:
        """One answer of a stream of one sequence: new text and tokens, and in the last one everything else."""
        tokens = _token_arrays(update.generation, [update.output], update.new)
        if update.finish_reason is None:
            return {"sentences": _bytes([[update.text]]), **tokens}
        return unbatched(self._batched([update.generation], [[update.text]])) | tokens

    def _batched(self, generations: Sequence[Generation], texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """texts: one for each output of each generation.

        Rows with fewer sequences, tokens or alternatives than others are padded: with empty text, an end token, 0.
        """
        width = max(len(generation.outputs) for generation in generations)
        sentences, reasons, lengths, sums = [], [], [], []
        for generation, own_texts in zip(generations, texts, strict=True):
            outputs, missing = generation.outputs, width - len(generation.outputs)
            sentences.append([[text] for text in own_texts] + [[""]] * missing)
            reasons.append([[output.finish_reason] for output in outputs] + [[""]] * missing)
            prompt_len = len(generation.prompt_ids)
            lengths.append([prompt_len + len(output.token_ids) for output in outputs] + [0] * missing)
            sums.append([output.cum_log_prob for output in outputs] + [0.0] * missing)
        pad_ids = [generation.end_ids[0] if generation.end_ids else self._pad_id for generation in generations]
        ids = [[g.prompt_ids + output.token_ids for output in g.outputs] for g in generations]
        arrays = {
            "sentences": _bytes(sentences),
            "sequence_length": np.array(lengths, dtype=np.int64),
            "finish_reason": _bytes(reasons),
            "output_ids": _padded(ids, np.int32, pad_ids),
        }
        if not np.isnan(sums).any():  # FasterTransformer's op knows the sums of whole texts only, and JSON has no NaN
            arrays["cum_log_probs"] = np.array(sums, dtype=np.float32)
        return arrays | self._extras(generations)

    def _extras(self, generations: Sequence[Generation]) -> dict[str, np.ndarray]:
        """The arrays that some row asks for; the other rows have zeros."""
        arrays = {}
        extras = [_token_arrays(generation, generation.outputs, slice(None)) for generation in generations]
        for name in ("output_log_probs", "top_token_ids", "top_log_probs"):
            if any(name in extra for extra in extras):
                rows = [extra[name].tolist() if name in extra else [] for extra in extras]
                arrays[name] = _padded(rows, OUTPUTS[name][0])
        if any(g.request.sampling.prompt_log_probs for g in generations):
            rows = [[0.0, *g.prompt_log_probs] if g.request.sampling.prompt_log_probs else [] for g in generations]
            arrays["prompt_log_probs"] = _padded(rows, np.float32)
        if any(g.request.sampling.next_token_logits for g in generations):
            none = np.zeros(self._vocab_size)
            rows = [none if g.next_token_logits is None else g.next_token_logits for g in generations]
            arrays["next_token_logits"] = np.array(rows, dtype=np.float32)
        return arrays


def stopped(num_rows: int) -> dict[str, np.ndarray]:
    """The batched answer of a request that stops others."""
    return {
        "sentences": _bytes([[[""]]] * num_rows),
        "sequence_length": np.zeros((num_rows, 1), dtype=np.int64),
        "finish_reason": _bytes([[[CANCELLED]]] * num_rows),
    }


def unbatched(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batched answer of one row as a stream's."""
    return {name: array[0] for name, array in arrays.items()}


def _token_arrays(generation: Generation, outputs: Sequence[Output], part: slice) -> dict[str, np.ndarray]:
    """The arrays with a value per generated token, for a part of the tokens: [sequences, tokens, …]."""
    pad_id = generation.end_ids[0] if generation.end_ids else 0
    arrays = {"output_ids": _padded([o.token_ids[part] for o in outputs], np.int32, pad_id)}
    if generation.request.with_log_probs:
        arrays["output_log_probs"] = _padded([o.log_probs[part] for o in outputs], np.float32)
    if generation.request.sampling.num_log_probs:
        pairs = [o.alternatives[part] for o in outputs]
        for name, place, dtype in (("top_token_ids", 0, np.int32), ("top_log_probs", 1, np.float32)):
            arrays[name] = _padded([[[pair[place] for pair in token] for token in row] for row in pairs], dtype)
    return arrays


def _padded(rows: Sequence[Any], dtype: Any, fill: Any = 0) -> np.ndarray:
    """An array of nested lists that are not equally long; `fill` may be one value per row."""
    shape = _shape(rows)
    array = np.zeros(shape, dtype=dtype)
    array += np.asarray(fill, dtype=dtype).reshape(-1, *[1] * (len(shape) - 1))
    for row, values in enumerate(rows):
        if len(shape) == 1:
            array[row] = values
        elif len(shape) == 2:
            array[row, : len(values)] = values
        else:
            own_fill = fill[row] if isinstance(fill, list) else fill
            own = _padded(values, dtype, own_fill) if len(values) else np.zeros((0,) * (len(shape) - 1), dtype)
            corner = (row, *map(slice, own.shape))
            array[corner] = own
    return array


def _shape(rows: Any) -> tuple[int, ...]:
    """The smallest shape that holds nested lists."""
    if not isinstance(rows, (list, tuple)):
        return ()
    inner = [_shape(row) for row in rows]
    depth = max(map(len, inner), default=0)
    full = [shape + (0,) * (depth - len(shape)) for shape in inner]
    return (len(rows), *map(max, zip(*full, strict=True)))


def _bytes(texts: list[Any]) -> np.ndarray:
    """Nested lists of str as an object array of bytes: PyTriton's form of strings."""
    return np.vectorize(str.encode, otypes=[object])(np.array(texts, dtype=object))
