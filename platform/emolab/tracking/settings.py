"""Where runs are recorded, without MLflow: options are read before it is imported."""

from __future__ import annotations

from pydantic import Field

from emolab.configuration import Settings


class TrackingSettings(Settings):
    """Where runs are recorded."""

    uri: str | None = Field(
        default=None, description="MLflow; null: MLFLOW_TRACKING_URI, else SQLite in the output folder"
    )
    experiment: str = "edu-emotionnet"
    enabled: bool = True
