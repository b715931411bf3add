"""What a version must show before learners meet it: the gates file, strict and without silent defaults.

Every threshold has to be written down; ``null`` says in so many words that a gate is not asked for.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator

from emolab.configuration import Settings, read_yaml, validate
from emolab.names import UserError

SHIPPED = "default"
"""Name of the gates file that comes with the package."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(Settings):
    model_config = ConfigDict(strict=True)


class Floors(_Strict):
    """Least scores on the test split."""

    macro_f1: Share | None
    class_recall: Share | None = Field(description="of every class")


class AgainstChampion(_Strict):
    """Not worse than the champion: paired bootstrap over the test sessions of both."""

    metric: Literal["macro_f1", "accuracy"]
    margin: Share | None = Field(description="the interval of the difference may reach this far below zero")
    level: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="of the two-sided interval")


class Calibration(_Strict):
    """Whether a probability means what it says."""

    most_error: Share | None = Field(description="expected calibration error on clean test sessions")


class MissingModalities(_Strict):
    """What is left when modalities fail, from a tracked robustness sweep of the test split."""

    rates: list[Share] = Field(description="of the missing-rate curve, from 0 upwards")
    least_area: Share | None = Field(description="mean macro-F1 over the rates (trapezoid area over their span)")
    area_margin: Share | None = Field(description="the area may be this much below the champion's")
    most_single_loss: Share | None = Field(description="macro-F1 lost when one modality is absent, the worst of them")

    @field_validator("rates")
    @classmethod
    def _a_curve(cls, rates: list[float]) -> list[float]:
        if len(rates) < 2 or rates[0] != 0.0 or any(a >= b for a, b in pairwise(rates)):
            raise ValueError("give two rates or more, increasing, the first 0")
        return rates


class Serving(_Strict):
    """What an answer may cost, measured when promotion is asked for, in a process of its own with one thread."""

    session_steps: Annotated[int, Field(ge=1, le=10_000)] = Field(description="length of the session that is timed")
    most_milliseconds: Annotated[float, Field(gt=0.0)] | None = Field(description="median time of one whole session")
    most_megabytes: Annotated[float, Field(gt=0.0)] | None = Field(description="of the weights")


class Provenance(_Strict):
    """Whether the evidence can be believed and repeated."""

    clean_commit: bool = Field(description="every run of the evidence came from committed code")
    most_openings: Annotated[int, Field(ge=1)] = Field(description="of the test split for this model")
    allow_rolled_back: bool = Field(description="whether a version that was rolled back may come again")


class Gates(_Strict):
    """A whole gates file."""

    floors: Floors
    against_champion: AgainstChampion
    calibration: Calibration
    missing_modalities: MissingModalities
    serving: Serving
    provenance: Provenance


def load_gates(name_or_file: str) -> Gates:
    """The shipped gates by their name, or a YAML file.

    Raises:
        UserError: no such file, or the first thing that is wrong in it, by its key.
    """
    path = Path(__file__).with_name("default_gates.yaml") if name_or_file == SHIPPED else Path(name_or_file)
    if not path.is_file():
        raise UserError(f"no gates file {name_or_file!r}: give {SHIPPED!r} or a YAML file")
    return validate(Gates, read_yaml(path), where=f"{path.name}: ")
