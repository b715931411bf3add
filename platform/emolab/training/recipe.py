"""What a training run is: data, model, optimisation, workers. The defaults are the paper's (section IV)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any, Literal, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from torch import nn

from edu_emotionnet import zoo
from emolab.configuration import Settings, truths_as_text
from emolab.corpora.corpus import Split
from emolab.mistakes import first_mistake, shown
from emolab.names import UserError, nearest
from emolab.sessions.manifest import Manifest, canonical_json
from emolab.tracking.settings import TrackingSettings


class ModelSettings(Settings, extra="allow"):
    """A model by name; every other key is an option of that model's own configuration."""

    name: str = Field(default="edu_emotionnet", description="a model of the zoo")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        """Fill in the model's defaults and check its options, so that a resolved configuration says everything."""
        if not isinstance(values, Mapping):
            return values
        name = values.get("name", "edu_emotionnet")
        if not isinstance(name, str):
            raise ValueError(f"name must be text, a model of {', '.join(zoo.ZOO)}, got {shown(name)}")
        options = {key: value for key, value in values.items() if key != "name"}
        return {"name": name} | asdict(_model_options(name, options))

    @classmethod
    def further_keys(cls, arguments: Sequence[str]) -> list[str]:
        """For ``--help``: the options of the default model."""
        del arguments
        options = asdict(zoo.entry("edu_emotionnet").config)
        return [f"{key} = {value!r}" for key, value in options.items()] + [
            f"* : options of another model; models: {', '.join(zoo.ZOO)}"
        ]

    @property
    def options(self) -> Any:
        """The model's configuration dataclass."""
        return _model_options(self.name, dict(self.model_extra or {}))

    def build(self, manifest: Manifest) -> nn.Module:
        """The model for a data set, freshly initialised from torch's current random state."""
        return zoo.build(
            self.name,
            self.options,
            dimensions=manifest.dimensions,
            classes=len(manifest.classes),
            statistics=manifest.feature_statistics,
        )

    def parameters(self, manifest: Manifest) -> int:
        """How many the model would have for a data set; none of them is made."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build(manifest).parameters())


def _model_options(name: str, options: Mapping[str, Any]) -> Any:
    entry = zoo.entry(name)
    known = [field.name for field in fields(entry.config)]
    for key in options:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{nearest(str(key), known)} (options of {name}: {', '.join(known)})")
    validator, types = _validator(type(entry.config))
    values = asdict(entry.config) | truths_as_text(options, types)
    for key in entry.fixed & set(options):
        if options[key] != getattr(entry.config, key):
            raise ValueError(f"{key} is what makes {name} what it is and cannot be changed")
    try:
        return validator.validate_python(values)
    except ValidationError as error:
        raise ValueError(first_mistake(error, values)) from None


@cache
def _validator(options: type[Any]) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    """With the types of the options. A millisecond, which a search asks for thousands of times."""
    return TypeAdapter(options), get_type_hints(options)


class TrainingSettings(Settings):
    """Optimisation, as the paper has it."""

    epochs: int = Field(default=50, ge=1, lt=100_000)
    batch_size: int = Field(default=128, ge=1, description="sessions per optimizer step, over all workers")
    learning_rate: float = Field(default=1e-4, gt=0.0)
    weight_decay: float = Field(default=1e-5, ge=0.0)
    warmup_epochs: int = Field(default=5, ge=0, description="linear warm-up, step by step")
    decay_epochs: tuple[int, ...] = Field(
        default=(30, 40), description="epochs at which the rate is multiplied by decay_factor"
    )
    decay_factor: float = Field(default=0.1, gt=0.0, le=1.0)
    kl_weight: float = Field(
        default=0.1,
        ge=0.0,
        description="lambda of equation 10, for every model; the paper does not give its value. All pairs of steps "
        "count, the sum is divided by the labelled steps: with one label in n steps it weighs n times as much",
    )
    gradient_clip: float | None = Field(
        default=None, gt=0.0, description="largest gradient norm; no clipping where null"
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="validate and keep an exponential moving average of the weights; share of it that stays at each "
        "optimizer step, such as 0.98; 0: the weights themselves",
    )
    modality_dropout: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="share of sessions trained with randomly missing steps (LNLN's scheme: 0.5)",
    )
    feature_noise: float = Field(
        default=0.0, ge=0.0, description="largest Gaussian noise in training, in standard deviations of each feature"
    )
    length_buckets: int = Field(
        default=0,
        ge=0,
        description="sessions of so many batches are sorted by length before they are cut into batches; 0: not sorted",
    )
    patience: int = Field(default=5, ge=1, description="epochs without a better validation macro-F1 before stopping")
    selection: Literal["best", "last"] = Field(
        default="best",
        description="weights kept: best validation macro-F1, or the last epoch's (no validation needed)",
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    def learning_rate_at(self, epoch: int, step: int, steps: int) -> float:
        """Rate for one optimizer step: a function of the position alone, so that resuming needs no scheduler state."""
        rate = self.learning_rate * self.decay_factor ** sum(epoch >= boundary for boundary in self.decay_epochs)
        done = epoch + (step + 1) / steps
        return rate * min(1.0, done / self.warmup_epochs) if self.warmup_epochs else rate


def check_selection(training: TrainingSettings, manifest: Manifest, *, data: str) -> None:
    """Refuse a data set from which nothing can be learned, and to keep the best weights where none can be told from
    others.

    Raises:
        UserError: no training step has a label; or it has no validation sessions, or none of their steps has one.
    """
    check_labels(manifest, "train", data=data, remedy="there is nothing to learn from")
    if training.selection == "best":
        if not manifest.splits["validation"].sessions:
            raise UserError(f"{data} has no validation split: set training.selection=last")
        check_labels(manifest, "validation", data=data, remedy="set training.selection=last")


def check_labels(manifest: Manifest, split: Split, *, data: str, remedy: str) -> None:
    """Refuse a split without labels.

    Raises:
        UserError: no step of it has one.
    """
    if not sum(manifest.splits[split].label_counts):
        raise UserError(f"{data}: no step of the {split} split has a label: {remedy}")


class WorkerSettings(Settings):
    """Processes that train one model together."""

    count: int = Field(default=1, ge=1, le=10_000, description="DDP workers; 1 trains in the calling process")
    gpus: int = Field(default=0, ge=0, le=1, description="GPUs per worker")
    cpus: float = Field(default=1.0, ge=0.01, description="CPUs per worker")
    minimum: int | None = Field(
        default=None,
        ge=1,
        description="go on with so few workers where a lost one cannot be replaced; null: never fewer",
    )
    max_failures: int = Field(default=2, ge=0, description="restarts from the newest checkpoint after a worker is lost")

    def resources(self, count: int) -> dict[str, float]:
        """What so many workers hold, by Ray's names."""
        return {"CPU": count * self.cpus} | ({"GPU": float(count * self.gpus)} if self.gpus else {})

    @model_validator(mode="after")
    def _elastic(self) -> WorkerSettings:
        if self.minimum is not None and self.minimum > self.count:
            raise ValueError(f"minimum must be at most count={self.count}, got {self.minimum}")
        if self.minimum is not None and self.minimum < self.count and not self.max_failures:
            raise ValueError("minimum needs max_failures of at least 1: going on with fewer workers is a restart")
        return self


class TrainSettings(Settings):
    """One training run (jobs/train.py)."""

    data: str = Field(default="data/edusim-small", description="folder made by jobs/prepare.py")
    output: str = Field(default="runs", description="folder for checkpoints, results and the embedded tracker")
    checkpoints: str | None = Field(
        default=None, description="where checkpoints are kept: s3://bucket/prefix; null: in the run's folder"
    )
    name: str | None = Field(default=None, description="run name; null: derived from the configuration")
    register_as: str | None = Field(default=None, description="name in the model registry; null: not registered")
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    workers: WorkerSettings = WorkerSettings()
    tracking: TrackingSettings = TrackingSettings()

    def run_name(self, dataset_digest: str) -> str:
        """The given name, or one that equal configurations on equal data share: the same command resumes."""
        if self.name:
            return self.name
        return f"{self.model.name}-{self.key(dataset_digest)}"

    def key(self, dataset_digest: str) -> str:
        """What equal configurations on equal data share."""
        return fingerprint({"data": dataset_digest, **self.identity()})

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that decides the result."""
        return self.model_dump(mode="json", include={"model", "training"})


def fingerprint(value: Mapping[str, Any]) -> str:
    """Ten hex digits of a SHA-256."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:10]
