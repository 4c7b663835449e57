"""deploy/docker: the image is built, serves, is asked from another container, and drains; and the way by hand."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.support.containers import BASE, Containers, containers, why_not
from tests.support.engines import demo_greedy
from tests.support.launch import Ports
from tests.support.ranks import ROOT
from tests.support.scrape import scrape

pytestmark = [
    pytest.mark.slow("builds an image"),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

IMAGE = "localhost/gpt-server:cpu"
MODEL_FLAGS = ("--hf-model-name", "models/stories")
OPTIONS = ("--env", "NP=2", "--env", "OMP_NUM_THREADS=1", "--shm-size", "256m")
PROMPT = "Once upon a time"
NEW_TOKENS = 12
# What a client needs that has only pip.
ASK = """
import sys, numpy as np
from pytriton.client import ModelClient
with ModelClient(sys.argv[1], "stories") as client:
    prompt, length = np.array([sys.argv[2].encode()]), np.array([int(sys.argv[3])], np.uint32)
    answer = client.infer_sample(prompts=prompt, request_output_len=length)
    print(answer["sentences"].ravel()[0].decode())
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Containers]:
    with containers() as made:
        if (obstacle := made.make_base()) is not None:
            pytest.skip(obstacle)
        began = time.monotonic()
        made.build(IMAGE, BASE=BASE, BUILD="cpu")
        print(f"built in {time.monotonic() - began:.0f} s, {made.size_mb(IMAGE):.0f} MB")
        yield made


@pytest.fixture(scope="module")
def right_text() -> str:
    """PROMPT with Hugging Face's greedy continuation."""
    return PROMPT + demo_greedy(PROMPT, NEW_TOKENS)


def client_command(ports: Ports) -> list[str]:
    url = f"http://127.0.0.1:{ports.http}"
    request = ["--prompts", PROMPT, "--output-len", str(NEW_TOKENS), "--json"]
    return ["./client.py", "--url", url, "--model-name", "stories", *request]


def text_of(output: str) -> str:
    """The text that client.py printed as JSON."""
    return json.loads(output)["sentences"][0]


def complete(ports: Ports, num_tokens: int) -> int:
    """Tokens of a completion over the OpenAI port."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True}).encode()
    url = f"http://127.0.0.1:{ports.openai}/v1/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=120) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def test_the_image_serves_and_stop_drains(engine: Containers, right_text: str) -> None:
    ports = Ports()
    options = (*OPTIONS, "--env", f"HEALTH_URL=http://127.0.0.1:{ports.openai}/health")
    engine.run("serving", IMAGE, *MODEL_FLAGS, *ports.port_flags, options=options)
    assert not engine.is_healthy("serving")
    engine.wait_for("serving", "ready: model")
    assert engine.is_healthy("serving")
    assert engine.execute("serving", "id", "-un") == "server\n"
    assert text_of(engine.run_once(IMAGE, *client_command(ports))) == right_text
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(complete, ports, 100) for _ in range(8)]
        while scrape(ports.openai)["num_requests_running"] < 8:
            time.sleep(0.05)
        code = engine.stop("serving")
        assert [answer.result() for answer in answers] == [100] * 8
    assert code == 0
    assert "8 requests in flight were finished, 0 were cut off" in engine.logs("serving")


def test_by_hand_in_a_container_that_sleeps(engine: Containers, right_text: str) -> None:
    """install.sh, server.py and client.py by exec, as root; then a client that has nothing but Python and pip."""
    ports = Ports()
    engine.run("sleeping", IMAGE, "sleep", "infinity", options=("--user", "0", "--shm-size", "256m"))
    assert "ready: Python" in engine.execute("sleeping", "./install.sh")
    mpirun = "OMP_NUM_THREADS=1 exec mpirun -n 2 --oversubscribe --allow-run-as-root"
    flags = " ".join((*MODEL_FLAGS, "--tp", "2", *ports.port_flags, "--output-dir", "/tmp/models"))
    server = f"{mpirun} ./server.py {flags} >/proc/1/fd/1 2>&1"
    engine.execute("sleeping", "bash", "-c", server, options=["--detach"])
    engine.wait_for("sleeping", "ready: model")
    assert text_of(engine.execute("sleeping", *client_command(ports))) == right_text
    config, mounts = engine.pip_config()
    script = (
        "apt-get update && apt-get install -y --no-install-recommends python3 python3-pip libpython3.11 && "
        'pip install --break-system-packages nvidia-pytriton==0.7.0 "numpy<2" && exec python3 -c "$@"'
    )
    asked = engine.run_once(
        BASE,
        *("bash", "-c", script, "ask", ASK, f"http://127.0.0.1:{ports.http}", PROMPT, str(NEW_TOKENS)),
        options=["--volume", f"{config}:/etc/pip.conf:ro", *mounts],
    )
    assert asked.splitlines()[-1] == right_text


# What this machine cannot do: it has neither a bridge of networks nor a build with Docker's secrets.
COMPOSED = {
    "services": {
        "server": {
            "image": IMAGE,
            "network_mode": "none",
            "ports": [],
            "ulimits": {"nofile": 1024, "nproc": 4096},
            "environment": {"OMP_NUM_THREADS": "1"},
        }
    }
}


@pytest.mark.skipif(shutil.which("podman-compose") is None, reason="no podman-compose here: ./install.sh --dev")
def test_the_compose_file_serves_without_a_gpu(engine: Containers, right_text: str) -> None:
    """Prometheus and Grafana beside it come from a registry, and are left out."""
    override = engine.folder / "override.yaml"
    override.write_text(yaml.safe_dump(COMPOSED).replace("ports: []", "ports: !reset []"))
    files = [ROOT / "deploy/docker/compose.yaml", ROOT / "deploy/docker/compose.cpu.yaml", override]
    name = engine.compose_up(files, "server", {"TP": "2", "MODEL": "models/stories"})
    engine.wait_for(name, "ready: model")
    assert "tp 2 × pp 1, float32 on cpu" in engine.logs(name)
    assert engine.is_healthy(name)
    command = ["./client.py", "--model-name", "stories", "--prompts", PROMPT, "--output-len", str(NEW_TOKENS), "--json"]
    assert text_of(engine.execute(name, *command)) == right_text
    assert engine.execute(name, "ls", "/data/ft_models/stories") == "2-gpu\n"
    assert engine.stop(name) == 0


def test_what_is_run_in_the_servers_place(engine: Containers) -> None:
    assert engine.run_once(IMAGE, "python", "-c", "import sys; print(sys.prefix)") == "/app/.venv\n"
