"""A sentencepiece model (tokenizer.model) → a fast tokenizer that encodes and decodes as sentencepiece does.

Owns the model file's format (sentencepiece_model.proto, of which a few fields are read) and the emulation by the
`tokenizers` package: unigram and BPE, byte fallback, user-defined symbols, and the model's own normalization.
It knows no checkpoint, and no special token beyond the model's.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_NEVER = -1e9  # the score of pieces that no text may become
_MANY = 1 << 20
_MAX_PIECES, _MAX_PIECE_LEN, _MAX_CHARACTERS = 400_000, 512, 4_000_000


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a model file; an id is -1 if there is no such token."""

    pieces: list[tuple[str, float, int]]  # piece, score, type
    model_type: int
    unk_id: int
    bos_id: int
    eos_id: int
    charsmap: bytes  # the compiled normalization rules
    adds_dummy_prefix: bool
    removes_extra_whitespaces: bool
    has_byte_fallback: bool

    @property
    def has_user_symbols(self) -> bool:
        """Whether there are pieces that text is cut at before anything else."""
        return any(kind == _USER_DEFINED for _, _, kind in self.pieces)

    def piece(self, token_id: int) -> str | None:
        """A token's text; None for -1."""
        return self.pieces[token_id][0] if 0 <= token_id < len(self.pieces) else None


def parse(data: bytes, name: str) -> SentencePieceModel:
    """Read a model file. Raises ValueError, with the file's `name`, for what is none or is not supported."""
    try:
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for field, value in _fields(data):
            if field == 1:
                entry = dict(_fields(value))
                pieces.append((entry[1].decode(), _float(entry.get(2, bytes(4))), entry.get(3, _NORMAL)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        raise ValueError(f"{name}: not a sentencepiece model") from None
    _check_pieces(pieces, normalizer.get(2, b""), name)
    kinds = [kind for _, _, kind in pieces]
    if kinds.count(_UNKNOWN) != 1 or len({piece for piece, _, _ in pieces}) != len(pieces):
        raise ValueError(f"{name}: not a sentencepiece model")
    model_type = trainer.get(3, _UNIGRAM)
    if model_type not in (_UNIGRAM, _BPE):
        raise ValueError(f"{name}: a sentencepiece model of type {model_type}; supported: 1 (unigram) and 2 (bpe)")
    if trainer.get(24) or not normalizer.get(5, 1):
        raise ValueError(f"{name}: a sentencepiece model that marks spaces otherwise than with a leading {_SPACE}")
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind in (_CONTROL, _USER_DEFINED)}
    return SentencePieceModel(
        pieces=pieces,
        model_type=model_type,
        unk_id=kinds.index(_UNKNOWN),
        bos_id=ids.get(trainer.get(46, b"<s>").decode(), -1),
        eos_id=ids.get(trainer.get(47, b"</s>").decode(), -1),
        charsmap=normalizer.get(2, b""),
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_whitespaces=bool(normalizer.get(4, 1)),
        has_byte_fallback=bool(trainer.get(35, 0)),
    )


def _check_pieces(pieces: list[tuple[str, float, int]], charsmap: bytes, name: str) -> None:
    """Raises ValueError for sizes beyond any model's, and for what the `tokenizers` package dies of."""
    longest, total = max((len(piece) for piece, _, _ in pieces), default=0), sum(len(piece) for piece, _, _ in pieces)
    for number, most, what in (
        (len(pieces), _MAX_PIECES, "pieces"),
        (longest, _MAX_PIECE_LEN, "characters in a piece"),
        (total, _MAX_CHARACTERS, "characters in all pieces"),
    ):
        if number > most:
            raise ValueError(f"{name}: a sentencepiece model of {number:,} {what}; at most {most:,} are taken")
    if not all(math.isfinite(score) for _, score, _ in pieces):
        raise ValueError(f"{name}: a sentencepiece model with a score that is no number")
    if charsmap:
        trie_bytes = int.from_bytes(charsmap[:4], "little")
        if len(charsmap) < 8 or trie_bytes % 4 or not 4 <= trie_bytes <= len(charsmap) - 4:
            raise ValueError(f"{name}: a sentencepiece model with broken rules of normalization")


def build(model: SentencePieceModel) -> Tokenizer:
    """The tokenizer: the same token ids as sentencepiece's encode gives, and the same text as its decode."""
    tokenizer = Tokenizer(_unigram(model) if model.model_type == _UNIGRAM else _bpe(model))
    rules: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.removes_extra_whitespaces:
        rules += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.adds_dummy_prefix:
        rules.append(normalizers.Prepend(_SPACE))
    rules.append(normalizers.Replace(" ", _SPACE))
    if model.removes_extra_whitespaces:
        rules.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(rules)
    if splits := _splits(model):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.removes_extra_whitespaces or model.adds_dummy_prefix:
        steps.append(decoders.Strip(" ", _MANY if model.removes_extra_whitespaces else 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _unigram(model: SentencePieceModel) -> Unigram:
    """Only normal pieces keep their scores; a user-defined one beats whatever else covers its characters."""
    best = max((score for _, score, kind in model.pieces if kind == _NORMAL), default=0.0)
    scores = {_NORMAL: lambda piece, score: score, _USER_DEFINED: lambda piece, score: len(piece) * best - 0.1}
    never = lambda piece, score: _NEVER  # noqa: E731
    vocab = [(piece, scores.get(kind, never)(piece, score)) for piece, score, kind in model.pieces]
    return Unigram(vocab, model.unk_id, byte_fallback=model.has_byte_fallback)


def _bpe(model: SentencePieceModel) -> BPE:
    """Merges of any two pieces into a third, the best score first, as sentencepiece tries them."""
    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    usable = {piece: score for piece, score, kind in model.pieces if kind in (_NORMAL, _UNUSED)}
    merges = []
    for piece, score in usable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((-score, ids[left], ids[right], left, right))
    merges.sort()
    return BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in merges],
        unk_token=model.piece(model.unk_id),
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
        # A user-defined symbol has no merges: it is a chunk of its own and is looked up whole.
        ignore_merges=model.has_user_symbols,
    )


def _splits(model: SentencePieceModel) -> list[pre_tokenizers.PreTokenizer]:
    """Where text has to be cut for `tokenizers` to find user-defined symbols and to miss the names of other tokens.

    A name such as </s> in a text is no token: it is cut where known letters meet unknown ones, which no piece spans.
    Names of letters that are all known lose against these in a unigram model; BPE looks up whole chunks only.
    """
    letters = {piece for piece, _, kind in model.pieces if kind == _NORMAL and len(piece) == 1}
    names = [piece for piece, _, kind in model.pieces if kind not in (_NORMAL, _USER_DEFINED) and len(piece) > 1]
    symbols = [piece for piece, _, kind in model.pieces if kind == _USER_DEFINED]
    begin, end = "", ""
    splits: list[pre_tokenizers.PreTokenizer] = []
    if model.model_type == _UNIGRAM:
        names = [name for name in names if not letters.issuperset(name)]
    elif not symbols:
        return []
    else:
        begin, end = r"\A", r"\z"
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    cuts = []
    for name in names:
        known = [letter in letters for letter in name]
        cut = next((i for i in range(1, len(name)) if known[i] != known[i - 1]), 1)
        cuts.append(f"{begin}{re.escape(name[:cut])}(?={re.escape(name[cut:])}{end})")
    return [*splits, pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous")] if cuts else splits


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: (number, value); numbers as int, all else as bytes.

    The file decides which of the two a value is, so its use may raise TypeError or AttributeError.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if shift > 70:
            raise ValueError("a number of more than 64 bits")
        if byte < 0x80:
            return value, at


def _float(data: bytes) -> float:
    return struct.unpack("<f", data)[0]
