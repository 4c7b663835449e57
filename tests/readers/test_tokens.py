"""Tokenizers of NeMo's and Megatron-LM's checkpoints: sentencepiece models against sentencepiece itself."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

import convert
from readers import sentencepieces
from readers.archive import file_place
from readers.tokens import from_path
from readers.tokens import sentencepiece as read_model
from serving.text import TextStream
from tests.support.core_checkpoints import write_nemo2
from tests.support.folders import config_ini
from tests.support.nemo_checkpoints import TinyGPT, write_nemo

RNG = random.Random(0)
WORDS = [
    "".join(RNG.choices(("th", "er", "on", "an", "re", "ti", "s", "ou", "Qu", "w"), k=RNG.randint(1, 5)))
    for _ in range(300)
]
LINES = [" ".join(RNG.choices(WORDS, range(300, 0, -1), k=12)) for _ in range(300)] + ["ﬁne café １２３, <x>/<s>"]
SYMBOLS = ["<x>", "<extra_id_1>"]
# No combining marks: `tokenizers` normalizes by grapheme, sentencepiece by character.
SPECKS = [
    "<s>",
    "</s>",
    "<unk>",
    *SYMBOLS,
    "  ",
    "\n",
    " \n",
    "\t",
    "▁",
    "中",
    "é",
    "😀",
    "ﬁ",
    "①",
    "ß",
    "\u00a0",
    "\u3000",
]


def train(**settings: Any) -> bytes:
    """A small model of made-up words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        minloglevel=2,
        **dict(vocab_size=700, hard_vocab_limit=False, character_coverage=0.999) | settings,
    )
    return model.getvalue()


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(
            rng.choice(SPECKS) if rng.random() < 0.4 else rng.choice(WORDS) + " " * rng.randint(0, 2)
            for _ in range(rng.randint(0, 25))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("symbols", [[], SYMBOLS], ids=["", "symbols"])
@pytest.mark.parametrize("spaces", ["plain", "prefix", "trimmed", "prefix, trimmed"])
@pytest.mark.parametrize("rules", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_same_ids_and_text_as_sentencepiece(kind: str, rules: str, spaces: str, symbols: list[str]) -> None:
    has_byte_fallback = rules == "identity"
    data = train(
        model_type=kind,
        normalization_rule_name=rules,
        add_dummy_prefix="prefix" in spaces,
        remove_extra_whitespaces="trimmed" in spaces,
        user_defined_symbols=symbols,
        byte_fallback=has_byte_fallback,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = sentencepieces.build(sentencepieces.parse(data, "m"))
    for text in texts(200):
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        if has_byte_fallback:  # else an unknown character is gone, and sentencepiece shows ⁇
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_what_is_no_model_is_refused() -> None:
    data = train(model_type="bpe")
    noise = [random.Random(seed).randbytes(100) for seed in range(100)]
    for bad in [b"", b"hello", b"\x0a\xff", data[:10], data[:-1], data + b"\x0a", data[5:], data + data, *noise]:
        with pytest.raises(ValueError, match="^m: not a sentencepiece model$"):
            sentencepieces.parse(bad, "m")


@pytest.mark.parametrize(
    ("settings", "ids", "start_id", "end_id"),
    [
        ({"sentencepiece_legacy": False}, [None, None], 1, 2),
        ({}, [None, None], 1, 2),
        ({"special_tokens": {"eos_token": "<eot>", "pad_token": "<s>"}}, [270, None], 1, 270),
        ({"additional_special_tokens": ["<a>", "</s>", "<eot>"]}, [271, 270], 1, 2),
    ],
)
def test_nemo_archive_with_sentencepiece(
    tmp_path: Path, settings: dict[str, Any], ids: list[int | None], start_id: int, end_id: int
) -> None:
    """Legacy is the default of older archives; there, and there only, NeMo takes special tokens."""
    data = train(model_type="bpe", vocab_size=270, hard_vocab_limit=True, character_coverage=0.98)
    source = write_nemo(
        tmp_path / "m.nemo",
        TinyGPT(),
        edit=lambda folder: (folder / "0f_tokenizer.model").write_bytes(data),
        tokenizer={"library": "sentencepiece", "type": None, "model": "nemo:0f_tokenizer.model", **settings},
    )
    folder = convert.convert(source, tmp_path / "out", 1, "fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert [tokenizer.get_vocab().get(token) for token in ("<eot>", "<a>")] == ids
    assert (config_ini(folder)["start_id"], config_ini(folder)["end_id"]) == (str(start_id), str(end_id))
    assert (folder / "tokenizer.model").read_bytes() == data
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    plain = "Thank you for the tea"
    assert tokenizer.encode(plain) == theirs.encode(plain)
    spelled = tokenizer.encode("to </s>, say")
    assert (2 in spelled) is any("special_tokens" in name for name in settings)  # else it is text, as in NeMo


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("legacy", "end_id"), [(False, 2), (True, 270)])
def test_nemo_2_with_sentencepiece(legacy: bool, end_id: int, tmp_path: Path) -> None:
    """The file's name is the last part of the one in training; special tokens need `legacy`."""
    data = train(model_type="bpe", vocab_size=270, hard_vocab_limit=True, character_coverage=0.98)
    tokenizer = {
        "_target_": "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer",
        "model_path": "/training/words.model",
        "special_tokens": {"eos_token": "<eot>"} if legacy else None,
        "legacy": legacy,
    }
    source = write_nemo2(tmp_path / "m", TinyGPT(), {"tokenizer": tokenizer})
    (source / "context/words.model").write_bytes(data)
    folder = convert.convert(source, tmp_path / "out", 1, "fp32")
    assert config_ini(folder)["end_id"] == str(end_id)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    plain = "Thank you for the tea"
    assert transformers.AutoTokenizer.from_pretrained(folder).encode(plain) == theirs.encode(plain)


def test_model_without_end_token(tmp_path: Path) -> None:
    """FasterTransformer's converter adds <cls>, <sep>, <mask>, <pad>, then what is missing of <bos> and <eos>."""
    (tmp_path / "t.model").write_bytes(train(model_type="bpe", bos_id=-1, eos_id=-1))
    tokenizer = read_model(file_place(tmp_path / "t.model"), is_legacy=True)
    size = sentencepiece.SentencePieceProcessor(str(tmp_path / "t.model")).get_piece_size()
    assert (tokenizer.start_id, tokenizer.end_ids(size + 6)) == (size + 4, (size + 5,))
    with pytest.raises(ValueError, match="t.model: the tokenizer has no token that ends a text"):
        _ = from_path(tmp_path / "t.model").end_ids(size)


def test_streamed_text_is_sentencepieces(tmp_path: Path) -> None:
    data = train(model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    (tmp_path / "t.model").write_bytes(data)
    tokenizer = from_path(tmp_path / "t.model").tokenizer
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in texts(20):
        ids = theirs.encode(text)
        stream = TextStream(tokenizer, ids[:1], with_prompt=True, skip_special_tokens=False)
        assert stream.push(ids[1:]) + stream.finish() == theirs.decode(ids)
