"""A pytest plugin: what the fault tests tried, collected from all test processes into one JSON file and one table.

`make faults` loads it (`-p tests.faults.report`). A test that draws many faults says how many by the fixture
``record_faults``; any other test marked ``fault`` counts as the one fault of the area its folder belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "faults"
_AREAS = {"training": "training", "tuning": "tuning", "sessions": "preparation", "robustness": "sweeps"}
_AREAS |= {"test_remote_checkpoints": "training", "test_checkpoint_faults": "training"}


@dataclass
class Row:
    """Faults of one kind in one area."""

    area: str
    fault: str
    tried: int = 0
    survived: int = 0
    kills: int = 0

    @property
    def lost(self) -> int:
        return self.tried - self.survived


class FaultReport:
    """Collects in the process that reads the results, and writes there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "fault" not in report.keywords or report.skipped or (report.when != "call" and report.passed):
            return
        counted = [dict(value) for name, value in report.user_properties if name == PROPERTY]
        if report.failed and not counted:
            counted = [_one(report) | {"survived": 0}]
        for entry in counted or [_one(report)]:
            row = self.rows.setdefault((entry["area"], entry["fault"]), Row(entry["area"], entry["fault"]))
            row.tried += entry["tried"]
            row.survived += entry["survived"]
            row.kills += entry.get("kills", 0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.rows:
            return
        rows = [self.rows[key] for key in sorted(self.rows)]
        total = Row("all", "", *(sum(getattr(r, name) for r in rows) for name in ("tried", "survived", "kills")))
        content = {
            "total": asdict(total) | {"lost": total.lost},
            "faults": [asdict(row) | {"lost": row.lost} for row in rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1))
        table = "\n".join(_lines([*rows, total]))
        self.path.with_suffix(".md").write_text(table + "\n")
        terminalreporter.section("faults")
        terminalreporter.write_line(table)
        terminalreporter.write_line(f"written to {self.path} and {self.path.with_suffix('.md').name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the figures go."""
    parser.addoption("--faults-report", default="runs/faults.json", help="file for what the fault tests tried")


def pytest_configure(config: pytest.Config) -> None:
    """Only where results arrive: not in the processes of pytest-xdist that run the tests."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultReport(Path(config.getoption("--faults-report"))), "fault-report")


def _one(report: pytest.TestReport) -> dict[str, Any]:
    path = Path(report.nodeid.partition("::")[0])
    folder = path.stem if path.parent.name == "faults" else path.parent.name
    parts = report.nodeid.partition("[")[0].split("::")
    name = parts[-2] if parts[-1] == "runTest" else parts[-1]  # a state machine is a class
    described = name.removeprefix("test_").replace("_", " ")
    return {"area": _AREAS.get(folder, "other"), "fault": described, "tried": 1, "survived": 1}


def _lines(rows: list[Row]) -> Iterator[str]:
    yield "| area | fault | tried | survived | lost | of them SIGKILL |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield f"| {row.area} | {row.fault} | {row.tried} | {row.survived} | {row.lost} | {row.kills} |"
