"""Tables of labelled intervals: CSV with the columns start, end (seconds) and label."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

from emolab.features.decoding import UnusableMediaError
from emolab.features.grid import LabelledSpan
from emolab.limits import read_bytes
from emolab.names import UserError

_COLUMNS = ("start", "end", "label")
_LARGEST_FILE = 64 * 2**20
"""Bytes; a day of labels for every second is a few megabytes."""


def read_spans(path: Path) -> tuple[LabelledSpan, ...]:
    """The labelled intervals of one session, in the order of the table; further columns are left alone.

    Raises:
        UnusableMediaError: the table cannot be read, or a row is wrong; names the row.
    """
    try:
        text = read_bytes(path, most=_LARGEST_FILE, what="a table of labels").decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text, newline=""))
        missing = [name for name in _COLUMNS if name not in (table.fieldnames or ())]
        if missing:
            raise UnusableMediaError(f"{path.name}: column {missing[0]!r} is missing (needs {', '.join(_COLUMNS)})")
        return tuple(_span(row, f"{path.name}, row {number}") for number, row in enumerate(table, start=2))
    except UnusableMediaError:
        raise
    except UserError as error:
        raise UnusableMediaError(str(error)) from None
    except OSError as error:
        raise UnusableMediaError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnusableMediaError(f"{path.name} is not a CSV table of UTF-8 text: {error}") from None


def _span(row: Mapping[str, str | None], where: str) -> LabelledSpan:
    times = []
    for name in ("start", "end"):
        cell = (row[name] or "").strip()
        try:
            times.append(float(cell))
        except ValueError:
            raise UnusableMediaError(f"{where}, column {name}: expected seconds, got {cell[:20]!r}") from None
    start, end = times
    if not (math.isfinite(start) and math.isfinite(end)) or not 0 <= start < end:
        raise UnusableMediaError(f"{where}: a label from {start:g} to {end:g} s")
    label = (row["label"] or "").strip()
    if not label:
        raise UnusableMediaError(f"{where}, column label: is empty")
    return LabelledSpan(start, end, label)
