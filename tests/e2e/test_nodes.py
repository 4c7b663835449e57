"""Real server.py on two nodes without a scheduler: mpirun, an agent in place of ssh, MPI over TCP."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.support.engines import hf_greedy
from tests.support.nodes import STORIES, Nodes, serving_on, two_nodes, why_not

pytestmark = [
    pytest.mark.slow("a minute: starts four servers on two nodes"),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path) as made:
        yield made


def payload_of_a_token(config: GPT2Config, tp: int, pp: int) -> int:
    """Bytes that a decode step of one sequence sends over the cable: both ways, in fp32, without headers.

    tp 2 × pp 1: each node sends its part of every all-reduce (embedding, and two per layer) and its half of the logits.
    pp 2: each stage is a node, and rank 0 sends the plan, and each rank of the first stage the hidden states.
    """
    plan, hidden = 3584, 4 * config.n_embd
    if pp == 1:
        return plan + 2 * (2 * config.n_layer + 1) * hidden + 4 * config.vocab_size
    return tp * (plan + hidden)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_two_nodes_answer_and_drain(nodes: Nodes, tp: int, pp: int) -> None:
    model = GPT2LMHeadModel.from_pretrained(STORIES, dtype=torch.float32)
    prompt, num_tokens = "Once upon a time", 100
    prompt_ids = AutoTokenizer.from_pretrained(STORIES).encode(prompt)
    with serving_on(nodes, tp, pp) as server:
        ask = ["--prompts", prompt, "--json", "--output-len"]
        assert server.client(*ask, "2").returncode == 0, server.text
        before = nodes.cable_bytes()
        done = server.client(*ask, str(num_tokens))
        crossed = (nodes.cable_bytes() - before) / num_tokens
        assert json.loads(done.stdout)["output_ids"] == [prompt_ids + hf_greedy(model, prompt_ids, num_tokens)]
        payload = payload_of_a_token(model.config, tp, pp)
        print(
            f"tp {tp} × pp {pp}: {crossed:.0f} bytes cross the cable for each token, {payload} of them without headers"
        )
        assert payload < crossed < 1.3 * payload
        assert server.stop(signal.SIGUSR1) == 0, server.text
    assert not nodes.remaining()


STEP_TIMEOUT_S = 5


def _name(process: psutil.Process) -> str:
    """Empty where it is gone by now."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def seconds_until_gone(nodes: Nodes, *names: str) -> float:
    """Cut the cable and wait until all processes of the job are gone, on both nodes, but for those of these names."""
    nodes.cut()
    started = time.monotonic()
    while left := [name for name in map(_name, nodes.processes()) if name and name not in names]:
        assert time.monotonic() - started < 30, left
        time.sleep(0.1)
    return time.monotonic() - started


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_a_cut_cable_ends_the_job_on_both_nodes(nodes: Nodes, state: str) -> None:
    """MPI notices once the kernel has given up the connection, or the watchdog ends rank 0: the first of the two.

    mpirun's code says little: Open MPI 5 ends with 0 where it loses its daemon on n1 first.
    """
    with serving_on(nodes, 2, 1, "--step-timeout-s", str(STEP_TIMEOUT_S)) as server:
        if state == "busy":
            ask = ["--prompts", *["Once upon a time"] * 16, "--output-len", "500", "--ignore-eos", "--retries", "0"]
            threading.Thread(target=server.client, args=ask).start()
            time.sleep(2)
        seconds = seconds_until_gone(nodes)
        print(f"{state}: all gone after {seconds:.1f} s, mpirun's code is {server.process.wait(1)}")
        assert seconds < STEP_TIMEOUT_S + 5
        assert re.search("peer: n1 .* failed: |a rank hangs|a rank does not answer", server.text), server.text


def test_a_cut_cable_ends_the_ranks_whatever_the_kernel_does(nodes: Nodes) -> None:
    """With Linux's defaults, nobody but the ranks' own limits ends them; mpirun waits for its daemon on n1."""
    with serving_on(nodes, 2, 1, "--step-timeout-s", str(STEP_TIMEOUT_S)) as server:
        nodes.set_tcp_retries(15)
        seconds = seconds_until_gone(nodes, "prterun", "mpirun", "prted", "orted", "sh")
        print(f"ranks and Triton are gone after {seconds:.1f} s")
        assert seconds < STEP_TIMEOUT_S + 5
        assert "a rank does not answer; ending the job" in server.text
