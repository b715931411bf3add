"""What a robustness sweep is: the configuration of jobs/robustness.py."""

from __future__ import annotations

from pydantic import Field, field_validator

from emolab.cluster_settings import ClusterSettings
from emolab.configuration import Settings
from emolab.corpora.corpus import Split
from emolab.robustness.shipped import shipped_suites
from emolab.tracking.settings import TrackingSettings


class RobustnessSettings(Settings):
    """A robustness sweep (jobs/robustness.py)."""

    model: str | tuple[str, ...] = Field(
        default=(), description="one or more: a run's folder, runs:/ID, a comparison's id, models:/name@alias"
    )
    suite: str = Field(default="paper", description=f"{', '.join(shipped_suites())}, or a YAML file")
    data: str | None = Field(
        default=None, description="folder made by jobs/prepare.py; null: the data that the models were trained on"
    )
    split: Split = Field(default="test", description="sessions to corrupt; choose by validation, report on test")
    output: str = "runs"
    name: str | None = Field(default=None, description="null: derived from models, suite and data")
    reference: str = Field(default="edu_emotionnet", description="the model that others are compared with")
    bfloat16: bool = Field(default=False, description="encode in bfloat16 where the model can be factorised: not exact")
    actors: int | None = Field(
        default=None, ge=1, description="evaluating processes; null: one per CPU, or per GPU share"
    )
    gpus: float = Field(default=0.0, ge=0.0, le=1.0, description="share of a GPU for each evaluating process")
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @field_validator("reference")
    @classmethod
    def _known_model(cls, name: str) -> str:
        from edu_emotionnet import zoo  # with PyTorch, for which other options need not wait

        zoo.entry(name)
        return name

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,) if isinstance(self.model, str) else self.model
