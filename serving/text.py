"""Tokens → text: the bytes that tokens stand for, and text in pieces while its tokens come.

All decoding with a tokenizer of transformers is here, and the cutting at stop words. It imports nothing of the
project.

Decoding is not concatenation: a character may take several tokens, the first token of a text may lose its space,
and SentencePiece's byte fallback makes U+FFFD of a whole run of byte tokens where any of it is invalid. The decoder
tells a tokenizer's kind. Byte-level: bytes add up. Pieces: texts add up, except for runs of byte tokens. Others: only
`decode` is known.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_PIECE_DECODERS = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
_KEEP = 8  # tokens before the next one that a window has at least: more than the bytes of a character


class TextStream:
    """The text of one request's tokens, in pieces of whole characters, as they come.

    The pieces of `push` and the last one of `finish` are `whole_text` of the same tokens, however they are split.
    Text that may still change or begin a stop word is held back: at most a character, a run of byte tokens
    (byte fallback) or, with tokenizers of unknown kind, the last token's text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        *,
        with_prompt: bool,
        skip_special_tokens: bool,
        stop_words: Sequence[str] = (),
        keep_stop_word: bool = False,
    ) -> None:
        kind = _ByteStream if _spelling(tokenizer).is_byte_level else _WindowStream
        self._decoded = kind(tokenizer, skip_special_tokens)
        self._prompt_text = _decode(tokenizer, prompt_ids, skip_special_tokens)  # what is still to come of it
        self._with_prompt = with_prompt
        self._stop = _StopSearch(stop_words, keep_stop_word)
        self._first = self._take(self._decoded.add(prompt_ids))

    def push(self, token_ids: Sequence[int]) -> str:
        """Take generated tokens; the text that is final by now and was not returned before."""
        piece, self._first = self._first, ""
        for token_id in token_ids:
            piece += self._take(self._decoded.add([token_id]))
        return piece

    def finish(self) -> str:
        """What was held back; no more tokens may come."""
        return self.push([]) + self._take(self._decoded.finish()) + self._stop.finish()

    def _take(self, text: str) -> str:
        """Part the prompt's text from the generated one, which begins where the whole differs from the prompt."""
        shared = _num_shared(self._prompt_text, text)
        self._prompt_text = self._prompt_text[shared:] if shared == len(text) else ""
        return (text[:shared] if self._with_prompt else "") + self._stop.push(text[shared:])


def whole_text(
    tokenizer: Any,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    *,
    with_prompt: bool,
    skip_special_tokens: bool,
    stop_words: Sequence[str] = (),
    keep_stop_word: bool = False,
) -> str:
    """The text of a finished request: the prompt's, where asked, and the output's.

    The output's text begins where the text of both differs from the prompt's alone: in the middle of a character,
    for instance, where the prompt's last token began it. It is cut at the stop word that ends first: before it, or
    after it where keep_stop_word.
    """
    text = _decode(tokenizer, [*prompt_ids, *output_ids], skip_special_tokens)
    begin = _num_shared(_decode(tokenizer, prompt_ids, skip_special_tokens), text)
    generated = text[begin:]
    if found := _find_stop(generated, stop_words):
        generated = generated[: found[keep_stop_word]]
    return (text[:begin] if with_prompt else "") + generated


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes that each id adds in the middle of a text: [vocab_size], b"" for ids that the tokenizer lacks.

    A special token stands for its content. A tokenizer that is neither byte-level nor of pieces decodes every id by
    itself; a token that is a part of a character then gives U+FFFD or nothing.
    """
    found = [b""] * vocab_size
    spelling = _spelling(tokenizer)
    known = sorted({token_id for token_id in tokenizer.get_vocab().values() if token_id < vocab_size})
    if spelling.is_byte_level or spelling.is_pieces:
        for token_id, token in zip(known, tokenizer.convert_ids_to_tokens(known), strict=True):
            found[token_id] = spelling.bytes_of(token)
        return found
    anchor = (tokenizer.encode("a", add_special_tokens=False) or known)[-1:]
    before = _decode(tokenizer, anchor)
    for token_id in known:
        both = _decode(tokenizer, [*anchor, token_id])
        text = both[len(before) :] if both.startswith(before) else _decode(tokenizer, [token_id])
        found[token_id] = text.encode(errors="replace")
    return found


@dataclass(frozen=True)
class _Spelling:
    """How a tokenizer's tokens spell text, as far as its decoder tells."""

    is_byte_level: bool = False
    is_pieces: bool = False
    has_byte_fallback: bool = False
    replacements: list[tuple[str, str]] = field(default_factory=list)
    special_ids: frozenset[int] = frozenset()

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a byte-level token or a piece in the middle of a text."""
        if self.is_byte_level:  # a token with any other character (an added one) is plain text
            is_spelled = all(symbol in _BYTE_OF for symbol in token)
            return bytes(_BYTE_OF[symbol] for symbol in token) if is_spelled else token.encode()
        if self.is_byte(token):
            return bytes([int(token[3:5], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()

    def is_byte(self, token: str) -> bool:
        """Whether the token is one byte of a run that becomes text when it has ended."""
        return self.has_byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None


@lru_cache(maxsize=8)
def _spelling(tokenizer: Any) -> _Spelling:
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:  # a tokenizer in Python
        return _Spelling(special_ids=frozenset(getattr(tokenizer, "all_special_ids", ())))
    special_ids = frozenset(i for i, token in core.get_added_tokens_decoder().items() if token.special)
    steps = _steps(json.loads(core.decoder.__getstate__())) if core.decoder is not None else []
    types = [step["type"] for step in steps]
    if [kind for kind in types if kind != "Fuse"] == ["ByteLevel"]:
        return _Spelling(is_byte_level=True, special_ids=special_ids)
    if not steps or not all(map(_keeps_adding_up, steps, (types[:n] for n in range(len(types))))):
        return _Spelling(special_ids=special_ids)
    return _Spelling(
        is_pieces=True,
        has_byte_fallback="ByteFallback" in types,
        replacements=[_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")],
        special_ids=special_ids,
    )


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _keeps_adding_up(step: dict[str, Any], before: list[str]) -> bool:
    """Whether a decoder with this step still makes of two texts, the first not empty, one after the other."""
    if step["type"] == "Strip":  # at the beginning of the text, not of every token
        return "Fuse" in before and step["stop"] == 0
    return step["type"] in _PIECE_DECODERS and "Fuse" not in before and "Regex" not in step.get("pattern", {})


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    return (step["replacement"], " ") if step["type"] == "Metaspace" else (step["pattern"]["String"], step["content"])


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: visible bytes of Latin-1 stand for themselves, the others for U+0100 and on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [number for number in range(256) if number not in visible]
    return {chr(n): n for n in visible} | {chr(256 + n): number for n, number in enumerate(moved)}


_BYTE_OF = _byte_of()


class _ByteStream:
    """Final text of byte-level tokens."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._spelling = _spelling(tokenizer)
        self._skipped = self._spelling.special_ids if skip_special_tokens else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_ids: Sequence[int]) -> str:
        tokens = self._tokenizer.convert_ids_to_tokens([i for i in token_ids if i not in self._skipped])
        return self._utf8.decode(b"".join(self._spelling.bytes_of(token) for token in tokens if token is not None))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """Final text through `decode` of the last tokens, so many that what they add does not depend on those before.

    Of pieces, all is final but a run of byte tokens. Of others, what the next token has not changed.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._spelling = _spelling(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._skipped = self._spelling.special_ids if skip_special_tokens else ()
        self._ids: list[int] = []
        self._text = ""  # of the window, when it was last decoded
        self._sent = 0  # characters of it that were returned

    def add(self, token_ids: Sequence[int]) -> str:
        token_ids = [i for i in token_ids if i not in self._skipped]
        if self._spelling.is_pieces:  # ids that have no token do not end a run
            tokens = self._tokenizer.convert_ids_to_tokens(token_ids)
            token_ids = [i for i, token in zip(token_ids, tokens, strict=True) if token is not None]
        self._ids += token_ids
        if not token_ids or (self._spelling.has_byte_fallback and self._spelling.is_byte(tokens[-1])):
            return ""
        text = self._decode(self._ids)
        final = len(text)
        if not self._spelling.is_pieces:
            final = len(text[: _num_shared(self._text, text)].rstrip("\ufffd"))
        piece = text[self._sent : final]
        self._text, self._sent = text, max(self._sent, final)
        self._shorten()
        return piece

    def finish(self) -> str:
        return self._decode(self._ids)[self._sent :]

    def _shorten(self) -> None:
        """Drop old tokens where the text of those that stay is the end of the text, by all that is not yet sent."""
        if len(self._ids) < 2 * _KEEP:
            return
        tail = self._decode(self._ids[-_KEEP:])
        dropped = len(self._text) - len(tail)
        if tail and self._text.endswith(tail) and dropped <= self._sent:
            self._ids = self._ids[-_KEEP:]
            self._text, self._sent = tail, self._sent - dropped

    def _decode(self, token_ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, token_ids, self._skip_special_tokens)


class _StopSearch:
    """Cuts a text that comes in pieces at its first stop word."""

    def __init__(self, words: Sequence[str], keep: bool) -> None:
        assert all(words), words
        self.is_found = False
        self._words = tuple(words)
        self._keep = keep
        self._reach = max(map(len, words), default=1) - 1  # characters that may belong to a word with later ones
        self._text = ""  # the last `_reach` characters at least
        self._sent = 0

    def push(self, text: str) -> str:
        """What can no longer be a part of a stop word (or may be, where the word is kept)."""
        if not self._words or self.is_found:
            return "" if self.is_found else text
        self._text += text
        if found := _find_stop(self._text, self._words):
            self.is_found = True
            return self._text[self._sent : found[self._keep]]
        held = 0 if self._keep else self._num_held()
        piece = self._text[self._sent : len(self._text) - held]
        self._text = self._text[max(0, len(self._text) - self._reach) :]
        self._sent = len(self._text) - held
        return piece

    def finish(self) -> str:
        return "" if self.is_found else self._text[self._sent :]

    def _num_held(self) -> int:
        for held in range(min(self._reach, len(self._text)), 0, -1):
            end = self._text[-held:]
            if any(word.startswith(end) for word in self._words):
                return held
        return 0


def _find_stop(text: str, words: Sequence[str]) -> tuple[int, int] | None:
    """Begin and end of the stop word that ends first; the longest of those that end there."""
    hits = [(begin, begin + len(word)) for word in words if (begin := text.find(word)) >= 0]
    return min(hits, key=lambda hit: (hit[1], hit[0]), default=None)


def _num_shared(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    if b.startswith(a) or a.startswith(b):
        return min(len(a), len(b))
    return next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _decode(tokenizer: Any, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
