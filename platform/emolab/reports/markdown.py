"""A page's content as Markdown, for places that show no HTML: the same words and tables, without the figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from emolab.reports.page import Section, TableData, shown


def to_markdown(title: str, lines: Sequence[str], sections: Sequence[Section]) -> bytes:
    """UTF-8 Markdown; text is escaped, so that no value of a data set becomes a link or a heading."""
    parts = [f"# {_escaped(title)}", *(_escaped(line) for line in lines)]
    for section in sections:
        parts.append(f"## {_escaped(section.title)}")
        parts += [_escaped(text) for text in section.text.split("\n\n") if text]
        if section.table is not None:
            parts.append(_table(section.table))
    return ("\n\n".join(parts) + "\n").encode()


def _table(table: TableData) -> str:
    rows = [table.columns, ["---"] * len(table.columns)]
    cells = [[column if index == 1 else _cell(column) for column in row] for index, row in enumerate(rows)]
    cells += [[_cell(value) for value in row] for row in table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _cell(value: Any) -> str:
    return _escaped(shown(value).replace("\n", " "))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
