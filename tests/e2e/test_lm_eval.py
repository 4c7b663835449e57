"""lm-evaluation-harness through the OpenAI API and through its own Hugging Face backend: the same figures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hugging_face_models import make as make_model
from tests.support.openai_api import STORIES, openai_api

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval here (./install.sh --clients)"),
]

TASK = """
task: stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WORD_TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{ends[label]}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}},
              {{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ITEMS = [
    ("Once upon a time", [" there was a", " table of", " because"], 0),  # the first is greedy
    ("Once upon a time there was a king who", [" had a daughter", " table green of", " the the the"], 0),
    ("The children ran down to the", [" because", " river", " of"], 1),
    ("“What is the matter?” said the", [" under", " old woman", " blue seven"], 1),
    ("He went into the forest and", [" forest", " door cat", " there he saw a"], 2),
    ("The fox said to the", [" hen", " is", " said"], 0),
    ("She was very", [" glad", " table", " of"], 0),
    ("There was once a poor man who had", [" three sons", " quickly and", " not it"], 0),
    ("And they lived happily ever", [" after", " before", " king"], 0),
]


def run(folder: Path, model: str, arguments: str) -> dict[str, Any]:
    """One evaluation in a process of its own: {task: samples and results}."""
    output = folder / model
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "stories,words"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(output), "--log_samples"]
    environment = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [*command, "--batch_size", "4"], env=os.environ | environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {"results": json.loads(next(output.rglob("results*.json")).read_text())["results"]}
    for task in ("stories", "words"):
        lines = next(output.rglob(f"samples_{task}*.jsonl")).read_text().splitlines()
        found[task] = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    return found


@pytest.mark.parametrize("kind", ["stories", "smol", "gpt-neox"])
def test_log_likelihoods_accuracy_and_is_greedy(kind: str, tmp_path: Path) -> None:
    source, max_len = STORIES, 512
    if kind != "stories":
        source = tmp_path / kind
        max_len = make_model(source, kind).config.max_position_embeddings
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"start": start, "ends": ends, "label": label}) for start, ends, label in ITEMS]
    data.write_text("\n".join(rows))
    (tmp_path / "tasks/stories.yaml").write_text(TASK.format(data=data))
    (tmp_path / "tasks/words.yaml").write_text(WORD_TASK.format(data=data))
    with openai_api(tmp_path / "weights", source=source) as api:
        ours = run(
            tmp_path,
            "local-completions",
            f"model=stories,base_url={api.url}/v1/completions,tokenizer={source},max_length={max_len},num_concurrent=2",
        )
    theirs = run(tmp_path, "hf", f"pretrained={source},dtype=float32,max_length={max_len}")
    for task in ("stories", "words"):
        for own, other in zip(ours[task], theirs[task], strict=True):
            for (value, is_greedy), (expected, expected_greedy) in zip(pairs(own), pairs(other), strict=True):
                assert value == pytest.approx(expected, abs=1e-3)
                assert is_greedy == expected_greedy
    assert kind != "stories" or any(greedy for sample in theirs["stories"] for _, greedy in pairs(sample))
    for task, metric in (("stories", "acc,none"), ("words", "acc,none"), ("words", "perplexity,none")):
        assert ours["results"][task][metric] == pytest.approx(theirs["results"][task][metric], rel=1e-3)


def pairs(sample: dict[str, Any]) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each of a sample's requests."""
    return [(float(value), str(greedy) == "True") for (value, greedy), *_ in sample["resps"]]
