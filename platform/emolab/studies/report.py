"""jobs/report.py: the page and tables of a finished study, rebuilt from the tracker alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emolab.reports.comparison import comparison_files
from emolab.sessions.manifest import write_atomically
from emolab.studies.comparison_analysis import analyse
from emolab.studies.comparison_results import read_comparison
from emolab.studies.report_settings import ReportSettings
from emolab.tracking.runs import existing_tracker


def write_report(settings: ReportSettings, *, dry_run: bool = False, report: Callable[[str], None]) -> None:
    """Write the page, and the tables where a folder is given; a dry run checks the settings alone.

    Raises:
        UserError: there is no such tracker, run or result.
    """
    if dry_run:
        return
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
