"""One self-contained HTML page: figures inside, tables sortable, light and dark, nothing loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f3f4f6; --line: #d9dce1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c; --soft: #1f2328; --line: #363b42; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 0 0 .8rem; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; overflow-x: auto; }
figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; background: var(--soft); position: sticky; top: 0; white-space: normal; vertical-align: bottom; }
th.words { text-align: left; }
td.prose, td.ids { text-align: left; white-space: normal; min-width: 18rem; }
td.ids { min-width: 5rem; overflow-wrap: anywhere; }
td.good, td.bad, td.open, td.idle { text-align: left; font-weight: 600; }
td.good { color: #1a7f4b; } td.bad { color: #c62f3b; } td.open { color: #a86400; } td.idle { color: #7a828c; }
@media (prefers-color-scheme: dark) {
  td.good { color: #4cc38a; } td.bad { color: #ff7b84; } td.open { color: #f0b04a; } td.idle { color: #98a1ab; } }
td.long { text-align: left; white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
tr:hover td { background: var(--soft); } code { font-size: .9em; }
"""

_SORT = """
for (const table of document.querySelectorAll('table')) {
  table.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
    const body = table.tBodies[0], up = head.dataset.up !== 'true';
    head.dataset.up = up;
    const key = row => row.cells[column].dataset.value;
    const order = (a, b) => { const x = key(a), y = key(b), n = x - y;
      return (isNaN(n) ? x.localeCompare(y, undefined, {numeric: true}) : n) * (up ? 1 : -1); };
    [...body.rows].sort(order).forEach(row => body.append(row));
  }));
}
"""


@dataclass(frozen=True)
class Measured:
    """A mean with its standard deviation, one cell of a table."""

    mean: float
    deviation: float = math.nan
    """NaN where there is none."""

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.deviation) else f" ± {self.deviation:.4f}")


@dataclass(frozen=True)
class Styled:
    """A cell of words: a sentence or a few ids that wrap, or an outcome in its colour."""

    text: str
    style: Literal["prose", "ids", "good", "bad", "open", "idle"] = "prose"
    value: float | None = None
    """The number that the words are about, for other programs."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class TableData:
    """Columns and rows of plain values, ``Measured`` and ``Styled``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of a page: text, a table, SVG figures, or several of them."""

    title: str
    text: str = ""
    table: TableData | None = None
    figure: bytes | None = None
    figures: Sequence[bytes] = ()
    """Shown one below the other, after ``figure``."""
    name: str = ""
    """Of its table among those of the page; empty: the title."""


def page(title: str, lines: Sequence[str], sections: Sequence[Section]) -> bytes:
    """The page as UTF-8 HTML. Text is escaped; figures are our own SVG and are inlined as they are."""
    head = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    body = "".join(_section(section) for section in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_CSS}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{head}{body}<script>{_SORT}</script></body></html>\n"
    ).encode()


def _section(section: Section) -> str:
    text = "".join(f"<p>{html.escape(part)}</p>" for part in section.text.split("\n\n") if part)
    figures = [*([section.figure] if section.figure else []), *section.figures]
    pictures = "".join(_figure(figure.decode()) for figure in figures)
    return f"<section><h2>{html.escape(section.title)}</h2>{text}{_table(section.table)}{pictures}</section>"


def _figure(svg: str) -> str:
    return f"<figure>{svg[svg.find('<svg') :]}</figure>"


def _table(table: TableData | None) -> str:
    if table is None:
        return ""
    # A column without anything in it only pushes the others out of sight; files for other programs keep it.
    told = [i for i in range(len(table.columns)) if not table.rows or any(shown(row[i]) for row in table.rows)]
    heads = "".join(_head(table.columns[i], [row[i] for row in table.rows]) for i in told)
    rows = "".join("<tr>" + "".join(_cell(row[i]) for i in told) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _head(column: str, values: Sequence[Any]) -> str:
    words = ' class="words"' if any(isinstance(value, Styled) for value in values) else ""
    return f"<th{words}>{html.escape(column)}</th>"


def shown(value: Any) -> str:
    """A value of a table as people read it: four digits, and no exponent where all digits before the point fit; a
    dash for what is not defined."""
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return "" if value is None else str(value)


def _cell(value: Any) -> str:
    key = value.mean if isinstance(value, Measured) else value
    style = f' class="{value.style}"' if isinstance(value, Styled) else ""
    return f'<td{style} data-value="{html.escape(str(key))}">{html.escape(shown(value))}</td>'
