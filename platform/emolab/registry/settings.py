"""What a promotion is: the configuration of jobs/promote.py."""

from __future__ import annotations

from pydantic import Field, model_validator

from emolab.configuration import Settings
from emolab.registry.gates import SHIPPED
from emolab.tracking.settings import TrackingSettings


class PromoteSettings(Settings):
    """A promotion, or its reversal (jobs/promote.py)."""

    model: str = Field(
        default="models:/edu-emotionnet@challenger", description="the challenger: models:/name@alias or /version"
    )
    gates: str = Field(default=SHIPPED, description="default, or a YAML file with every gate")
    evaluate: str | None = Field(
        default=None, description="folder of the data set: opens its test split, once, for a model not yet tested"
    )
    rollback: bool = Field(default=False, description="put the previous champion back instead")
    reason: str = Field(default="", max_length=500, description="of a rollback, recorded with it")
    output: str = Field(default="runs", description="folder for verdicts; the embedded tracker lies there")
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> PromoteSettings:
        if self.rollback and self.evaluate:
            raise ValueError("--rollback evaluates nothing: leave out --evaluate")
        if self.reason and not self.rollback:
            raise ValueError("--reason belongs to --rollback")
        return self
