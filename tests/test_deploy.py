"""The files of deploy/ that no test here can run: what they name exists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.ranks import ROOT

DOCKER = ROOT / "deploy/docker"
SRUN = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([os.environ["VIRTUAL_ENV"], *sys.argv[1:]]))
"""


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / "deploy" / path).read_text())


def test_composes_files_exist() -> None:
    compose = read("docker/compose.yaml")
    build = compose["services"]["server"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).exists()
    sources = [volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]]
    assert [source for source in sources if source not in compose["volumes"] and not (DOCKER / source).exists()] == []


def test_prometheus_scrapes_composes_server() -> None:
    compose = read("docker/compose.yaml")
    (job,) = read("docker/prometheus.yml")["scrape_configs"]
    ((target,),) = (config["targets"] for config in job["static_configs"])
    name, port = target.split(":")
    assert f"{port}:{port}" in compose["services"][name]["ports"]
    (source,) = read("docker/grafana/datasources.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]


def test_grafana_finds_the_dashboard() -> None:
    (provider,) = read("docker/grafana/dashboards.yaml")["providers"]
    volumes = read("docker/compose.yaml")["services"]["grafana"]["volumes"]
    assert f"../grafana/gpt-server.json:{provider['options']['path']}/gpt-server.json:ro" in volumes


GROUP, SERVICE = yaml.safe_load_all((ROOT / "deploy/kubernetes/gpt-server.yaml").read_text())


def validate(kind: str, body: dict[str, Any]) -> None:
    """Check an object against the schema of Kubernetes; the schema of LeaderWorkerSet itself is not in it."""
    whole = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "name"}, **body}
    kubernetes_validate.validate(whole, "1.33", strict=True)


@pytest.mark.parametrize("template", ["leaderTemplate", "workerTemplate"])
def test_kubernetes_takes_the_pods(template: str) -> None:
    pod = GROUP["spec"]["leaderWorkerTemplate"][template]
    validate("Pod", {"spec": pod["spec"]})
    (container,) = pod["spec"]["containers"]
    (script,) = container["command"]
    assert os.access(ROOT / script, os.X_OK)
    named = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == named
    with pytest.raises(kubernetes_validate.ValidationError):
        validate("Pod", {"spec": {**pod["spec"], "container": []}})


def test_kubernetes_service_leads_to_the_leader() -> None:
    validate("Service", SERVICE)
    leader = GROUP["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    assert SERVICE["spec"]["selector"].items() <= leader["metadata"]["labels"].items()
    (container,) = leader["spec"]["containers"]
    names = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [names[port["targetPort"]] for port in SERVICE["spec"]["ports"]] == [8000, 8001, 9000]
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness")]
    assert [names[probe["httpGet"]["port"]] for probe in probes] == [9000, 9000]


def test_the_groups_ranks_are_tp_times_pp() -> None:
    group = GROUP["spec"]["leaderWorkerTemplate"]
    (container,) = group["leaderTemplate"]["spec"]["containers"]
    flags = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    (ranks,) = (variable["value"] for variable in container["env"] if variable["name"] == "RANKS_PER_POD")
    assert int(ranks) * group["size"] == int(flags["--tp"]) * int(flags["--pp"])
    for template in ("leaderTemplate", "workerTemplate"):
        (container,) = group[template]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks


def test_slurms_containers_are_made_once_and_served_from(tmp_path: Path) -> None:
    """A mock of srun prints its arguments: pyxis cannot run here."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "8",
        "IMAGE": "/shared/image.sqsh",
        "MOUNTS": "/models:/models",
    }
    command = ["bash", str(ROOT / "deploy/slurm/serve-container.sbatch"), "--hf-model-name", "a name", "--tp", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    install, serve = (json.loads(line) for line in done.stdout.splitlines())
    container = {
        "--container-name=serve-gpt-7",
        f"--container-mounts={ROOT}:/work,/models:/models",
        "--container-workdir=/work",
        "--container-remap-root",
        "--no-container-mount-home",
    }
    assert container < set(install) and container < set(serve)
    assert {"--ntasks-per-node=1", "--container-image=/shared/image.sqsh", "--container-writable"} < set(install)
    assert not any(word.startswith(("--container-image", "--ntasks")) for word in serve)
    assert {"--mpi=pmix", "--kill-on-bad-exit=1", "--cpus-per-task=8"} < set(serve)
    assert install[0] == serve[0] == "/opt/serve-gpt"
    assert serve[-5:] == ["server.py", "--hf-model-name", "a name", "--tp", "2"]
    shell = ["bash", "-c", serve[-6].replace("./server.py", "echo")]  # what each rank's bash does with them
    said = subprocess.run([*shell, *serve[-5:]], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "--hf-model-name a name --tp 2\n"
