"""The same requests to the torch engine and to FasterTransformer's (with the stand-in op): the same answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytriton.client import DecoupledModelClient, ModelClient
from pytriton.client.exceptions import PyTritonClientInferenceServerError

from tests.support.launch import ROOT, Server, serving
from tests.support.standin import StandinUnavailable, build_standin

MODEL = "tiny-gpt2"
PROMPTS = [b"the rain in", b"a", b"so many more words than in any other of these"]


@pytest.fixture(scope="module")
def servers(
    converted: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Both engines on two ranks, tp 2."""
    try:
        library = build_standin(ROOT / "build" / "standin")
    except StandinUnavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("servers")
    flags = ["--hf-model-name", str(converted(2)), "--tp", "2", "--model-name", MODEL, "--max-batch-size", "8"]
    with (
        serving(2, folder / "torch.log", *flags, "--engine", "torch") as ours,
        serving(2, folder / "ft.log", *flags, "--engine", "fastertransformer", "--lib-path", str(library)) as theirs,
    ):
        yield ours, theirs


def columns(rows: int, **values: Any) -> dict[str, np.ndarray]:
    types = {int: np.uint32, float: np.float32, bool: np.bool_, bytes: object}
    arrays = {name: np.array([[value]] * rows, dtype=types[type(value)]) for name, value in values.items()}
    return {"prompts": np.array(PROMPTS[:rows], dtype=object)[:, None], **arrays}


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.8, "temperature": 0.7},
    "min_length": {"min_length": 12},
    "stop words": {"stop_words": b"e"},
    "stop word kept": {"stop_words": b"e", "include_stop_words_in_output": True},
    "bad word": {"bad_words": b"e"},
    "without the prompt": {"exclude_input_in_output": True},
    "special tokens": {"skip_special_tokens": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_answers(servers: tuple[Server, Server], case: str) -> None:
    answers = []
    for server in servers:
        with ModelClient(server.url(), MODEL) as client:
            answers.append(client.infer_batch(**columns(3, request_output_len=24, **CASES[case])))
    ours, theirs = answers
    for name in ("sentences", "sequence_length", "finish_reason", "output_ids"):
        assert np.array_equal(ours[name], theirs[name]), (name, ours[name], theirs[name])
    if case == "greedy":
        np.testing.assert_allclose(ours["cum_log_probs"], theirs["cum_log_probs"], rtol=1e-4)


def test_beams_and_samples_have_the_same_shapes(servers: tuple[Server, Server]) -> None:
    """FasterTransformer ends and scores beams by its own rules, and draws from its own generator."""
    for more in ({"beam_width": 3}, {"n": 3, "runtime_top_k": 20}):
        for server in servers:
            with ModelClient(server.url(), MODEL) as client:
                answer = client.infer_batch(**columns(2, request_output_len=10, **more))
                again = client.infer_batch(**columns(2, request_output_len=10, **more))
            assert answer["sentences"].shape == (2, 3, 1)
            assert np.array_equal(answer["output_ids"], again["output_ids"])
            assert all(
                text.startswith(prompt)
                for prompt, row in zip(PROMPTS, answer["sentences"], strict=False)
                for text in row[:, 0]
            )
            if "beam_width" in more:
                assert (np.diff(answer["cum_log_probs"], axis=1) <= 0).all()


def test_a_stream_of_either_is_the_whole_text(servers: tuple[Server, Server]) -> None:
    texts = []
    for server in servers:
        inputs = {name: array[0] for name, array in columns(1, request_output_len=24).items()}
        with DecoupledModelClient(server.url("grpc"), f"{MODEL}_streaming") as client:
            answers = list(client.infer_sample(**inputs))
        texts.append(b"".join(answer["sentences"][0, 0] for answer in answers))
        assert answers[-1]["finish_reason"].tolist() == [[b"length"]]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5; with the FasterTransformer engine it must be 0"),
        ({"top_p_decay": 0.5}, "top_p_decay is 0.5; with the FasterTransformer engine it must be 1"),
        ({"ignore_eos": True}, "ignore_eos is true; with the FasterTransformer engine it must be false"),
        ({"num_log_probs": 2}, "num_log_probs is 2; with the FasterTransformer engine it must be 0"),
        ({"end_id": 4}, "end_id is 4; with the FasterTransformer engine it must be the model's, 302"),
        (
            {"is_return_log_probs": True},
            "is_return_log_probs is set; the FasterTransformer engine has cum_log_probs only",
        ),
    ],
)
def test_what_the_op_lacks_is_refused(servers: tuple[Server, Server], more: dict[str, Any], expected: str) -> None:
    with ModelClient(servers[0].url(), MODEL) as client:
        client.infer_batch(**columns(1, request_output_len=4, **more))
    with ModelClient(servers[1].url(), MODEL) as client, pytest.raises(PyTritonClientInferenceServerError) as error:
        client.infer_batch(**columns(1, request_output_len=4, **more))
    assert f"BadRequest: {expected}" in str(error.value)
