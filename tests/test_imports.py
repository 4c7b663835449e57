"""The direction of imports (docs/design.md). The rules come from the folders: a new file is under them at once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What the files of each folder, or each file at the top, may import of the project's own.
ALLOWED = {
    "helpers": set(),
    "kernels": {"kernels"},
    "weights": {"weights"},
    "engine": {"engine", "weights"},
    "readers": {"readers", "weights", "engine.flags"},
    "executor": {"executor", "engine", "weights", "kernels"},
    "serving": {"serving", "engine", "helpers"},
    "cli": {"cli", "helpers"},
    "convert": {"readers", "weights", "engine.flags", "helpers"},
    "gpt": {"serving", "engine", "helpers"},
    "client": {"cli", "helpers"},
    "server": {"convert", "gpt", "engine", "executor", "serving", "weights", "readers", "helpers"},
}
FRONT_ENDS = sorted(path.name for path in (ROOT / "serving").iterdir() if (path / "__init__.py").is_file())


def files(name: str) -> list[Path]:
    """A folder's files, at any depth, or the one file at the top."""
    top = ROOT / f"{name}.py"
    return [top] if top.is_file() else sorted((ROOT / name).rglob("*.py"))


ALL_FILES = [path for name in ALLOWED for path in files(name)]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports when it runs; imports under `if TYPE_CHECKING` do not count."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if is_package)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return frozenset(found)


@cache
def reached(path: Path) -> frozenset[str]:
    """Modules that a file imports itself or through the project's own files, and their packages."""
    found, todo = set(), [path]
    seen = {path}
    while todo:
        for module in imports(todo.pop()):
            parts = module.split(".")
            found.update(".".join(parts[: n + 1]) for n in range(len(parts)))
            for n in range(len(parts)):
                stem = ROOT.joinpath(*parts[: n + 1])
                for own in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if own.is_file() and own not in seen:
                        seen.add(own)
                        todo.append(own)
    return frozenset(found)


def parametrize(name: str, paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, paths, ids=name_of)


@parametrize("path", ALL_FILES)
def test_imports_point_downwards(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        if module.split(".")[0] in ALLOWED:
            prefixes = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)}
            assert prefixes & ALLOWED[folder], f"{name_of(path)} imports {module}"


@parametrize("path", [*files("engine"), *files("cli"), *files("client")])
def test_the_host_side_and_the_client_have_no_torch(path: Path) -> None:
    assert not reached(path) & {"torch", "transformers"}


@parametrize("path", ALL_FILES)
def test_one_module_imports_mpi_and_one_torch_distributed(path: Path) -> None:
    found = imports(path)
    assert ("mpi4py" in found) == (name_of(path) == "engine.world")
    assert any(module.startswith("torch.distributed") for module in found) == (name_of(path) == "executor.collectives")


@parametrize("path", files("executor"))
def test_the_device_side_does_not_know_the_scheduler(path: Path) -> None:
    assert not imports(path) & {f"engine.{name}" for name in ("engine", "scheduler", "sequence", "static", "blocks")}


@parametrize("path", [path for path in files("serving") if path.name != "startup.py"])  # which makes all of them
def test_front_ends_do_not_know_each_other(path: Path) -> None:
    own = path.relative_to(ROOT / "serving").parts[0]
    others = {f"serving.{name}" for name in FRONT_ENDS if name != own}
    assert not reached(path) & others


@parametrize("path", sorted((ROOT / "tests").rglob("*.py")))
def test_tests_share_helpers_through_support_alone(path: Path) -> None:
    """A test module's imports would bring its fixtures and its cost along."""
    modules = {module for module in imports(path) if module.split(".")[0] == "tests"}
    assert not {module for module in modules if any(part.startswith("test_") for part in module.split("."))}


def test_the_rules_see_the_code() -> None:
    """Every folder with Python files at the top is under a rule, or is no part of the server."""
    found = {path.parent.name for path in ROOT.glob("*/*.py")} | {path.stem for path in ROOT.glob("*.py")}
    assert found - {"tests", "benchmarks", "models"} == set(ALLOWED)
    assert FRONT_ENDS
    assert "torch" in reached(ROOT / "server.py")
