"""Command-line flags from dataclass fields: `flag` declares one, `add_flags` adds them, `from_flags` reads them."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from dataclasses import field


def flag(default: typing.Any, help: str, **metadata: typing.Any) -> typing.Any:
    """A dataclass field that `add_flags` turns into a command-line flag; `help` gives the unit."""
    return field(default=default, metadata={"help": help, **metadata})


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """Add one flag per `flag` field of a dataclass: --field-name with the field's type, default and help."""
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        metadata = dict(spec.metadata)
        if not metadata:
            continue
        names = [f"--{spec.name.replace('_', '-')}", *metadata.pop("aliases", ())]
        text = metadata.pop("help")
        if types[spec.name] is bool:
            group.add_argument(*names, action="store_true", default=spec.default, help=text)
        else:
            text = f"{text} (default: {spec.default if spec.default != '' else 'none'})".replace("%", "%%")
            group.add_argument(*names, type=types[spec.name], default=spec.default, help=text, **metadata)


def from_flags(cls: type, flags: argparse.Namespace) -> typing.Any:
    """Make a dataclass from parsed flags."""
    names = [spec.name for spec in dataclasses.fields(cls) if spec.metadata]
    return cls(**{name: getattr(flags, name) for name in names})
