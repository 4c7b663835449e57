"""Text in pieces against the text of all tokens at once, and token bytes against `decode`, of every kind of tokenizer.

The tokenizers are made here: byte-level BPE; SentencePiece's BPE with byte fallback as Llama has it, with and without
its stripped space; Unigram with Metaspace as T5 has it; and three of which only `decode` is known: WordPiece, bytes
without the spaces at the beginning, and ByT5 (in Python, dropping invalid bytes).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from serving.text import TextStream, _spelling, token_bytes, whole_text
from tests.support.checkpoints import EOS, make_tokenizer

WORDS = ["▁", "a", "b", "lo", "hel", "▁hel", "▁the", "▁▁", "你", "é", "\n", "▁.", "d", "▁world", "ö▁"]
TEXTS = ["hello world", "  two  spaces ", "naïve 你好 😀👩‍👩‍👧 Ω", "\n\tline\n", "a \ufffd b", "🏳️‍🌈 ελ"]
KINDS = ["bytes", "llama", "gemma", "t5", "wordpiece", "stripped", "byt5"]


class StrippingTokenizer:
    """One token per character; `decode` strips both ends, as transformers' Python tokenizers of SentencePiece do."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(map(ord, text))

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return "".join(map(chr, token_ids)).strip()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def make(kind: str, folder: Path) -> Any:
    if kind == "bytes":
        tokenizer = make_tokenizer(folder, 400)
        tokenizer.add_tokens(["<my own>", "é\u3000"])  # not in GPT-2's alphabet: plain text
        return tokenizer
    if kind == "stripped":
        tokenizer = make_tokenizer(folder, 257)
        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 100, 0)])
        return tokenizer
    if kind == "byt5":
        return transformers.ByT5Tokenizer()
    if kind == "wordpiece":
        vocab = ["[UNK]", "[CLS]", "a", "b", "##a", "##b", "un", "##able", ".", "你"]
        core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        core.decoder = decoders.WordPiece()
        return wrap(core, unk_token="[UNK]", cls_token="[CLS]")
    byte_tokens = [f"<0x{n:02X}>" for n in range(256)]
    if kind == "t5":
        core = Tokenizer(models.Unigram([(token, -1.0) for token in ["<unk>", "</s>", *WORDS]], unk_id=0))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        return wrap(core, unk_token="<unk>", eos_token="</s>")
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *byte_tokens, *WORDS])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (kind == "llama"))
    return wrap(core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wrap(core: Tokenizer, **special: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def decode(tokenizer: Any, token_ids: list[int], skip: bool = False) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def random_ids(tokenizer: Any, rng: random.Random, count: int) -> list[int]:
    """Random tokens, runs of one token and encoded texts, cut anywhere."""
    ids: list[int] = []
    known = sorted(tokenizer.get_vocab().values())
    while len(ids) < count:
        choice = rng.random()
        if choice < 0.4:
            ids += rng.choices(known, k=rng.randint(1, 6))
        elif choice < 0.5:
            ids += [rng.choice(known)] * rng.randint(1, 20)
        elif choice < 0.6:
            ids += [rng.choice(tokenizer.all_special_ids)] * rng.choice([1, 1, 20])
        else:
            encoded = tokenizer.encode(rng.choice(TEXTS), add_special_tokens=False)
            begin = rng.randrange(len(encoded))
            ids += encoded[begin : rng.randint(begin, len(encoded))]
    return ids[:count]


def pieces(stream: TextStream, ids: list[int], rng: random.Random) -> Iterator[str]:
    """The ids pushed in random splits, empty ones too."""
    while ids:
        count = rng.choice([0, 1, 1, 1, 2, 7])
        yield stream.push(ids[:count])
        ids = ids[count:]
    yield stream.finish()


def cut(text: str, words: list[str], keep: bool) -> str:
    """Reads the text character by character, until it ends with a word."""
    for end in range(1, len(text) + 1):
        if ending := [word for word in words if text[:end].endswith(word)]:
            return text[: end if keep else end - max(map(len, ending))]
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_text(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    rng = random.Random(kind)
    for _ in range(400):
        prompt_ids = random_ids(tokenizer, rng, rng.choice([0, 1, 2, 5, 30]))
        output_ids = random_ids(tokenizer, rng, rng.choice([0, 1, 3, 20, 60]))
        skip = rng.random() < 0.5
        whole = decode(tokenizer, prompt_ids + output_ids, skip)
        options: dict[str, Any] = dict(with_prompt=True, skip_special_tokens=skip)
        assert whole_text(tokenizer, prompt_ids, output_ids, **options) == whole
        assert "".join(pieces(TextStream(tokenizer, prompt_ids, **options), output_ids, rng)) == whole

        options["with_prompt"] = False
        added = whole_text(tokenizer, prompt_ids, output_ids, **options)
        assert added == whole[len(commonprefix([decode(tokenizer, prompt_ids, skip), whole])) :]
        assert "".join(pieces(TextStream(tokenizer, prompt_ids, **options), output_ids, rng)) == added

        options["stop_words"] = [random_word(added, rng) for _ in range(rng.randint(1, 3))]
        options["keep_stop_word"] = rng.random() < 0.5
        expected = cut(added, options["stop_words"], options["keep_stop_word"])
        assert whole_text(tokenizer, prompt_ids, output_ids, **options) == expected
        stream = TextStream(tokenizer, prompt_ids, **options)
        assert "".join(pieces(stream, output_ids, rng)) == expected
        assert stream._stop.is_found == any(word in added for word in options["stop_words"])
        options["with_prompt"] = True
        expected = whole.removesuffix(added) + expected
        assert whole_text(tokenizer, prompt_ids, output_ids, **options) == expected
        assert "".join(pieces(TextStream(tokenizer, prompt_ids, **options), output_ids, rng)) == expected


def test_spaces_between_words_fill_a_window(tokenizers: dict[str, Any]) -> None:
    """A window of spaces alone would decode to nothing, and so lose them."""
    text = "a" + 20 * " " + "你b"
    for tokenizer in (tokenizers["bytes"], tokenizers["stripped"], tokenizers["llama"], StrippingTokenizer()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = TextStream(tokenizer, [], with_prompt=True, skip_special_tokens=True)
        assert "".join(stream.push([i]) for i in ids) + stream.finish() == text


def random_word(text: str, rng: random.Random) -> str:
    begin = rng.randrange(len(text) + 1)
    return text[begin : begin + rng.randint(1, 5)] + rng.choice(["", "", "a"]) or "lo"


@pytest.mark.parametrize("kind", ["bytes", "llama", "gemma"])
def test_text_comes_at_once_in_whole_characters(kind: str, tokenizers: dict[str, Any]) -> None:
    """Byte fallback is the exception: an invalid byte that follows would turn its whole run into U+FFFD."""
    tokenizer = tokenizers[kind]
    stream = TextStream(tokenizer, [], with_prompt=True, skip_special_tokens=True)
    came = [stream.push([i]) for i in tokenizer.encode("hel 你é😀 a", add_special_tokens=False)]
    assert "\ufffd" not in "".join(came)
    if kind == "bytes":
        assert [text for text in came if text][-4:] == ["你", "é", "😀", " a"]
    else:
        assert came[-8:] == ["你", "é", "", "", "", "", "😀 ", "a"]
    assert stream.finish() == ""


def test_invalid_bytes_do_not_hold_text_back(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    lone = tokenizer.encode("你", add_special_tokens=False)[:1]
    a = tokenizer.encode("a", add_special_tokens=False)
    stream = TextStream(tokenizer, a, with_prompt=False, skip_special_tokens=True)
    assert [stream.push(lone), stream.push(lone), stream.push(a), stream.push(lone)] == ["", "\ufffd", "\ufffda", ""]
    assert stream.finish() == "\ufffd"


def test_the_output_completes_the_prompts_last_character(tokenizers: dict[str, Any]) -> None:
    for kind in ("bytes", "llama"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("a😀", add_special_tokens=False)
        stream = TextStream(tokenizer, ids[:-2], with_prompt=False, skip_special_tokens=False)
        assert stream.push(ids[-2:]) + stream.finish() == "😀"


def test_a_prompt_that_ends_in_byte_fallback_is_not_repeated(tokenizers: dict[str, Any]) -> None:
    """A new line of a Llama's prompt is a byte token, whose text is final only when the run of bytes has ended."""
    tokenizer = tokenizers["llama"]
    newline, hel, the = tokenizer.convert_tokens_to_ids(["<0x0A>", "hel", "▁the"])
    for with_prompt, expected in [(False, ["hel", " the"]), (True, ["the\nhel", " the"])]:
        stream = TextStream(tokenizer, [the, newline], with_prompt=with_prompt, skip_special_tokens=False)
        assert [stream.push([hel]), stream.push([the])] == expected


def test_stop_words_are_held_back_and_not_looked_for_in_the_prompt(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bytes"]
    prompt_ids, output_ids = (tokenizer.encode(text, add_special_tokens=False) for text in ("stop s", "tosto stop!"))
    options: dict[str, Any] = dict(with_prompt=True, skip_special_tokens=False, stop_words=["stop", "sto!"])
    stream = TextStream(tokenizer, prompt_ids, **options)
    came = [stream.push(tokenizer.encode(text, add_special_tokens=False)) for text in ("tos", "to", " ", "st")]
    assert (came, stream._stop.is_found) == (["stop sto", "", "sto ", ""], False)
    assert (stream.push(output_ids[-3:]), stream._stop.is_found) == ("", True)
    assert (stream.push(output_ids), stream.finish()) == ("", "")
    keeping = TextStream(tokenizer, prompt_ids, **options, keep_stop_word=True)
    assert keeping.push(output_ids) + keeping.finish() == "stop stosto stop"


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_are_what_decode_adds(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    spelled = token_bytes(tokenizer, 1000)
    known = set(tokenizer.get_vocab().values())
    assert len(spelled) == 1000 and not any(spelled[i] for i in range(1000) if i not in known)
    assert token_bytes(tokenizer, 5) == spelled[:5]
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    before = decode(tokenizer, [anchor])
    for token_id in known:
        added = decode(tokenizer, [anchor, token_id]).removeprefix(before)
        if kind in ("bytes", "llama", "gemma"):
            assert spelled[token_id].decode(errors="replace") == added
        else:
            assert spelled[token_id].decode() == added


def test_token_bytes_make_up_texts(tokenizers: dict[str, Any]) -> None:
    for kind in ("bytes", "llama", "gemma", "t5"):
        tokenizer = tokenizers[kind]
        spelled = token_bytes(tokenizer, 1000)
        for text in TEXTS if kind != "t5" else ["a lo hel"]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert b"".join(spelled[i] for i in ids).decode() == " " * (kind != "bytes") + text
    assert b"<my own>" in token_bytes(tokenizers["bytes"], 402)
    assert token_bytes(tokenizers["bytes"], 400)[399] == EOS.encode()


def test_the_kind_is_told_by_the_decoder() -> None:
    """`Strip` of every token, or a regular expression, is not how texts add up."""
    core = Tokenizer(models.BPE())
    strip, fuse, byte_level = decoders.Strip(" ", 1, 0), decoders.Fuse(), decoders.ByteLevel()
    for steps, kind in [
        ([decoders.Sequence([byte_level]), fuse], (True, False)),
        ([decoders.ByteFallback(), decoders.Metaspace("_")], (False, True)),
        ([fuse, strip], (False, True)),
        ([strip, fuse], (False, False)),
        ([fuse, decoders.Strip(" ", 1, 1)], (False, False)),
        ([byte_level, strip], (False, False)),
        ([decoders.BPEDecoder()], (False, False)),
    ]:
        core.decoder = decoders.Sequence(steps)
        spelling = _spelling(transformers.PreTrainedTokenizerFast(tokenizer_object=core))
        assert (spelling.is_byte_level, spelling.is_pieces) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_work_per_token_does_not_grow(kind: str, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers[kind]
    sizes: list[int] = []
    original = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: sizes.append(len(ids)) or original(ids, **options))
    stream = TextStream(tokenizer, [], with_prompt=True, skip_special_tokens=True)
    ids = (tokenizer.encode("ab lo a", add_special_tokens=False) + tokenizer.all_special_ids[:1]) * 200
    for token_id in ids:
        stream.push([token_id])
    assert max(sizes) <= 20  # and two at most for a token:
    assert len(sizes) <= 2 * len(ids) + 1
