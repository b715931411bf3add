"""How much is read of what others may have written: files are cut off before they fill the memory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from emolab.names import UserError

YAML_BYTES = 2**20
"""Of a configuration, a search space, a suite or a table of labels."""
TABLE_BYTES = 256 * 2**20
"""Of a CSV file or a data set's manifest; a million sessions take about a hundred megabytes."""
_YAML_VALUES = 100_000
"""Values of a YAML document after its aliases are written out. Few bytes of aliases of aliases make billions."""


def read_bytes(path: Path, *, most: int, what: str) -> bytes:
    """The content of a file.

    Args:
        most: bytes.
        what: what such a file is, for the error.

    Raises:
        OSError: as the system says it.
        UserError: the file is larger.
    """
    with path.open("rb") as file:
        too_large = os.fstat(file.fileno()).st_size > most
        content = b"" if too_large else file.read(most + 1)  # a pipe does not say how much is to come
    if too_large or len(content) > most:
        raise UserError(f"{path} is larger than {most >> 20} MB: not {what}")
    return content


class RepeatedKeyError(yaml.YAMLError):
    """A mapping has a key more than once. YAML forbids it, its reader lets the last one win."""


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of version 1.2: in older ones 010 is 8, and 1:30 is 90. Nor does it know dates: what
    looks like one is text."""


_NUMBERS = {
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[0-1_]+|0x[0-9a-fA-F_]+)"),
    "float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in {*_NUMBERS, "timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def load_yaml(text: str) -> Any:
    """A YAML document as plain values.

    Raises:
        RepeatedKeyError: a key is there twice, and in which lines.
        yaml.YAMLError: not YAML, or one whose values are nested or repeated beyond reason.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _values(root, {}) > _YAML_VALUES:
            raise yaml.YAMLError(f"more than {_YAML_VALUES} values")
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, those of an alias as often as it stands there."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError("an alias of what it is part of")
        return known[id(node)]
    known[id(node)] = 0
    below = []
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    known[id(node)] = 1 + sum(_values(part, known) for part in below)
    return known[id(node)]


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], list[int]] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            lines.setdefault((key.tag, key.value), []).append(key.start_mark.line + 1)
    for (_, name), found in lines.items():
        if len(found) > 1:
            *first, last = dict.fromkeys(found)
            where = f"lines {', '.join(map(str, first))} and {last}" if first else f"line {last}"
            raise RepeatedKeyError(f"{name[:60]!r} is there {len(found)} times, in {where}: keep one")
