"""Tokenizers of checkpoints without a Hugging Face one: GPT-2 BPE files, sentencepiece models, names on the Hub.

Turns each into a tokenizer that AutoTokenizer.from_pretrained reads offline, finds its begin and end tokens, and keeps
the copies that FasterTransformer's converter makes. It runs no code of the tokenizer's author and knows no checkpoint.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from readers import sentencepieces
from readers.archive import Place, file_place
from readers.end_tokens import GENERATION_CONFIG, check_end_ids, listed_end_ids

if TYPE_CHECKING:  # importing transformers takes seconds, which ranks and conversions without such a tokenizer save
    from transformers import PreTrainedTokenizerFast

_END_OF_TEXT = "<|endoftext|>"  # begins and ends GPT-2's texts
_GPT2_FILES = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))
_HUGGING_FACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION_CONFIG,
)
_SENTENCEPIECE_FILE = "tokenizer.model"
_ROLES = tuple(f"{role}_token" for role in ("unk", "mask", "pad", "sep", "eos", "bos", "cls"))  # NeMo's order


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A tokenizer and where it comes from."""

    tokenizer: Any
    name: str  # for messages
    copies: Mapping[str, bytes] = field(default_factory=dict)  # file name -> content, under FasterTransformer's names
    generation: Path | None = None  # a generation_config.json, which may list other end tokens

    @property
    def start_id(self) -> int | None:
        """The token that begins a text."""
        return self.tokenizer.bos_token_id

    def end_ids(self, vocab_size: int) -> tuple[int, ...]:
        """All tokens that end a text, the tokenizer's own first. Raises ValueError where there is none.

        As in transformers' generate, generation_config.json overrules the others.
        """
        own = self.tokenizer.eos_token_id
        listed = None if self.generation is None else listed_end_ids(self.generation)
        if self.generation is not None and listed is not None:
            return check_end_ids(self.generation, listed, own, vocab_size)
        if own is None:
            raise ValueError(f"{self.name}: the tokenizer has no token that ends a text")
        return (own,)

    def write(self, folder: Path) -> None:
        """Write the files that AutoTokenizer reads, and the copies."""
        self.tokenizer.save_pretrained(folder)
        for name, content in self.copies.items():
            (folder / name).write_bytes(content)


def gpt2_bpe(vocab: Place, merges: Place, special_tokens: Any = None) -> CheckpointTokenizer:
    """GPT-2's byte-level BPE from its two files. Raises ValueError for files that are something else."""
    copies = {"vocab.json": vocab.read(), "merges.txt": merges.read()}
    try:
        ids = json.loads(copies["vocab.json"])
        assert isinstance(ids, dict) and all(type(token_id) is int for token_id in ids.values())
    except (ValueError, AssertionError):
        raise ValueError(f"{vocab.name}: not a vocabulary of GPT-2's BPE (a JSON object of tokens and ids)") from None
    try:
        lines = copies["merges.txt"].decode().split("\n")
        pairs: Any = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        core = Tokenizer(models.BPE(vocab=ids, merges=pairs))  # raises for a line that is no pair
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise ValueError(f"{merges.name}: not the merges of {vocab.name} ({error})") from None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if _END_OF_TEXT not in ids:
        raise ValueError(f"{vocab.name}: the vocabulary has no {_END_OF_TEXT}")
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
    tokenizer = _wrap(core, roles, False)
    _add(tokenizer, _in_order(special_tokens))
    return CheckpointTokenizer(tokenizer, vocab.name, copies)


def sentencepiece(place: Place, special_tokens: Any = None, is_legacy: bool = False) -> CheckpointTokenizer:
    """A sentencepiece model, with NeMo's special tokens where it takes them (sentencepiece_legacy).

    A legacy model without an end token gets those that FasterTransformer's converter (examples/pytorch/tokenizer.py)
    adds after the pieces, in its order. Raises ValueError for a file that is no such model.
    """
    data = place.read()
    model = sentencepieces.parse(data, place.name)
    known = {"bos_token": model.piece(model.bos_id), "eos_token": model.piece(model.eos_id)}
    known = {role: piece for role, piece in known.items() if piece is not None}
    roles = {**known, "unk_token": model.piece(model.unk_id)}
    is_matching = is_legacy and bool(special_tokens)  # else no text becomes a special token
    tokenizer = _wrap(sentencepieces.build(model), roles, split_special=not is_matching)
    if is_legacy:
        _add(tokenizer, special_tokens)
        if tokenizer.eos_token is None:
            names = ["cls", "sep", "mask", "pad", *(["bos"] if tokenizer.bos_token is None else []), "eos"]
            _add(tokenizer, {f"{name}_token": f"<{name}>" for name in names})
    return CheckpointTokenizer(tokenizer, place.name, {_SENTENCEPIECE_FILE: data})


def hub(name: str, special_tokens: Any, origin: str) -> CheckpointTokenizer:
    """A tokenizer by its name on the Hugging Face Hub. Raises ValueError where it cannot be had."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # an untrusted file must not name a local path
        raise ValueError(f"{origin} is {name!r}; a name on the Hugging Face Hub is expected")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer.encode("a")
    except Exception as error:  # what the Hub's client and transformers raise has nothing else in common
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{origin} is {name!r}, which cannot be had from the Hub ({reason}); --tokenizer names another"
        ) from None
    _add(tokenizer, _in_order(special_tokens))
    return CheckpointTokenizer(tokenizer, f"tokenizer {name}")


def find_files(path: Path) -> list[Path]:
    """The files of the tokenizer at `path`, a folder or a .model file; empty where there is none."""
    if path.is_file():
        return [path] if path.suffix == ".model" else []
    if (path / "tokenizer.json").is_file():
        return [path / name for name in _HUGGING_FACE_FILES if (path / name).is_file()]
    for names in (*_GPT2_FILES, (_SENTENCEPIECE_FILE,)):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    return []


def from_path(path: Path, special_tokens: Any = None) -> CheckpointTokenizer:
    """The tokenizer of a folder or of a .model file, with NeMo's special tokens. Raises ValueError where there is none.

    A .model file takes no special tokens here.
    """
    files = find_files(path)
    if not files:
        raise ValueError(
            f"{path}: no tokenizer; it may be a .model file, or a folder with tokenizer.json, "
            f"vocab.json and merges.txt, or tokenizer.model"
        )
    if files[0].suffix == ".model":
        return sentencepiece(file_place(files[0]))
    if len(files) == 2 and files[1].suffix == ".txt":
        return gpt2_bpe(file_place(files[0]), file_place(files[1]), special_tokens)
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # as above
        raise ValueError(f"{path}: no tokenizer that transformers can read ({' '.join(str(error).split())})") from None
    _add(tokenizer, _in_order(special_tokens))
    return CheckpointTokenizer(tokenizer, str(path), generation=path / GENERATION_CONFIG)


def _wrap(core: Tokenizer, roles: Mapping[str, str | None], split_special: bool) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, split_special_tokens=split_special, **roles
    )


def _in_order(special_tokens: Any) -> Any:
    """As NeMo's wrapper of Hugging Face tokenizers adds them (common/tokenizers/huggingface/auto_tokenizer.py)."""
    if not isinstance(special_tokens, Mapping):
        return special_tokens
    return {role: special_tokens[role] for role in (*_ROLES, *special_tokens) if role in special_tokens}


def _add(tokenizer: Any, special_tokens: Mapping[str, Any] | Sequence[str] | None) -> None:
    """NeMo's special tokens: by role, or a list; those that the vocabulary lacks come after it, in order."""
    by_role: dict[str, Any] = {"": special_tokens or []}
    if isinstance(special_tokens, Mapping):
        by_role = dict(special_tokens)
    tokens = [token for value in by_role.values() for token in (value if isinstance(value, list) else [value])]
    if not all(token is None or isinstance(token, str) for token in tokens):
        raise ValueError(f"special_tokens has {reprlib.repr(tokens)}; strings are expected")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens if token])
    for role, token in by_role.items():
        if role in _ROLES and token:
            setattr(tokenizer, role, token)
