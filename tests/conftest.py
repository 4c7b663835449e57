"""Fixtures that several test modules share, and how the workers of pytest-xdist share the machine."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# pytest's workers, and the ranks and servers that they start, share the cores. torch reads this when it is imported.
_NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _NUM_WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _NUM_WORKERS)))

if TYPE_CHECKING:  # importing it takes seconds, which the process that hands out the tests saves
    from transformers import GPT2LMHeadModel

_TESTS = Path(__file__).parent
# Modules that take longest come first, so that no worker is left with one of them at the end.
_LONGEST_FIRST = ("ranks", "tests/e2e/", "tests/executor/", "tests/engine/", "tests/readers/")


@functools.cache
def _unit(module: str) -> str:
    """What one worker gets as a whole: a module, or all those whose tests run on ranks that stay.

    Those ranks then are started by one worker only, and never compute for two tests at once.
    """
    source = (_TESTS.parent / module).read_text()
    return "ranks" if re.search(r"^from tests\.support\.ranks import .*(call_ranks|run_)", source, re.M) else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        unit = _unit(item.nodeid.partition("::")[0])
        return next((k for k, start in enumerate(_LONGEST_FIRST) if unit.startswith(start)), len(_LONGEST_FIRST))

    items.sort(key=place)  # stable


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid.partition("::")[0])

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def gpt2_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    """A tiny random GPT-2 whose vocabulary no tp divides, with a tokenizer: its folder and Hugging Face's model."""
    from tests.support.checkpoints import make_gpt2

    folder = tmp_path_factory.mktemp("source") / "tiny-gpt2"
    model = make_gpt2(folder, vocab_size=303, heads=4, hidden=64, layers=4, n_positions=256)
    return folder, model


@pytest.fixture(scope="session")
def converted(
    gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """tp → the tiny model's converted folder, in fp32."""
    from convert import convert

    output_dir = tmp_path_factory.mktemp("ft_models")
    return lambda tp: convert(gpt2_source[0], output_dir, tp, "fp32")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time of a conversion of a tiny model would go into waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
