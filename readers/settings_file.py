"""YAML of files that nobody vouches for → plain values, within limits of size and of aliases.

PyYAML reads some 200 KB a second, an alias may stand for any number of others, and its messages quote what they
refuse. It knows no setting.
"""

from __future__ import annotations

from typing import Any

import yaml

from readers.archive import Place

MAX_BYTES = 256 << 10  # NeMo's own have less than 20 KB
_MAX_VALUES = 100_000  # an alias counts as what it stands for
_MAX_REASON = 200  # characters


def read_yaml(place: Place) -> Any:
    """The content. Raises ValueError, in one sentence, for what is no YAML or beyond the limits."""
    if place.size > MAX_BYTES:
        raise ValueError(f"{place.name}: {place.size:,} bytes; a file of settings has {MAX_BYTES:,} at most")
    try:
        loader = yaml.SafeLoader(place.read())
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, place.name)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        if str(error).startswith(f"{place.name}: "):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{place.name}: not a YAML file ({_shortened(reason)})") from None


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON // 2]} … {text[-_MAX_REASON // 2 :]}"


def _count(node: yaml.Node, counts: dict[int, int], name: str) -> int:
    """The number of values below a node. Raises ValueError for too many, and for a node that holds itself."""
    found = counts.get(id(node))
    if found is not None:
        if not found:
            raise ValueError(f"{name}: a setting holds itself")
        return found
    counts[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, counts, name) for child in children)
    if total > _MAX_VALUES:
        raise ValueError(f"{name}: the settings have more than {_MAX_VALUES:,} values")
    counts[id(node)] = total
    return total
