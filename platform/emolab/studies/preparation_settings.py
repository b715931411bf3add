"""What a preparation is: the configuration of jobs/prepare.py."""

from __future__ import annotations

from pydantic import Field

from emolab.cluster_settings import ClusterSettings
from emolab.sessions.settings import PrepareSettings
from emolab.tracking.settings import TrackingSettings


class PreparationSettings(PrepareSettings):
    """A data set to make, and where its report is recorded (jobs/prepare.py)."""

    runs: str = Field(default="runs", description="folder of the embedded tracker, as of the other jobs")
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()
