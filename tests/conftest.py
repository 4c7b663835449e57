"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

from convert import convert
from tests.support.checkpoints import make_gpt2


@pytest.fixture(scope="session")
def gpt2_source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    """A tiny random GPT-2 whose vocabulary no tp divides, with a tokenizer: its folder and Hugging Face's model."""
    folder = tmp_path_factory.mktemp("source") / "tiny-gpt2"
    model = make_gpt2(folder, vocab_size=303, heads=4, hidden=64, layers=4, n_positions=256)
    return folder, model


@pytest.fixture(scope="session")
def converted(
    gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """tp → the tiny model's converted folder, in fp32."""
    output_dir = tmp_path_factory.mktemp("ft_models")
    return lambda tp: convert(gpt2_source[0], output_dir, tp, "fp32")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the time of a conversion of a tiny model would go into waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
