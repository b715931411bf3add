"""What is asked of a trained model: the configurations of jobs/predict.py, jobs/serve.py and jobs/export.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from emolab.cluster_settings import ClusterSettings
from emolab.configuration import Settings
from emolab.tracking.settings import TrackingSettings

MODEL_HELP = "a run's folder, runs:/ID, models:/name@alias or models:/name/version"


HostName = Annotated[str, StringConstraints(pattern=r"^((\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\])$")]
"""A host as it stands in a URL; ``*.`` stands for any name below it."""


class PredictSettings(Settings):
    """Batch prediction (jobs/predict.py)."""

    model: str = Field(default="models:/edu-emotionnet@champion", description=MODEL_HELP)
    data: str | None = Field(default=None, description="folder made by jobs/prepare.py")
    splits: tuple[Literal["train", "validation"], ...] = Field(
        default=("validation",), min_length=1, description="of data; the test split is opened by jobs/compare.py alone"
    )
    shards: str | None = Field(default=None, description="instead of data: a folder of session shards (Parquet)")
    manifest: str | None = Field(
        default=None, description="instead of data: a table of recordings, as prepare takes it"
    )
    options: dict[str, Any] = Field(default={}, description="of the recordings' extractors, as options.key=value")
    shard_sessions: int = Field(default=64, ge=1, description="recordings per file")
    max_refused: float = Field(default=0.1, ge=0.0, le=1.0, description="largest share of recordings set aside")
    stall_seconds: float = Field(default=3600.0, gt=0.0, description="longest time without any finished recording")
    output: str = Field(default="runs", description="folder of the results, and of the embedded tracker")
    name: str | None = Field(default=None, description="of the result's folder; null: derived from model and shards")
    actors: int | None = Field(default=None, ge=1, description="predicting processes; null: one per CPU")
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _one_source(self) -> PredictSettings:
        if sum(source is not None for source in (self.data, self.shards, self.manifest)) != 1:
            raise ValueError(
                "give one of --data (a data set), --shards (a folder of session shards), --manifest (recordings)"
            )
        return self


class ServeSettings(Settings):
    """Live inference (jobs/serve.py)."""

    model: str = Field(default="models:/edu-emotionnet@champion", description=MODEL_HELP)
    output: str = Field(default="runs", description="folder of the embedded tracker; fetched models are kept there")
    host: str = Field(default="127.0.0.1", description="address to listen on; anything but loopback is open to others")
    port: int = Field(default=8000, ge=0, le=65535, description="0: any free one")
    names: tuple[HostName, ...] = Field(
        default=(), description="further hosts by which browsers may know this server, such as a proxy's name"
    )
    window: int | None = Field(default=None, ge=1, description="steps that attention sees; null: the whole session")
    sessions: int = Field(default=16, ge=1, le=10_000, description="at the same time; further ones are turned away")
    idle_seconds: float = Field(default=60.0, gt=0.0, description="silence after which a session is closed")
    message_bytes: int = Field(default=1_000_000, ge=100, le=16_000_000, description="largest message")
    unanswered: int = Field(
        default=64, ge=1, le=10_000, description="most messages of a session, of message_bytes together, that wait"
    )
    steps: int = Field(default=20_000, ge=1, description="most steps of a session")
    mistakes: int = Field(default=20, ge=1, description="refused messages in a row after which a session is closed")
    demo: str | None = Field(default=None, description="data set whose validation sessions the page can replay")
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()


class ExportSettings(Settings):
    """Export for a device (jobs/export.py)."""

    model: str = Field(default="models:/edu-emotionnet@champion", description=MODEL_HELP)
    to: str = Field(default="exported", description="folder to write; must not exist yet")
    window: int = Field(default=300, ge=1, le=100_000, description="steps that attention sees; fixes every shape")
    data: str | None = Field(default=None, description="data set whose validation sessions are compared; null: noise")
    output: str = Field(default="runs", description="folder of the embedded tracker; fetched models are kept there")
    tracking: TrackingSettings = TrackingSettings()
