"""Requests that are nearly right: seeded changes of valid ones, as bytes for a socket, and what comes back.

Two kinds are left out, because each surely ends Triton and is an attack of its own (attacks.py): classification of a
text, and claimed shapes of gigabytes.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import random
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_HUGE = "1" + "0" * 400  # an integer beyond every float
_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    2**31,
    2**32,
    2**63,
    2**64,
    -(2**63) - 1,
    int(_HUGE),
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "a",
    "\0",
    "\ud800",  # half of a surrogate pair
    "\u202e💥",
    "-1",
    "NaN",
    "a" * 5000,
    [],
    [[]],
    [[[[[[1]]]]]],
    [None],
    [1, "a"],
    [0] * 600,
    [""] * 300,
    {},
    {"a": {"b": {"c": []}}},
    {"": None},
]
_SHAPES = [[], [0], [1], [-1], [1, 2], [2, 1], [0, 0], [1, 1, 1], [1] * 40, ["a"], [1.5], [None], {}, None, "1", 2**20]
_METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "get", "P\u00d6ST", "A" * 300]
_HEADERS = [
    "Content-Type: text/plain",
    "Content-Type: application/octet-stream",
    "Content-Type: application/json; charset=utf-16",
    "Content-Type: \x01",
    "Content-Encoding: gzip",
    "Content-Encoding: deflate",
    "Accept: nothing/at-all",
    "Authorization: Bearer " + "x" * 3000,
    "X-Request-Id: " + "y" * 3000,
    "Expect: 100-continue",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Inference-Header-Content-Length: 5",
    "Inference-Header-Content-Length: -1",
    "Inference-Header-Content-Length: 99999999999999999999",
    "Cookie: " + "z" * 6000,
]


@dataclass(frozen=True)
class Valid:
    """A request that is right, and names that its object could have as well."""

    method: str
    path: str
    body: dict[str, Any]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Case:
    """A request's bytes. is_http: whether it is whole, and right as far as HTTP goes; so it must be answered."""

    data: bytes
    is_http: bool


def cases(valid: Sequence[Valid], paths: Sequence[str], seed: int) -> Iterator[Case]:
    """Changes of the valid requests without an end. paths: others that the server has."""
    rng = random.Random(seed)
    while True:
        yield _case(rng, rng.choice(valid), paths)


def _case(rng: random.Random, valid: Valid, paths: Sequence[str]) -> Case:
    body = copy.deepcopy(valid.body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        body = _changed(rng, body, valid.names)
    data = json.dumps(body, ensure_ascii=rng.random() < 0.7).encode(errors="surrogatepass")
    method, path, headers, kind = valid.method, valid.path, ["Content-Type: application/json"], rng.random()
    if kind < 0.60:
        pass  # the object alone
    elif kind < 0.72:
        data = _damaged(rng, data)
    elif kind < 0.77:
        method = rng.choice(_METHODS[:7])
    elif kind < 0.82:
        path = rng.choice(
            (*paths, path + "/", path + "?a=%00&b", path.upper(), "/" + "a/" * 500, "/%ff%fe", "//", "/.")
        )
    elif kind < 0.87:
        headers = [rng.choice(_HEADERS)]
    else:
        return Case(_broken(rng, method, path, data), is_http=False)
    is_http = not any("\x01" in header or "Encoding" in header for header in headers)
    return Case(_request(method, path, headers, data), is_http)


def _request(method: str, path: str, headers: Sequence[str], body: bytes, length: int | str | None = None) -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: a", *headers]
    head.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*head, "Connection: close", "", ""]).encode(errors="replace") + body


def _changed(rng: random.Random, value: Any, names: Sequence[str], key: str = "") -> Any:
    """A value with one change somewhere in it."""
    if key == "shape" and rng.random() < 0.7:
        return copy.deepcopy(rng.choice(_SHAPES))
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice([*value, *names])
        if name in value and rng.random() < 0.1:
            return {other: item for other, item in value.items() if other != name}
        return {**value, name: _changed(rng, value.get(name), (), name)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [*value[:index], _changed(rng, value[index], (), key), *value[index + (rng.random() < 0.9) :]]
    if key == "shape" or rng.random() < 0.1:
        return [value]
    return copy.deepcopy(rng.choice(_VALUES))


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """A body that is no JSON any more, or an odd one."""
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(7)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.choice((1, 3, 50))) + data[place:]
    if kind == 2:
        return data[:place] + b"\xff\xc0\x80\xed\xa0\x80" + data[place:]  # no UTF-8
    if kind == 3:
        return rng.choice((b"[", b'{"a":', b"[[", b'{"prompt":[')) * rng.choice((1, 100, 20_000))
    if kind == 4:
        return rng.randbytes(rng.choice((0, 1, 100, 5000)))
    if kind == 5:
        return data.decode(errors="replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")), errors="replace")
    return data + rng.choice((b"x", b"{}", b"\0", data))


def _broken(rng: random.Random, method: str, path: str, body: bytes) -> bytes:
    """Bytes that are not HTTP, or only nearly."""
    whole = _request(method, path, ["Content-Type: application/json"], body)
    kind = rng.randrange(8)
    if kind == 0:
        return whole[: rng.randrange(1, len(whole))]  # cut off
    if kind == 1:
        return rng.randbytes(rng.choice((1, 20, 3000)))
    if kind == 2:
        return _request(method, path, [], body, rng.choice((0, 1, len(body) + 1, 10**6, -1, 2**64, "x", "")))
    if kind == 3:
        chunks = rng.choice((b"zz\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n", b"5\r\nab", b"1;" + b"a" * 9000))
        return f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks
    if kind == 4:
        return f"{rng.choice(_METHODS)} {path} HTTP/{rng.choice(('0.9', '1.0', '2.0', '9', 'x'))}\r\n\r\n".encode()
    if kind == 5:
        return _request(method, path, ["X-" + "h" * rng.choice((10, 9000, 70_000)) + ": 1"], body)
    if kind == 6:
        return _request(method, path, [f"X-{number}: 1" for number in range(3000)], body)
    place = rng.randrange(len(whole))
    return whole[:place] + rng.randbytes(4) + whole[place:]


def send(port: int, case: Case, timeout_s: float = 60.0) -> tuple[int, bytes] | None:
    """Send a case on a connection of its own: the status and the body, or None where there is no answer.

    Raises ConnectionRefusedError where nobody listens, TimeoutError where the connection stays open and silent.
    """
    with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
        try:
            connection.sendall(case.data)
            if not case.is_http:  # else it would wait for the rest, as it must
                connection.shutdown(socket.SHUT_WR)
            with contextlib.closing(http.client.HTTPResponse(connection)) as response:
                response.begin()
                try:
                    return response.status, response.read()
                except http.client.IncompleteRead as error:  # of HEAD: the length of a body that does not come
                    return response.status, error.partial
        except TimeoutError:
            raise
        except (OSError, ValueError, http.client.HTTPException):
            return None


def openai_requests(model: str) -> list[Valid]:
    """A valid request of each endpoint of the OpenAI port."""
    names = """n best_of seed stop stream stream_options logprobs echo presence_penalty frequency_penalty logit_bias
    user top_k top_p min_p repetition_penalty min_tokens ignore_eos stop_token_ids skip_special_tokens prompt_logprobs
    include_stop_str_in_output add_special_tokens truncate_prompt_tokens suffix temperature unknown""".split()
    chat = "top_logprobs max_completion_tokens chat_template_kwargs add_generation_prompt tools response_format".split()
    completion = {"model": model, "prompt": "Once upon", "max_tokens": 2, "temperature": 0.5}
    rich = {**completion, "n": 2, "stop": ["x"], "logprobs": 2, "logit_bias": {"5": 1.5}, "stream": True, "top_k": 5}
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "text", "text": "ho"}]}]
    return [
        Valid("POST", "/v1/completions", completion, names),
        Valid("POST", "/v1/completions", rich, names),
        Valid("POST", "/v1/completions", {**completion, "prompt": [[1, 2], [3]]}, names),
        Valid("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 2}, [*names, *chat]),
        Valid("POST", "/tokenize", {"prompt": "Once", "return_token_strs": True}, ["messages", *chat]),
        Valid("POST", "/detokenize", {"tokens": [1, 2, 3]}),
    ]


OPENAI_PATHS = [
    "/",
    "/health",
    "/version",
    "/metrics",
    "/tokenizer_info",
    "/v1/models",
    "/v1/models/%00",
    "/v1/nothing",
]


def triton_requests(model: str, names: Sequence[str]) -> list[Valid]:
    """A valid request of each way into Triton over HTTP. names: of the model's inputs."""
    short = {"prompts": "Once upon", "request_output_len": 2}
    inputs = [
        {"name": "prompts", "datatype": "BYTES", "shape": [1, 1], "data": ["Once"]},
        {"name": "request_output_len", "datatype": "UINT32", "shape": [1, 1], "data": [2]},
        {"name": "temperature", "datatype": "FP32", "shape": [1, 1], "data": [0.5]},
    ]
    infer = {"id": "a", "inputs": inputs, "outputs": [{"name": "sentences", "parameters": {"binary_data": False}}]}
    ids = {"name": "input_ids", "datatype": "INT32", "shape": [1, 3], "data": [1, 2, 3]}
    return [
        Valid("POST", f"/v2/models/{model}/infer", infer, ["parameters"]),
        Valid("POST", f"/v2/models/{model}/infer", {"inputs": [ids, inputs[1]]}),
        Valid("POST", f"/v2/models/{model}/generate", short, names),
        Valid("POST", f"/v2/models/{model}_streaming/generate_stream", short, names),
    ]


def triton_paths(model: str) -> list[str]:
    """Other paths of Triton over HTTP."""
    own = [
        f"/v2/models/{model}{rest}" for rest in ("", "/config", "/ready", "/stats", "/versions/1/infer", "/versions/x")
    ]
    shared = "/v2/systemsharedmemory/region/a/register"
    repository = ["/v2/repository/index", f"/v2/repository/models/{model}/unload", "/v2/repository/models/x/load"]
    return [
        *own,
        *repository,
        shared,
        "/v2/cudasharedmemory/status",
        "/v2/trace/setting",
        "/v2/logging",
        "/v2",
        "/metrics",
    ]
