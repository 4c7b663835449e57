"""The tokenizer of a converted folder. Its files come with the checkpoint, so they are tried within limits first.

    python -I load_tokenizer.py FOLDER/tokenizer.json

The trial is a process of its own, because rules of a tokenizer.json may make a text of one letter as long as they like,
and where memory ends, the `tokenizers` package ends the process. A pattern may take minutes for a text of thousands of
letters: so letters that patterns name, and letters of all kinds, are tried many times over.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE = "tokenizer.json"
_LARGEST_FILES = {_FILE: 128 << 20, "tokenizer.model": 64 << 20, "spiece.model": 64 << 20}  # bytes
_LARGEST_FILE = 16 << 20
_MEMORY_BYTES = 1 << 30  # of the trial's address space; a vocabulary of 256 000 tokens takes 0.4 GiB
_CPU_S = 5  # seconds of the processor; such a vocabulary takes 1
_LETTERS = 30_000  # of a text that patterns are tried on: long enough where they look at it again from each letter
_PATTERNS_CPU_S = 1.0  # for each such text; Qwen2's pattern takes 0.07
_TIMEOUT_S = 60.0  # a guard for a busy machine
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # each more would take address space by the core


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises ValueError, in one sentence, where there is none that works."""
    for path in sorted(folder.iterdir()):
        most = _LARGEST_FILES.get(path.name, _LARGEST_FILE)
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.is_file() and path.stat().st_size > most:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes; such a file has {most:,} at most")
    if (folder / _FILE).is_file():
        _try(folder / _FILE)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = tokenizer.encode("a", add_special_tokens=False)
        tokenizer.decode(known)
    except Exception as error:  # what transformers and tokenizers raise for broken files has nothing in common
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{folder} has no tokenizer that transformers can read ({reason})") from None
    if not known:  # made from config.json alone, with an empty vocabulary
        raise ValueError(f"{folder} has no tokenizer that transformers can read (its vocabulary is empty)")
    return tokenizer


def _try(path: Path) -> None:
    """Raises ValueError where the trial of a tokenizer.json fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__, str(path)],
            env=os.environ | _ONE_THREAD,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path}: to read it and to encode one letter takes more than {_TIMEOUT_S:g} s") from None
    if done.returncode == -signal.SIGPROF:
        raise ValueError(
            f"{path}: its patterns take more than {_PATTERNS_CPU_S:g} s for a text of {_LETTERS:,} letters or less"
        )
    if done.returncode < 0:
        raise ValueError(
            f"{path}: to read it and to encode one letter takes more than {_CPU_S} s or {_MEMORY_BYTES >> 30} GiB"
        )
    if done.returncode:
        reason = " ".join(done.stdout.decode(errors="replace").split())[:200]
        raise ValueError(f"{path.parent} has no tokenizer that transformers can read ({reason})")


def _trial(path: str) -> int:
    """What `load_tokenizer` will do with the file; the exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_padding()  # as transformers does
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("a").ids)
        _try_patterns(tokenizer)
    except MemoryError:
        return -1
    except BaseException as error:  # a panic of Rust is no Exception
        print(str(error)[:1000] or type(error).__name__)
        return 1
    return 0


def _try_patterns(tokenizer: Any) -> None:
    """Normalize and split long texts of one letter each; a signal ends the process where one takes too long."""
    parts = [part for part in (tokenizer.normalizer, tokenizer.pre_tokenizer) if part is not None]
    patterns = [text for part in parts for text in _patterns(json.loads(part.__getstate__()))]
    if not patterns:
        return
    kinds = {unicodedata.category(letter): letter for letter in map(chr, range(0x3000))}
    for letters in dict.fromkeys([*"".join(patterns), *kinds.values(), *patterns]):
        text = letters * (_LETTERS // len(letters))
        signal.setitimer(signal.ITIMER_PROF, _PATTERNS_CPU_S)
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if tokenizer.pre_tokenizer is not None:
            tokenizer.pre_tokenizer.pre_tokenize_str(text)
    signal.setitimer(signal.ITIMER_PROF, 0)


def _patterns(node: Any) -> Iterator[str]:
    """The texts and the regular expressions that normalizers replace and that pre-tokenizers split at."""
    if isinstance(node, dict) and isinstance(node.get("pattern"), dict):
        yield from filter(None, node["pattern"].values())
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _patterns(child)


if __name__ == "__main__":
    sys.exit(_trial(sys.argv[1]))
