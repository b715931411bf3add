"""jobs/report.py: the page and tables of a finished study, rebuilt from the tracker alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from emolab.configuration import Settings
from emolab.reports.comparison import comparison_files
from emolab.sessions.manifest import write_atomically
from emolab.studies.comparison_analysis import analyse
from emolab.studies.comparison_results import read_comparison
from emolab.tracking.runs import existing_tracker
from emolab.training.recipe import TrackingSettings


class ReportSettings(Settings):
    """A report to rebuild."""

    run: str = Field(description="id of the comparison's run")
    output: str = Field(default="report.html", description="page to write")
    tables: str | None = Field(default=None, description="folder for the tables as CSV and LaTeX; null: none")
    runs: str = Field(default="runs", description="output folder of the study, where the embedded tracker lies")
    tracking: TrackingSettings = TrackingSettings()


def write_report(settings: ReportSettings, *, report: Callable[[str], None]) -> None:
    """Write the page, and the tables where a folder is given.

    Raises:
        UserError: there is no such tracker, run or result.
    """
    tracker = existing_tracker(**settings.tracking.model_dump(), output=Path(settings.runs), option="--runs")
    files = comparison_files(analyse(read_comparison(tracker, settings.run)))
    for name, content in files.items():
        if name == "report.html":
            path = Path(settings.output)
        elif settings.tables is not None:
            path = Path(settings.tables) / Path(name).name
        else:
            continue
        write_atomically(path, content)
        report(str(path))
