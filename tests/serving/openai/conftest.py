"""The demo model behind the OpenAI API, and Hugging Face's own model beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.openai_api import STORIES, Api, openai_api

# Two roles, and a message's text as it is: what the tests expect can be written down.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("openai")
    (folder / "template.jinja").write_text(TEMPLATE)
    with openai_api(folder, flags={"chat_template": str(folder / "template.jinja")}) as api:
        yield api


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="session")
def log_probs() -> Callable[[list[int]], torch.Tensor]:
    """Token ids → Hugging Face's log-probabilities of what follows each: [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()

    @torch.inference_mode()
    def compute(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return compute


@pytest.fixture(scope="session")
def greedy(log_probs: Callable[[list[int]], torch.Tensor]) -> Callable[[list[int], int], list[int]]:
    """(prompt, number) → the likeliest tokens, one after the other."""

    def run(token_ids: list[int], count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found.append(int(log_probs([*token_ids, *found])[-1].argmax()))
        return found

    return run
