"""Real server.py with a checkpoint of each family on ranks: the references' greedy text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.checkpoints import make_bloom, make_opt, make_tokenizer
from tests.support.engines import hf_greedy
from tests.support.hugging_face_models import make as make_model
from tests.support.launch import serving
from tests.support.nemo_checkpoints import TinyGPT, write_megatron, write_nemo

TEXTS = ["the rain in", "so many more words"]
NUM_TOKENS = 24

Greedy = Callable[[list[int], int], list[int]]


def opt(folder: Path) -> tuple[list[str], Greedy]:
    model = make_opt(folder / "tiny")
    make_tokenizer(folder / "tiny", model.config.vocab_size)
    return [str(folder / "tiny")], partial(hf_greedy, model)


def bloom(folder: Path) -> tuple[list[str], Greedy]:
    model = make_bloom(folder / "tiny")
    make_tokenizer(folder / "tiny", model.config.vocab_size)
    return [str(folder / "tiny")], partial(hf_greedy, model)


def llama(folder: Path) -> tuple[list[str], Greedy]:
    model = make_model(folder / "tiny", "smol")
    return [str(folder / "tiny")], partial(hf_greedy, model)


def multi_query(folder: Path) -> tuple[list[str], Greedy]:
    """One head of keys and values, which the ranks copy."""
    model = make_model(folder / "tiny", "multi-query")
    return [str(folder / "tiny")], partial(hf_greedy, model)


def uneven(folder: Path) -> tuple[list[str], Greedy]:
    """Layers that pp does not divide."""
    model = make_model(folder / "tiny", "gpt-neox", num_hidden_layers=5)
    return [str(folder / "tiny")], partial(hf_greedy, model)


def nemo(folder: Path) -> tuple[list[str], Greedy]:
    model = TinyGPT()
    return [str(write_nemo(folder / "tiny.nemo", model, style="core"))], model.greedy


def megatron(folder: Path) -> tuple[list[str], Greedy]:
    """Trained on 2 × 2 ranks, without arguments and with its tokenizer elsewhere: both are flags."""
    model = TinyGPT()
    write_megatron(folder / "tiny", model, tp=2, pp=2, with_args=False)
    (folder / "words").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tiny" / name).rename(folder / "words" / name)
    options = ["--num-heads", str(model.heads), "--tokenizer", str(folder / "words")]
    return [str(folder / "tiny"), *options], model.greedy


OTHER = pytest.mark.slow("each starts a server; the readers' and the engine's tests have every family")


@pytest.mark.parametrize(
    ("make", "tp", "pp"),
    [pytest.param(nemo, 2, 1, id="nemo")]
    + [pytest.param(make, 2, 1, marks=OTHER, id=make.__name__) for make in (opt, bloom, llama, megatron, multi_query)]
    + [pytest.param(uneven, 1, 2, marks=OTHER, id="uneven"), pytest.param(multi_query, 4, 1, marks=OTHER, id="tp4")],
)
def test_greedy_text_is_the_references(
    tmp_path: Path, make: Callable[[Path], tuple[list[str], Greedy]], tp: int, pp: int
) -> None:
    flags, greedy = make(tmp_path)
    more = ["--tp", str(tp), "--pp", str(pp), "--model-name", "tiny", "--output-dir", str(tmp_path / "ft_models")]
    with serving(tp * pp, tmp_path / "log", "--hf-model-name", *flags, *more) as server:
        done = server.client("--output-len", str(NUM_TOKENS), "--model-name", "tiny", "--json", "--prompts", *TEXTS)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("ft_models/*/*-gpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, line in zip(TEXTS, done.stdout.splitlines(), strict=True):
        prompt_ids = tokenizer.encode(text)
        expected = prompt_ids + greedy(prompt_ids, NUM_TOKENS)
        answer = json.loads(line)
        assert answer["output_ids"] == [expected]
        assert answer["sentences"] == [tokenizer.decode(expected, skip_special_tokens=True)]
