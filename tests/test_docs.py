"""README.md and docs/design.md: each path that they name exists, and the design names every folder of code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ("README.md", "docs/design.md")
FOLDERS = sorted({path.parent.name for path in ROOT.glob("*/*.py")} | {"deploy", "docs"})
# Code in backticks, lines of indented blocks, targets of links.
CODE = re.compile(r"`([^`]+)`|^ {4}(.+)$|\]\(([^)#:]+)\)", re.MULTILINE)
DRAWING = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:[\w-]+/)*[\w-]+\.(?:py|sh|sbatch|md)")


def named_paths(text: str) -> list[str]:
    """The paths of this project that a document names: scripts, documents, and all that is below a folder of it."""
    found = []
    for match in CODE.finditer(DRAWING.sub("", text)):
        for word in (match[1] or match[2] or match[3]).split():
            path = word.strip("'\"();,").removeprefix("./")
            is_below_folder = path.split("/")[0] in FOLDERS and "/" in path
            is_folder = re.fullmatch(r"[\w-]+/", path) is not None
            if FILE.fullmatch(path) or is_below_folder or is_folder:
                found.append(path)
    return found


@pytest.mark.parametrize("name", DOCS)
def test_paths_exist(name: str) -> None:
    paths = named_paths((ROOT / name).read_text())
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_design_names_every_folder() -> None:
    named = {path.split("/")[0] for path in named_paths((ROOT / "docs/design.md").read_text())}
    assert set(FOLDERS) - {"docs"} <= named


def test_named_paths_are_found() -> None:
    text = """Run `python
benchmarks/lost.py`. Read `engine/gone.py`, `asking/` and [more](docs/gone.md#part), not `path/to/model` or `/infer`.

    python benchmarks/gone.py --shape 8M
    sbatch deploy/gone.sbatch --tp 8
    bash -c './gone.sh && exec ./server.py'
"""
    assert named_paths(text) == [
        "benchmarks/lost.py",
        "engine/gone.py",
        "asking/",
        "benchmarks/gone.py",
        "deploy/gone.sbatch",
        "gone.sh",
        "server.py",
    ]
    assert named_paths("[the design](docs/gone.md)") == ["docs/gone.md"]
