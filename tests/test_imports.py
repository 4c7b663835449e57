"""The direction of imports (docs/design.md): lower rooms know nothing of higher ones; host code has no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What each room may import of the project's own.
ALLOWED = {
    "helpers": set(),
    "engine": {"engine", "kernels"},
    "readers": {"readers", "engine.config", "engine.weights"},
    "convert": {"readers", "engine.config", "engine.weights", "helpers"},
    "gpt": {"engine.request", "helpers", "serving"},
    "serving": {"serving", "engine.config", "engine.request", "engine.words"},
    "asking": {"asking", "helpers"},
    "client": {"asking", "helpers"},
    "server": {"convert", "engine", "gpt", "helpers", "serving"},
}
OWN = {*ALLOWED, "kernels"}
HOST_SIDE = ("config", "request", "words", "beam", "blocks", "plan", "scheduler", "static", "statistics")
DEVICE_SIDE = ("comm", "layers", "attention", "cache", "logits", "sampling", "results", "model", "weights")


def imports(path: Path) -> set[str]:
    """Every module that a file imports when it runs; what stands under `if TYPE_CHECKING` does not count."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def room_files() -> list[tuple[str, Path]]:
    files = [(room, ROOT / f"{room}.py") for room in ALLOWED if (ROOT / f"{room}.py").exists()]
    return files + [(room, path) for room in ALLOWED for path in sorted((ROOT / room).glob("*.py"))]


@pytest.mark.parametrize(("room", "path"), room_files(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_no_upward_import(room: str, path: Path) -> None:
    for module in imports(path):
        if module.split(".")[0] not in OWN:
            continue
        prefixes = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)}
        assert prefixes & ALLOWED[room], f"{path.name} imports {module}"


@pytest.mark.parametrize("name", HOST_SIDE)
def test_host_side_has_no_torch(name: str) -> None:
    assert not {m for m in imports(ROOT / "engine" / f"{name}.py") if m.split(".")[0] in ("torch", "mpi4py")}


def test_the_client_has_no_torch() -> None:
    for path in (ROOT / "client.py", *(ROOT / "asking").glob("*.py")):
        assert not {m for m in imports(path) if m.split(".")[0] in ("torch", "mpi4py", "transformers")}, path.name


@pytest.mark.parametrize("name", [*DEVICE_SIDE, "runner", "fastertransformer"])
def test_device_side_does_not_know_the_scheduler(name: str) -> None:
    found = imports(ROOT / "engine" / f"{name}.py")
    assert not found & {"engine.scheduler", "engine.static", "engine.engine", "engine.blocks"}


def test_only_comm_imports_mpi_and_torch_distributed() -> None:
    for path in (ROOT / "engine").glob("*.py"):
        if path.name != "comm.py":
            found = imports(path)
            assert not {m for m in found if m.startswith(("mpi4py", "torch.distributed"))}, path.name
