"""What a report is rebuilt from: the configuration of jobs/report.py."""

from __future__ import annotations

from pydantic import Field

from emolab.configuration import Settings
from emolab.tracking.settings import TrackingSettings


class ReportSettings(Settings):
    """A report to rebuild."""

    run: str = Field(description="id of the comparison's run")
    output: str = Field(default="report.html", description="page to write")
    tables: str | None = Field(default=None, description="folder for the tables as CSV and LaTeX; null: none")
    runs: str = Field(default="runs", description="output folder of the study, where the embedded tracker lies")
    tracking: TrackingSettings = TrackingSettings()
