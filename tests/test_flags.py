"""Flags: each is declared once in the source, and scripts that share one share its field."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import convert
import server
from engine.flags import add_flags, flag, from_flags
from readers import SourceOptions

ROOT = Path(__file__).resolve().parent.parent


def declarations(path: Path) -> Iterator[tuple[str, int]]:
    """Each option string of a file, with its line: add_argument, `flag` fields and cli/parameters.py's table."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and argument.value.startswith("--"):
                    yield argument.value, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_parameter":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield "--" + node.args[0].value.replace("_", "-"), node.lineno
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and isinstance(node.target, ast.Name):
            if isinstance(node.value.func, ast.Name) and node.value.func.id == "flag":
                yield "--" + node.target.id.replace("_", "-"), node.lineno
                aliases = next((k.value for k in node.value.keywords if k.arg == "aliases"), ast.Tuple([]))
                for alias in ast.literal_eval(aliases):
                    yield alias, node.lineno


def is_client(path: Path) -> bool:
    """client.py imports nothing of the server's side (tests/test_imports.py), so the two share no fields."""
    return path.relative_to(ROOT).parts[0] in ("client.py", "cli")


FOLDERS = [
    path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in ("tests", "build")
]
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in folder.rglob("*.py"))])
SIDES = {
    "client": [path for path in FILES if is_client(path)],
    "server": [path for path in FILES if not is_client(path)],
}


def declared(side: str) -> dict[str, list[str]]:
    places = defaultdict(list)
    for path in SIDES[side]:
        for option, line in declarations(path):
            places[option].append(f"{path.relative_to(ROOT)}:{line}")
    return places


@pytest.mark.parametrize("side", SIDES)
def test_every_flag_is_declared_once(side: str) -> None:
    assert {option: places for option, places in declared(side).items() if len(places) > 1} == {}


def test_the_rule_sees_every_way_to_declare_a_flag() -> None:
    assert {"--url", "--bench-vocab", "--top-k", "--stop-words"} <= declared("client").keys()
    seen = {
        "--tp",
        "--pp",
        "--tokenizer",
        "--model-repo-id",
        "--max-batch-size",
        "--http-port",
        "--verify",
        "--repeats",
    }
    assert seen <= declared("server").keys()


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}


def parser_of(parse: object, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script makes."""
    made: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, *args: object) -> None:
        made.append(self)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(InterruptedError):
        parse()
    return made[0]


def test_server_and_convert_share_their_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    of_server = options(parser_of(server.parse_flags, monkeypatch))
    of_convert = options(parser_of(convert.parse, monkeypatch))
    shared = {"--tp", "--weight-data-type", "--tokenizer", "--num-heads", "--model-name", "--verbose"}
    assert of_server & of_convert == shared
    assert of_convert - shared == {"--verify"}
    fields = {
        cls: {spec.name: spec for spec in dataclasses.fields(cls)}
        for cls in (server.ModelFlags, convert.ConversionFlags)
    }
    for option in shared:
        name = option.removeprefix("--").replace("-", "_")
        assert fields[server.ModelFlags][name] is fields[convert.ConversionFlags][name]


def test_source_options_of_both_scripts() -> None:
    arguments = ["--tokenizer", "~/words", "--num-heads", "4"]
    expected = SourceOptions(Path.home() / "words", 4)
    assert server.parse_flags(arguments)[0].source_options == expected
    assert from_flags(convert.ConversionFlags, convert.parse(["a", "b", *arguments])).source_options == expected
    assert server.parse_flags([])[0].source_options == SourceOptions()
    assert server.parse_flags(["--num-heads", "0"])[0].source_options == SourceOptions()


def test_heads_below_0_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        server.parse_flags(["--num-heads", "-1"])
    assert "error: num_heads is -1; it must be 0 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.parse(["a", "b", "--num-heads", "0"])
    assert "error: argument --num-heads: 0 is below 1" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Parent:
    rate: float = flag(0.5, "share, 50 % of it")
    name: str = flag("", "a name")
    plain: int = 3


@dataclasses.dataclass(frozen=True)
class Child(Parent):
    sizes: tuple[int, ...] = flag((1, 2), "sizes", nargs="+", type=int)
    is_quiet: bool = flag(False, "say nothing", aliases=("-q",))


def make_parser(**chosen: object) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="x", formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 60, 200))
    add_flags(parser, Child, "all", **chosen)
    return parser


def test_own_flags_come_first_and_help_has_the_defaults() -> None:
    lines = [" ".join(line.split()) for line in make_parser(rate=0.25).format_help().splitlines()]
    assert lines[lines.index("all:") + 1 :] == [
        "--sizes SIZES [SIZES ...] sizes (default: (1, 2))",
        "--is-quiet, -q say nothing",
        "--rate RATE share, 50 % of it (default: 0.25)",
        "--name NAME a name",
    ]


def test_parsed_flags_become_the_dataclass() -> None:
    parser = make_parser(rate=0.25)
    assert from_flags(Child, parser.parse_args([])) == Child(rate=0.25)
    parsed = parser.parse_args(["--sizes", "5", "6", "-q", "--name", "n"])
    assert from_flags(Child, parsed) == Child(0.25, "n", sizes=[5, 6], is_quiet=True)  # type: ignore[arg-type]


def test_a_script_may_take_some_fields_only() -> None:
    assert options(make_parser(only=("rate", "name"))) == {"--rate", "--name"}
    with pytest.raises(AssertionError):
        make_parser(only=("rate", "nothing"))
