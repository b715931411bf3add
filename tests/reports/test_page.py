"""The page in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.serving.browser import CHROMIUM, browse

from emolab.reports.page import Measured, Section, TableData, page

COLUMNS: dict[str, list[object]] = {
    "share": ["100%", "9%", "50%"],
    "seeds": ["10/10", "3/10", "9/10"],
    "score": [Measured(10.0), Measured(9.5, 0.1), Measured(-1.0)],
    "model": ["mult", "Edu", "misa"],
}
EXPECTED = {
    "share": ["9%", "50%", "100%"],
    "seeds": ["3/10", "9/10", "10/10"],
    "score": ["-1.0000", "9.5000 ± 0.1000", "10.0000"],
    "model": ["Edu", "misa", "mult"],
}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_click_sorts_a_column_by_what_its_cells_mean(tmp_path: Path) -> None:
    table = TableData(columns=list(COLUMNS), rows=list(zip(*COLUMNS.values(), strict=True)))
    (tmp_path / "page.html").write_bytes(page("Sorted", [], [Section(title="Models", table=table)]))
    with browse(str(CHROMIUM), tmp_path, (tmp_path / "page.html").as_uri()) as tab:
        tab.wait("document.querySelectorAll('tbody tr').length === 3", seconds=60)
        for place, (column, expected) in enumerate(EXPECTED.items()):
            tab.evaluate(f"document.querySelectorAll('th')[{place}].click()")
            read = f"[...document.querySelectorAll('tbody tr')].map(row => row.cells[{place}].textContent)"
            assert tab.evaluate(read) == expected, column
            tab.evaluate(f"document.querySelectorAll('th')[{place}].click()")
            assert tab.evaluate(read) == expected[::-1], column
        assert tab.errors == []
