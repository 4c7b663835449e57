"""Checkpoints made to do harm end in one short sentence, within 5 s and 1 GiB: tests/support/hostile_checkpoints.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.broken import EVIL_TRACE
from tests.support.hostile import MEMORY_BYTES, SECONDS
from tests.support.hostile_checkpoints import ATTACKS
from tests.support.ranks import ROOT


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all attacks that this run has selected: one process runs them one after the other."""
    items = (item for item in request.session.items if item.module is request.module)
    names = [item.callspec.params["name"] for item in items]
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-m", "tests.support.hostile", str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def cases() -> list[Any]:
    """The first of each kind of file is not slow."""
    seen: set[str] = set()
    params = []
    for name, attack in ATTACKS.items():
        kind = name.partition(":")[0]
        reason = attack.slow or ("another one of its kind is not slow" if kind in seen else "")
        if not attack.slow:
            seen.add(kind)
        params.append(pytest.param(name, marks=[pytest.mark.slow(reason)] if reason else []))
    return params


@pytest.mark.parametrize("name", cases())
def test_a_hostile_checkpoint_ends_in_one_sentence(name: str, outcomes: dict[str, Any]) -> None:
    found = outcomes[name]
    assert ATTACKS[name].part in found["sentence"], found
    assert found["kind"] in ("ValueError", "RuntimeError", "OSError")
    assert len(found["sentence"]) < 700 and found["sentence"].isprintable()
    assert found["seconds"] < SECONDS, found
    assert found["num_bytes"] < MEMORY_BYTES, found
    assert found["left"] == (["out/1-gpu"] if name.startswith("output") else [])
    assert not Path(EVIL_TRACE).exists()
