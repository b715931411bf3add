"""What a comparison is: models, seeds, and the one training configuration that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from edu_emotionnet import zoo
from emolab.cluster_settings import ClusterSettings
from emolab.configuration import Settings, merge, validate
from emolab.names import UserError, nearest
from emolab.sessions.settings import PrepareSettings
from emolab.tracking.settings import TrackingSettings
from emolab.training.recipe import TrainingSettings, TrainSettings

TABLES: dict[str, tuple[str, ...]] = {
    "Table I": ("mult", "self_mm", "cfn_esa", "hybrid_fusion"),
    "Table II": ("audio_only", "visual_only", "text_only", "early_fusion", "late_fusion"),
    "Table III": ("edu_emotionnet-cmaa", "edu_emotionnet-mie", "edu_emotionnet-tfl"),
}
"""The paper's tables, each compared with the full model."""

MODELS = ("edu_emotionnet", *(name for names in TABLES.values() for name in names), "misa")
"""All of the paper, and MISA."""


class SearchBudget(Settings):
    """What every model of a comparison may spend on a search of its own before its cells are trained."""

    trials: int = Field(default=0, ge=0, description="trials for each model, of training.epochs at most; 0: no search")
    space: str = Field(default="search_spaces/paper.yaml", description="file with the parameters, for all models")


class TheorySettings(Settings):
    """How thoroughly Lemma 1 and Theorem 1 are measured."""

    sessions: int = Field(default=8, ge=0, description="sessions measured per model, from validation; 0: none")
    iterations: int = Field(default=60, ge=1, description="power iterations at most, for each constant")
    tolerance: float = Field(default=1e-3, gt=0.0, description="relative change at which a constant has converged")
    inputs: int = Field(default=64, ge=1, description="fused features at which the feedback map is iterated")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model with one seed."""

    model: str
    seed: int
    settings: TrainSettings

    @property
    def folder(self) -> Path:
        assert self.settings.name is not None
        return Path(self.settings.output) / self.settings.name

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"


class CompareSettings(Settings):
    """A comparison (jobs/compare.py)."""

    data: str = Field(default="data/edusim-small", description="folder made by jobs/prepare.py")
    output: str = Field(default="runs", description="folder for the comparison and the embedded tracker")
    name: str | None = Field(default=None, description="name of the comparison; null: derived from its settings")
    models: tuple[str, ...] = Field(default=MODELS, min_length=1, description="a list of models of the zoo")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="a list; every model gets every seed")
    reference: str = Field(default="edu_emotionnet", description="the model that the others are compared with")
    model: dict[str, Any] = Field(default={}, description="options for every model that has one of that name")
    tuned: dict[str, dict[str, Any]] = Field(
        default={}, description="model -> settings of its own, e.g. tuned.mult.training.learning_rate=0.001"
    )
    search: SearchBudget = SearchBudget()
    gpus: float = Field(default=0.0, ge=0.0, le=1.0, description="share of a GPU for each cell")
    concurrency: int | None = Field(
        default=None, ge=1, description="cells at a time; null: as many as the cluster holds"
    )
    training: TrainingSettings = TrainingSettings()
    theory: TheorySettings = TheorySettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()
    prepare: PrepareSettings | None = Field(default=None, description="how to make the data set where it is missing")

    @field_validator("models", "seeds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`--models mult,misa` is as good as `--models "[mult, misa]"`, and `--seeds 0` as `--seeds "[0]"`."""
        if isinstance(value, int) and not isinstance(value, bool):
            return [value]
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        return [int(part) if part.isdecimal() else part for part in parts]

    @field_validator("models")
    @classmethod
    def _known_models(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        for name in models:
            zoo.entry(name)
        return _distinct(models)

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if min(seeds) < 0:
            raise ValueError(f"seeds must be 0 or more, got {min(seeds)}")
        return _distinct(seeds)

    @model_validator(mode="after")
    def _consistent(self) -> CompareSettings:
        if self.reference not in self.models:
            raise ValueError(
                f"reference {self.reference!r} is not among the models{nearest(self.reference, self.models)} "
                f"(models: {', '.join(self.models)}): set reference to one of them"
            )
        if self.training.seed:
            raise ValueError("training.seed: a comparison takes its seeds from the list seeds")
        if not self.tracking.enabled:
            raise ValueError("tracking.enabled: a comparison is reported from its tracked runs, so it must be true")
        known = sorted({key for name in self.models for key in _options(name)})
        for key in self.model:
            if key not in known:
                raise ValueError(f"model: unknown key {key!r}{nearest(key, known)} (options: {', '.join(known)})")
        for name in self.tuned:
            if name not in self.models:
                raise ValueError(f"tuned: {name!r} is not among the models{nearest(name, self.models)}")
        for name in self.models:
            self.cell(name, self.seeds[0], Path())
        return self

    def cell(self, model: str, seed: int, folder: Path) -> Cell:
        """One cell of the comparison in ``folder``.

        Raises:
            UserError: the model refuses its options.
        """
        values: dict[str, Any] = {
            "model": {key: value for key, value in self.model.items() if key in _options(model)},
            "training": self.training.model_dump(mode="json"),
        }
        own = self.tuned.get(model, {})
        for key in own:
            if key not in values:
                raise UserError(f"tuned.{model}: unknown key {key!r}{nearest(key, values)} (valid: model, training)")
        merge(values, own)
        if values["model"].setdefault("name", model) != model:
            raise UserError(f"tuned.{model}: these are the settings of {values['model']['name']}")
        merge(values, {"training": {"seed": seed}})
        values |= {
            "data": str(Path(self.data).resolve()),
            "output": str(folder.resolve() / "cells"),
            "name": f"{model}-seed-{seed}",
            "workers": {"gpus": 1 if self.gpus else 0},
            "tracking": self.tracking.model_dump(mode="json"),
        }
        return Cell(model=model, seed=seed, settings=validate(TrainSettings, values, where=f"{model}: "))

    def identity(self) -> dict[str, Any]:
        """The part that decides the result of a cell; models and seeds may be added later, as trials to a study."""
        searched = {"search": self.search.model_dump(mode="json")} if self.search.trials else {}
        return (
            self.model_dump(mode="json", include={"model", "tuned"})
            | searched
            | {"training": self.training.model_dump(mode="json", exclude={"seed"})}
        )


def default_preset() -> tuple[str, str]:
    """The preset for a call without one, and the reason for the choice."""
    return "small", "all models, sized for a few CPU cores"


def _options(model: str) -> set[str]:
    """Options that a user may set; those that make an ablation what it is stay as they are."""
    entry = zoo.entry(model)
    return {field.name for field in fields(entry.config)} - entry.fixed


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is listed twice")
    return values
