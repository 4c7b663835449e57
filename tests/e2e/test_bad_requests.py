"""Every bad request gets one sentence with the field, the value and the limit, over raw HTTP and through clients."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from pytriton.client import ModelClient
from pytriton.client.exceptions import PyTritonClientInferenceServerError
from transformers import GPT2LMHeadModel

from tests.support.launch import Server, sentence, serving

MODEL = "tiny-gpt2"
GOOD = {"prompts": ("BYTES", [["x"]]), "request_output_len": ("UINT32", [[4]])}
NUMPY_TYPES = {"BYTES": object, "UINT32": np.uint32, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}

FACTOR, SIGNED = "it must be between 0.001 and 1000", "it must be between -1000 and 1000"
FACTOR_OR_0 = "it must be 0, or between 0.001 and 1000"

# What is changed in a good request (None: left out), and the sentence it gets.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompts": ("BYTES", [[""]])}, "prompts[0] is empty; it must have at least one token"),
    "second prompt empty": (
        {"prompts": ("BYTES", [["x"], [""]]), "request_output_len": ("UINT32", [[4], [4]])},
        "prompts[1] is empty; it must have at least one token",
    ),
    "words of all prompts": (
        {
            "prompts": ("BYTES", [["x"]] * 70),
            "request_output_len": ("UINT32", [[4]] * 70),
            "bad_words": ("BYTES", [["y"] * 236 + [""]] * 70),
        },
        "stop_words and bad_words are 16520 words in all; at most 16384 are taken",
    ),
    "no prompt": ({"prompts": None}, "prompts is missing; it is required (or input_ids or messages in its place)"),
    "prompts and input_ids": (
        {"input_ids": ("INT32", [[1, 2]])},
        "prompts and input_ids are both given; one of the two must be",
    ),
    "negative token": (
        {"prompts": None, "input_ids": ("INT32", [[1, -2]])},
        "input_ids[0] has token -2; the vocabulary has 303 tokens",
    ),
    "token beyond the vocabulary": (
        {"prompts": None, "input_ids": ("INT32", [[303, 2]])},
        "input_ids[0] has token 303; the vocabulary has 303 tokens",
    ),
    "input_lengths beyond input_ids": (
        {"prompts": None, "input_ids": ("INT32", [[1, 2]]), "input_lengths": ("UINT32", [[3]])},
        "input_lengths[0] is 3; input_ids has 2 tokens",
    ),
    "input_lengths 0": (
        {"prompts": None, "input_ids": ("INT32", [[1, 2]]), "input_lengths": ("UINT32", [[0]])},
        "input_ids[0] is empty; it must have at least one token",
    ),
    "no output_len": ({"request_output_len": None}, "request_output_len is missing; it is required"),
    "output_len 0": ({"request_output_len": ("UINT32", [[0]])}, "request_output_len is 0; it must be at least 1"),
    "output_len beyond the positions": (
        {"request_output_len": ("UINT32", [[256]])},
        "request_output_len is 256; with the prompt's 1 tokens that is 257, "
        "and the longest sequence served is 256 tokens",
    ),
    "output_len beyond 31 bits": (
        {"request_output_len": ("UINT32", [[2**32 - 1]])},
        "request_output_len is 4294967295; with the prompt's 1 tokens that is 4294967296, "
        "and the longest sequence served is 256 tokens",
    ),
    "two output_lens": (
        {"request_output_len": ("UINT32", [[4, 4]])},
        None,  # Triton's own words: it checks shapes itself
    ),
    "beam_width 0": ({"beam_width": ("UINT32", [[0]])}, "beam_width is 0; it must be between 1 and 16"),
    "beam_width 17": ({"beam_width": ("UINT32", [[17]])}, "beam_width is 17; it must be between 1 and 16"),
    "beams beyond the slots": (
        {"beam_width": ("UINT32", [[9]])},
        "beam_width is 9; at most 8 sequences run at once",
    ),
    "early_stopping maybe": (
        {"early_stopping": ("BYTES", [["maybe"]])},
        "early_stopping is maybe; it must be false, true or never",
    ),
    "n 0": ({"n": ("UINT32", [[0]])}, "n is 0; it must be between 1 and 64"),
    "n 65": ({"n": ("UINT32", [[65]])}, "n is 65; it must be between 1 and 64"),
    "n beyond the slots": (
        {"n": ("UINT32", [[9]]), "runtime_top_k": ("UINT32", [[5]])},
        "n is 9; at most 8 sequences run at once",
    ),
    "n greedy": (
        {"n": ("UINT32", [[2]])},
        "n is 2; with greedy choice it must be 1 (set runtime_top_k or runtime_top_p)",
    ),
    "n and beams": (
        {"n": ("UINT32", [[2]]), "beam_width": ("UINT32", [[3]])},
        "n is 2 and beam_width 3; one of the two must be 1",
    ),
    "top_k beyond the vocabulary": (
        {"runtime_top_k": ("UINT32", [[304]])},
        "runtime_top_k is 304; the vocabulary has 303 tokens",
    ),
    "top_p 1.5": ({"runtime_top_p": ("FP32", [[1.5]])}, "runtime_top_p is 1.5; it must be between 0 and 1"),
    "top_p negative": ({"runtime_top_p": ("FP32", [[-0.5]])}, "runtime_top_p is -0.5; it must be between 0 and 1"),
    "temperature negative": (
        {"temperature": ("FP32", [[-1.0]])},
        f"temperature is -1; {FACTOR_OR_0}",
    ),
    "top_p_decay 0": ({"top_p_decay": ("FP32", [[0.0]])}, "top_p_decay is 0; it must be above 0 and at most 1"),
    "top_p_decay 1.5": ({"top_p_decay": ("FP32", [[1.5]])}, "top_p_decay is 1.5; it must be above 0 and at most 1"),
    "top_p_min 0": ({"top_p_min": ("FP32", [[0.0]])}, "top_p_min is 0; it must be above 0 and at most 1"),
    "top_p_min 2": ({"top_p_min": ("FP32", [[2.0]])}, "top_p_min is 2; it must be above 0 and at most 1"),
    "top_p_reset_ids beyond the vocabulary": (
        {"top_p_reset_ids": ("UINT32", [[303]])},
        "top_p_reset_ids is 303; the vocabulary has 303 tokens",
    ),
    "repetition_penalty 0": (
        {"repetition_penalty": ("FP32", [[0.0]])},
        f"repetition_penalty is 0; {FACTOR}",
    ),
    "repetition_penalty negative": (
        {"repetition_penalty": ("FP32", [[-1.5]])},
        f"repetition_penalty is -1.5; {FACTOR}",
    ),
    "both penalties": (
        {"repetition_penalty": ("FP32", [[1.5]]), "presence_penalty": ("FP32", [[0.5]])},
        "repetition_penalty is 1.5 and presence_penalty 0.5; at most one of the two can be set",
    ),
    "num_log_probs 65": ({"num_log_probs": ("UINT32", [[65]])}, "num_log_probs is 65; it must be between 0 and 64"),
    "num_log_probs beyond the vocabulary": (
        {"num_log_probs": ("UINT32", [[304]])},
        "num_log_probs is 304; the vocabulary has 303 tokens",
    ),
    "end_id beyond the vocabulary": ({"end_id": ("UINT32", [[303]])}, "end_id is 303; the vocabulary has 303 tokens"),
    "start_id beyond the vocabulary": (
        {"prompts": ("BYTES", [[""]]), "start_id": ("UINT32", [[303]])},
        "start_id is 303; the vocabulary has 303 tokens",
    ),
    "deadline 0": ({"deadline_s": ("FP32", [[0.0]])}, "deadline_s is 0; it must be above 0"),
    "deadline negative": ({"deadline_s": ("FP32", [[-3.0]])}, "deadline_s is -3; it must be above 0"),
    "a long stop word": (
        {"stop_words": ("BYTES", [["y" * 257]])},
        "stop_words[0] has a word of 257 bytes; at most 256 are allowed",
    ),
    "many bad words": (
        {"bad_words": ("BYTES", [["y"] * 257])},
        "bad_words[0] has 257 words; at most 256 are allowed",
    ),
    "words of many bytes": (
        {"bad_words": ("BYTES", [["y" * 256] * 17])},
        "bad_words[0] has words of 4352 bytes; at most 4096 are allowed",
    ),
    "a huge prompt": (
        {"prompts": ("BYTES", [["y " * 8193]])},
        "prompts[0] has 16386 bytes; at most 16384 are taken for the 256 tokens of the longest sequence served",
    ),
    "inputs of many bytes": (
        {"prompts": ("BYTES", [["y" * 2**24]])},
        f"the inputs have {2**24 + 4} bytes; at most {2**24} are taken",
    ),
    "too many tokens": (
        {"prompts": None, "input_ids": ("INT32", [[7] * 257])},
        "input_ids[0] has 257 tokens; the longest sequence served is 256 tokens",
    ),
    "too many alternatives": (
        {
            "prompts": ("BYTES", [["x"]] * 80),
            "request_output_len": ("UINT32", [[64]] * 80),
            "num_log_probs": ("UINT32", [[64]] * 80),
        },
        "num_log_probs asks for 327680 alternatives in one request; at most 262144 are kept",
    ),
    "a len_penalty that overflows": (
        {"beam_width": ("UINT32", [[3]]), "len_penalty": ("FP32", [[200.0]])},
        "len_penalty is 200; it must be between -10 and 10",
    ),
    "temperature close to 0": (
        {"temperature": ("FP32", [[1e-6]])},
        f"temperature is 1e-06; {FACTOR_OR_0}",
    ),
    "stop without an id": (
        {"stop": ("BOOL", [[True]])},
        "stop is set; every row of such a request must have it, and a request_id",
    ),
    "stop of what does not run": (
        {"stop": ("BOOL", [[True]]), "request_id": ("BYTES", [["nobody"]])},
        "request_id 'nobody' is not running",
    ),
    "an id twice": (
        {
            "prompts": ("BYTES", [["x"], ["y"]]),
            "request_output_len": ("UINT32", [[4], [4]]),
            "request_id": ("BYTES", [["same"], ["same"]]),
        },
        "request_id 'same' is running already; it must be unique",
    ),
    "fewer values than prompts": (
        {"prompts": ("BYTES", [["x"], ["y"]]), "temperature": ("FP32", [[1.0]])},
        None,  # Triton's own words
    ),
    "wrong type": ({"request_output_len": ("INT32", [[4]])}, None),
    "unknown tensor": ({"prompt_len": ("UINT32", [[4]])}, None),
}

# What JSON cannot say.
BINARY_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "temperature nan": (
        {"temperature": ("FP32", [[np.nan]])},
        f"temperature is nan; {FACTOR_OR_0}",
    ),
    "temperature inf": (
        {"temperature": ("FP32", [[np.inf]])},
        f"temperature is inf; {FACTOR_OR_0}",
    ),
    "top_p nan": ({"runtime_top_p": ("FP32", [[np.nan]])}, "runtime_top_p is nan; it must be between 0 and 1"),
    "top_p_decay nan": ({"top_p_decay": ("FP32", [[np.nan]])}, "top_p_decay is nan; it must be above 0 and at most 1"),
    "repetition nan": (
        {"repetition_penalty": ("FP32", [[np.nan]])},
        f"repetition_penalty is nan; {FACTOR}",
    ),
    "repetition inf": (
        {"repetition_penalty": ("FP32", [[np.inf]])},
        f"repetition_penalty is inf; {FACTOR}",
    ),
    "presence nan": (
        {"presence_penalty": ("FP32", [[np.nan]])},
        f"presence_penalty is nan; {SIGNED}",
    ),
    "frequency inf": (
        {"frequency_penalty": ("FP32", [[-np.inf]])},
        f"frequency_penalty is -inf; {SIGNED}",
    ),
    "len_penalty nan": ({"len_penalty": ("FP32", [[np.nan]])}, "len_penalty is nan; it must be between -10 and 10"),
    "diversity inf": (
        {"beam_search_diversity_rate": ("FP32", [[np.inf]])},
        f"beam_search_diversity_rate is inf; {SIGNED}",
    ),
    "deadline nan": ({"deadline_s": ("FP32", [[np.nan]])}, "deadline_s is nan; it must be above 0"),
    "bytes": ({"prompts": ("BYTES", [[b"ab\xff"]])}, "prompts[0] is not valid UTF-8: invalid start byte at byte 2"),
    "stop word bytes": (
        {"stop_words": ("BYTES", [[b"ok", b"\xe2\x82"]])},
        "stop_words[0] is not valid UTF-8: unexpected end of data at byte 0",
    ),
    "id bytes": (
        {"request_id": ("BYTES", [[b"\xff"]])},
        "request_id is not valid UTF-8: invalid start byte at byte 0",
    ),
}


@pytest.fixture(scope="module")
def server(gpt2_source: tuple[Path, GPT2LMHeadModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = ["--hf-model-name", str(gpt2_source[0]), "--output-dir", str(folder / "ft_models"), "--max-batch-size", "8"]
    with serving(1, folder / "log", *flags) as running:
        yield running


def changed(changes: dict[str, Any]) -> dict[str, tuple[str, list[list[Any]]]]:
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not None}


def test_the_table_is_long_enough() -> None:
    assert len(CASES) + len(BINARY_CASES) >= 65


@pytest.mark.parametrize("case", CASES)
def test_over_raw_http(server: Server, case: str) -> None:
    changes, expected = CASES[case]
    inputs = [
        {"name": name, "datatype": datatype, "shape": [len(rows), len(rows[0])], "data": [v for r in rows for v in r]}
        for name, (datatype, rows) in changed(changes).items()
    ]
    status, answer = server.infer(MODEL, inputs)
    text = sentence(answer)
    assert status == 400
    assert "Traceback" not in text and "site-packages" not in text
    assert text == expected if expected else 0 < len(text) < 500, text


@pytest.mark.parametrize("case", [*(name for name, (_, expected) in CASES.items() if expected), *BINARY_CASES])
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_through_model_client(server: Server, case: str, kind: str) -> None:
    changes, expected = (CASES | BINARY_CASES)[case]
    inputs = {}
    for name, (datatype, rows) in changed(changes).items():
        rows = [[v.encode() if isinstance(v, str) else v for v in row] for row in rows]
        inputs[name] = np.array(rows, dtype=NUMPY_TYPES[datatype])
    with ModelClient(server.url(kind), MODEL) as client, pytest.raises(PyTritonClientInferenceServerError) as error:
        client.infer_batch(**inputs)
    assert f"BadRequest: {expected}" in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("case", ["empty prompt", "top_p 1.5", "no output_len", "both penalties", "n greedy"])
def test_streams_refuse_alike(server: Server, case: str) -> None:
    changes, expected = CASES[case]
    body = {name: rows[0] if len(rows[0]) > 1 else rows[0][0] for name, (_, rows) in changed(changes).items()}
    url = f"{server.url()}/v2/models/{MODEL}_streaming/generate_stream"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == 400
    text = error.value.read().decode().removeprefix("data: ")
    assert sentence(json.loads(text)) == expected


@pytest.mark.slow("10 s to send 300 MB through Triton")
@pytest.mark.parametrize(
    ("rows", "times", "expected"),
    [
        (512, 1, r"the inputs have \d+ bytes; at most 16777216 are taken"),
        (80, 12, r"prompts\[0\] has 200000 bytes; at most"),  # just below the stub's limit: rank 0 reads them
    ],
    ids=["refused by the stub", "refused by rank 0"],
)
def test_a_large_request_leaves_its_memory_to_others(server: Server, rows: int, times: int, expected: str) -> None:
    """Long strings once stayed in glibc's arenas, of which each thread had one. The requests take 240 MB and more.

    PyTriton's loop keeps one message, the last that it read, until the next one comes: 20 to 40 MB of these requests.
    """
    (pid,) = server.rank_pids

    def megabytes() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024

    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http}", network_timeout=120, concurrency=times)
    arrays = {
        "prompts": np.array([[b"x" * 200_000] for _ in range(rows)], dtype=object),
        "request_output_len": np.full((rows, 1), 4, np.uint32),
    }
    inputs = [
        tritonclient.http.InferInput(name, array.shape, GOOD[name][0]).set_data_from_numpy(array)
        for name, array in arrays.items()
    ]
    before = megabytes()
    for answer in [client.async_infer(MODEL, inputs) for _ in range(times)]:
        with pytest.raises(tritonclient.http.InferenceServerException, match=expected):
            answer.get_result()
    deadline = time.monotonic() + 20
    while megabytes() > before + 60 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert megabytes() <= before + 60


def test_the_server_is_well_after_all_that(server: Server) -> None:
    status, answer = server.infer(
        MODEL,
        [{"name": n, "datatype": t, "shape": [1, 1], "data": rows[0]} for n, (t, rows) in GOOD.items()],
    )
    assert status == 200, answer
    assert "Traceback" not in server.text
