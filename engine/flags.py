"""Command-line flags from dataclass fields: `flag` declares one, `add_flags` adds them, `from_flags` reads them.

Each flag is declared once. Scripts that share a flag share its field: they inherit the dataclass, or name the fields
that they take. No torch here.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from collections.abc import Collection
from dataclasses import field

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Config = typing.TypeVar("_Config", bound="DataclassInstance")


def flag(default: typing.Any, help: str, **metadata: typing.Any) -> typing.Any:
    """A dataclass field that `add_flags` turns into a command-line flag; `help` gives the unit.

    metadata: further arguments of `add_argument` (choices, nargs, type), and aliases: other names of the flag.
    """
    return field(default=default, metadata={"help": help, **metadata})


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type[DataclassInstance],
    title: str,
    only: Collection[str] | None = None,
    **defaults: typing.Any,
) -> None:
    """Add one flag per `flag` field of a dataclass: --field-name with the field's type, default and help.

    only: names of the fields to take; None: all. A class's own fields come before those that it inherits.
    defaults: the script's own default of a field.
    """
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(cls)
    own = inspect.get_annotations(cls)
    specs = sorted(dataclasses.fields(cls), key=lambda spec: spec.name not in own)
    taken = [spec for spec in specs if spec.metadata and (only is None or spec.name in only)]
    assert only is None or len(taken) == len(only), (only, cls)
    for spec in taken:
        options = {"type": types[spec.name], "default": defaults.get(spec.name, spec.default), **spec.metadata}
        names = [f"--{spec.name.replace('_', '-')}", *options.pop("aliases", ())]
        options["help"] = options["help"].replace("%", "%%")
        if types[spec.name] is bool:
            del options["type"]
            options["action"] = "store_true"
        elif options["default"] not in ("", None):  # argparse fills in the default, so that `set_defaults` is seen
            options["help"] += " (default: %(default)s)"
        group.add_argument(*names, **options)


def from_flags(cls: type[_Config], flags: argparse.Namespace) -> _Config:
    """Make a dataclass from parsed flags. Raises ValueError if the dataclass refuses a value."""
    names = [spec.name for spec in dataclasses.fields(cls) if spec.metadata]
    return cls(**{name: getattr(flags, name) for name in names})
