"""Tables for other programs: CSV with every digit, LaTeX as a paper prints them."""

from __future__ import annotations

import csv
import io
import math
import re
from typing import Any

from emolab.reports.page import Measured, Styled, TableData, shown


def to_csv(table: TableData) -> bytes:
    """The table as UTF-8 CSV. A column of means becomes two, the second named `... std`; what is unknown is empty."""
    measured = [any(isinstance(row[i], Measured) for row in table.rows) for i in range(len(table.columns))]
    columns = zip(table.columns, measured, strict=True)
    heads = [name for column, double in columns for name in ((column, f"{column} std") if double else (column,))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    for row in table.rows:
        writer.writerow([part for value, double in zip(row, measured, strict=True) for part in _parts(value, double)])
    return buffer.getvalue().encode()


def _parts(value: Any, double: bool) -> tuple[str, ...]:
    if isinstance(value, Measured):
        return _field(value.mean), _field(value.deviation)
    return (_field(value), "") if double else (_field(value),)


def _field(value: Any) -> str:
    if isinstance(value, Styled) and value.value is not None:
        value = value.value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def to_latex(table: TableData) -> bytes:
    """The table as a `tabular` that needs no package; means to four decimals, other numbers to four digits."""
    alignment = "l" + "r" * (len(table.columns) - 1)
    lines = [
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\hline",
        " & ".join(_escaped(column) for column in table.columns) + r" \\",
        r"\hline",
        *(" & ".join(_latex(value) for value in row) + r" \\" for row in table.rows),
        r"\hline",
        r"\end{tabular}",
    ]
    return ("\n".join(lines) + "\n").encode()


def _latex(value: Any) -> str:
    if value is None:
        return "--"
    if isinstance(value, Measured):
        return "--" if math.isnan(value.mean) else "$" + str(value).replace("±", r"\pm") + "$"
    if isinstance(value, float):
        return "--" if math.isnan(value) else f"${_number(value)}$"
    return _escaped(str(value))


def _number(value: float) -> str:
    if math.isinf(value):
        return r"\infty" if value > 0 else r"-\infty"
    if 1e-4 <= abs(value) < 1e4:
        return f"{value:#.4g}".removesuffix(".")  # with its last zeros, so that a column reads as one precision
    digits, _, exponent = shown(value).partition("e")
    return rf"{digits} \times 10^{{{int(exponent)}}}" if exponent else digits


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: "\\" + character for character in "&%$#_{}"
}


def _escaped(text: str) -> str:
    return re.sub(r"[\\~^&%$#_{}]", lambda match: _SPECIAL[match[0]], text).replace("−", "$-$")
