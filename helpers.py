"""Shared by the scripts: logging, one-line errors, progress, memory, the download of a checkpoint."""

from __future__ import annotations

import ctypes
import glob
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("helpers")
_MAX_SENTENCE = 600  # characters
_M_ARENA_MAX = -8  # of glibc's malloc.h
# PyTriton warns, with a traceback, of each request that is refused; HTTP clients log every request.
_NOISY = "httpx httpcore httpx2 httpcore2 urllib3 filelock sh pytriton asyncio transformers".split()


def setup_logging(verbose: bool = False, rank: int = 0, size: int = 1, log_format: str = "text") -> None:
    """Log to stderr: text, with the rank in each line if there are several, or "json", an object per line."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(rank) if log_format == "json" else TextFormatter(rank, size))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(log_format == "json")
    if not verbose:
        for noisy in _NOISY:
            logging.getLogger(noisy).setLevel(logging.ERROR)


class TextFormatter(logging.Formatter):
    """A line of text; a record's `fields` (extra={"fields": …}) follow its message as key=value."""

    def __init__(self, rank: int, size: int) -> None:
        who = f"[rank {rank}] " if size > 1 else ""
        super().__init__(f"%(asctime)s %(levelname)s {who}%(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """logging's call for the line without a traceback."""
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{key}={_plain(value)}" for key, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """A line with one JSON object: time, level, logger, rank, message, the record's `fields`, exception."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """logging's call for the whole line."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname, "logger": record.name, "rank": self._rank}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: Any) -> str:
    """A value without spaces, or in JSON's quotes: a client's own text begins no line and no other field."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(map(_plain, value))
    text = str(value)
    return text if text.isascii() and text.isprintable() and not set(text) & set(' ",=') and text else json.dumps(text)


def use_one_arena() -> None:
    """Let all threads that start from now on share glibc's first arena.

    glibc gives threads arenas of their own. malloc_trim does not return the end of these to the system, up to 64 MB
    each. Other C libraries have no arenas.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def one_line(error: BaseException) -> str:
    """An exception's message as one line, its middle left out if it is long; without a message, its class's name.

    An untrusted file's values may be of any length, and its sentence ends with what is wrong.
    """
    text = " ".join(str(error).split())
    if len(text) > _MAX_SENTENCE:
        text = f"{text[: _MAX_SENTENCE // 2]} … {text[-_MAX_SENTENCE // 2 :]}"
    return text or type(error).__name__


class ProgressLine:
    """Shows bytes and rate: a bar on a terminal, else a line of the log every few seconds."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._start = self._shown = time.monotonic()
        self._bar: Any = None
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm  # imported late: without a terminal it is not needed

            self._bar = self._bar or tqdm(total=total, unit="B", unit_scale=True, desc="converting")
            self._bar.update(done - self.done)
            if done == total:
                self._bar.close()
        elif (now := time.monotonic()) - self._shown >= self._seconds:
            self._shown = now
            rate = done / (now - self._start)
            _LOG.info("converted %.2f of %.2f GB, %.0f MB/s", done / 1e9, total / 1e9, rate / 1e6)
        self.done = done


# Patterns of the files that a conversion reads, in a Hub repository's top folder; weights in order of preference.
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHT_FILES = ["model*.safetensors", "pytorch_model*.bin", "*.nemo"]
_PROGRESS_INTERVAL_S = 5.0
_MAX_TRIES = 3  # huggingface_hub resumes some broken downloads by itself, depending on its version
_RETRY_PAUSE_S = 1.0


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """The local folder or file of a checkpoint; a Hub id is downloaded first.

    name: a local folder or file, a Hub id (`gpt2`, `owner/model`), or `owner/model:file` for one file of a
    repository. Honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; if the Hub is out of reach, a cached
    copy is used. Broken downloads are resumed; a file gets its final name when it is complete.
    Raises ValueError, in one sentence, for an unknown name and for a failed download.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 and ":" not in name:
        raise ValueError(f"hf_model_name is {name!r}, and there is no such folder or file")
    try:
        return _download(name, revision)
    except Exception as error:  # the exceptions of requests, httpx and hf_xet have no other common class
        raise ValueError(f"hf_model_name is {name!r}: {_reason(error, revision)}") from error


def weight_bytes(name: str) -> int:
    """Bytes of the weight files of a checkpoint that is on this machine; 0 for another."""
    path = Path(name).expanduser()
    kinds = ([path], path.glob("*.safetensors"), path.glob("*.bin"))
    return next((size for kind in kinds if (size := sum(file.stat().st_size for file in kind if file.is_file()))), 0)


class _Missing(Exception):
    """A repository, or its cached copy, lacks a file; the message names it."""


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub.utils import validate_repo_id

    repo_id, _, file_name = name.partition(":")
    validate_repo_id(repo_id)
    obstacle = _obstacle(repo_id, revision)
    if file_name:
        choices, unwanted = [[glob.escape(file_name)]], []
    else:  # *.json fits onnx/config.json too, so files below the top folder are ruled out
        choices, unwanted = [[*_SIDE_FILES, weights] for weights in _WEIGHT_FILES], ["*/*"]
    for wanted in choices:
        folder = _fetch(repo_id, obstacle, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        if any(folder.glob(wanted[-1])):
            return folder / file_name
    weights = "model.safetensors or pytorch_model.bin (whole or in shards) or .nemo"
    what = f"file {file_name!r}" if file_name else weights
    raise _Missing(f"its cached copy has no {what}, and {obstacle}" if obstacle else f"the repository has no {what}")


def _obstacle(repo_id: str, revision: str | None) -> str | None:
    """The reason that the Hub is out of reach, or None. Raises the Hub's error about the repository or the revision."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:  # snapshot_download asks the same without a time limit, and behind some firewalls waits for ever
        HfApi().model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return None
    except Exception as error:
        if not _may_pass(error):
            raise
        obstacle = f"{constants.ENDPOINT} is out of reach ({_brief(error)})"
    _LOG.warning("%s; looking for %s in the cache", obstacle, repo_id)
    return obstacle


def _fetch(repo_id: str, obstacle: str | None, **what: Any) -> Path:
    """snapshot_download of `what` (revision and patterns); only from the cache if there is an obstacle."""
    from huggingface_hub import errors, snapshot_download

    num_tries = 0
    while True:
        num_tries += 1
        try:
            with _progress_lines(repo_id):
                return Path(snapshot_download(repo_id, local_files_only=obstacle is not None, **what))
        except errors.LocalEntryNotFoundError as error:
            why = obstacle or f"the download failed ({_brief(error.__cause__ or error)})"
            revision = what["revision"] or "main"
            raise _Missing(f"revision {revision!r} is not, or not all of it, in the cache, and {why}") from error
        except Exception as error:
            if num_tries == _MAX_TRIES or not _may_pass(error):
                raise
            _LOG.warning("the download of %s broke off (%s); going on with it", repo_id, _brief(error))
            time.sleep(_RETRY_PAUSE_S)


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed: not after the Hub's refusal, nor after a file system's error (a full disk)."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code >= 500 or response.status_code == 429
    return getattr(error, "errno", None) is None


def _reason(error: Exception, revision: str | None) -> str:
    """Why there is no checkpoint, as the end of a sentence."""
    from huggingface_hub import constants, errors

    if isinstance(error, _Missing):
        return str(error)
    if isinstance(error, errors.HFValidationError):
        return "neither a folder or file here nor a Hub id (owner/name or owner/name:file)"
    if isinstance(error, errors.GatedRepoError):  # is a RepositoryNotFoundError
        return f"{constants.ENDPOINT} gives it only for the HF_TOKEN of a user who was granted access"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder here, and no such repository at {constants.ENDPOINT} (a private one needs HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    return f"the download failed ({_brief(error)})"


def _brief(error: BaseException) -> str:
    response = getattr(error, "response", None)
    kind = type(error).__name__ if response is None else f"status {response.status_code}"
    message = getattr(error, "server_message", None) or one_line(error)  # without huggingface_hub's advice
    return f"{kind}: {' '.join(message.split())[:200]}"


@contextmanager
def _progress_lines(repo_id: str) -> Iterator[None]:
    """Log the download's progress if there is no terminal for huggingface_hub's bars: under mpirun."""
    from huggingface_hub import constants

    blobs = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "blobs")
    is_over = threading.Event()

    def num_bytes() -> int:
        return sum(path.stat().st_blocks * 512 for path in blobs.glob("*"))

    def log(started: float, at_start: int) -> None:
        while not is_over.wait(_PROGRESS_INTERVAL_S):
            with suppress(OSError):  # a file that was renamed since it was listed
                done = num_bytes() - at_start
                rate = done / (time.monotonic() - started)
                _LOG.info("downloading %s: %.2f GB so far, %.0f MB/s", repo_id, done / 1e9, rate / 1e6)

    if not sys.stderr.isatty():
        threading.Thread(target=log, args=(time.monotonic(), num_bytes()), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def model_key(name: str) -> str:
    """A model's folder name below --output-dir: `owner/model` → `owner--model`, a path → its last part."""
    if Path(name).expanduser().exists():
        name = Path(name).expanduser().resolve().name
    return name.replace("/", "--").replace(":", "--")
