"""Small things that several scripts share: logging, user errors, the download of a checkpoint."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


def setup_logging(verbose: bool = False, rank: int = 0, size: int = 1) -> None:
    """Log lines to stderr, with the rank where there are several."""
    who = f"[rank {rank}] " if size > 1 else ""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format=f"%(asctime)s %(levelname)s {who}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    if not verbose:  # PyTriton warns, with a traceback, of each request that is refused
        for noisy in ("httpx", "httpcore", "urllib3", "filelock", "sh", "pytriton", "asyncio", "transformers"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def one_line(error: BaseException) -> str:
    """An exception's message as one line, its class's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# What a conversion needs from a Hub repository; the weights' patterns come in order of preference.
_SIDE_FILES = ["*.json", "*.txt", "*.model"]
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """The local folder or file that `name` stands for, downloaded where it is a Hub id.

    name: a local folder or file, a Hub id (`gpt2`, `owner/model`), or `owner/model:file` for one file of a
    repository. Honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE; broken downloads are resumed.
    Raises ValueError, in one sentence, for a name that stands for nothing.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 and ":" not in name:
        raise ValueError(f"hf_model_name is {name!r}, and there is no such folder or file")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

    repo_id, _, file_name = name.partition(":")
    try:
        if file_name:
            return Path(hf_hub_download(repo_id, file_name, revision=revision))
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(repo_id, revision=revision))
        files = HfApi().list_repo_files(repo_id, revision=revision)
        weights = next((p for p in _WEIGHT_FILES if any(_fits(f, p) for f in files)), None)
        if weights is None:
            raise ValueError(f"hf_model_name is {name!r}, and that repository has no safetensors or pytorch_model.bin")
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*_SIDE_FILES, weights]))
    except errors.HFValidationError as error:
        raise ValueError(f"hf_model_name is {name!r}: {one_line(error)}") from None
    except errors.LocalEntryNotFoundError:
        endpoint = constants.ENDPOINT
        raise ValueError(
            f"hf_model_name is {name!r}: not in the local cache, and {endpoint} is out of reach or switched off"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"hf_model_name is {name!r}: the repository has no revision {revision!r}") from None
    except errors.EntryNotFoundError:
        raise ValueError(f"hf_model_name is {name!r}: the repository has no file {file_name!r}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"hf_model_name is {name!r}: no such folder here and no such repository there (private ones need HF_TOKEN)"
        ) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise ValueError(f"hf_model_name is {name!r}: the download failed ({one_line(error)[:200]})") from None


def _fits(file_name: str, pattern: str) -> bool:
    from fnmatch import fnmatch

    return "/" not in file_name and fnmatch(file_name, pattern)


def model_key(name: str) -> str:
    """A model's folder name below --output-dir: `owner/model` → `owner--model`, a path → its last part."""
    if Path(name).expanduser().exists():
        name = Path(name).expanduser().resolve().name
    return name.replace("/", "--").replace(":", "--")
