"""What a search is: the configuration of jobs/tune.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from emolab.cluster_settings import ClusterSettings, joins_cluster
from emolab.configuration import Settings
from emolab.databases import in_memory
from emolab.sessions.settings import PrepareSettings
from emolab.training.recipe import TrainSettings
from emolab.tuning.methods import STARTUP_TRIALS, Sampler, Scheduler
from emolab.tuning.space import Value
from emolab.tuning.trials import Objective


class ConstraintSettings(Settings):
    """Limits of an acceptable model. A trial over a limit is PRUNED before its first epoch. The sampler tpe learns to
    stay within them, random and grid draw as without; gp and cmaes cannot learn from such a trial and are refused."""

    parameters: int | None = Field(default=None, ge=1, description="most trainable parameters")
    latency_ms: float | None = Field(
        default=None, gt=0.0, description="longest median time for one session, forward, on the trial's device"
    )

    def limits(self) -> dict[str, float]:
        """Name -> limit of those that are set."""
        return {name: float(limit) for name, limit in self.model_dump().items() if limit is not None}


class FinalSettings(Settings):
    """How the winner is chosen among the best trials: each trained with several seeds, the best mean wins."""

    top: int = Field(
        default=1,
        ge=1,
        description="best trials that take part, where too few completed those that went furthest; "
        "1 with one seed: the best trial wins",
    )
    seeds: int = Field(default=1, ge=1, description="trainings of each, with seeds that the search did not use")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to train."""
        return self.top > 1 or self.seeds > 1


BASE = "base"
"""The point that the configuration itself is."""


class SearchSettings(Settings):
    """How to search."""

    space: str = Field(
        default="search_spaces/paper.yaml", description="file with the parameters and their distributions"
    )
    storage: str | None = Field(
        default=None,
        description="the study's database, such as postgresql://user@host/studies; null: study.db in its folder",
    )
    trials: int = Field(default=12, ge=1, le=100_000, description="trials in total; those already in the study count")
    epoch_budget: int | None = Field(
        default=None,
        ge=1,
        description="epochs over all trials; once they are spent no trial starts or goes on; not with pbt",
    )
    time_budget_s: float | None = Field(
        default=None,
        gt=0.0,
        description="seconds of searching after which no trial starts; those that train go on to their end, a final "
        "and the best training follow, and the next call goes on with as many seconds again; not with halving or pbt",
    )
    points_to_evaluate: tuple[Literal["base"] | dict[str, Value], ...] = Field(
        default=(),
        description="configurations to try first: base (the configuration's own values), or {KEY: VALUE, ...}, of "
        "which what is left open is drawn",
    )
    sampler: Sampler = Field(default="tpe", description="tpe, gp, cmaes, random or grid")
    startup_trials: int = Field(
        default=STARTUP_TRIALS,
        ge=1,
        description="trials that tpe and gp draw at random before they learn from what was found",
    )
    scheduler: Scheduler | None = Field(
        default=None,
        description="asha, halving, hyperband, median, none or pbt; null: asha, or none where there are several "
        "objectives, by which none of the others can decide",
    )
    objectives: tuple[Objective, ...] = Field(
        default=("macro_f1",), description="[macro_f1] or [macro_f1, robustness], both on validation"
    )
    constraints: ConstraintSettings = ConstraintSettings()
    grace_epochs: int = Field(default=2, ge=1, description="epochs before a scheduler may stop a trial")
    reduction_factor: int = Field(default=3, ge=2, description="one trial in so many passes each rung")
    concurrency: int | None = Field(
        default=None, ge=1, description="trials at a time; null: as many as the cluster holds, as pbt always does"
    )
    fused: int | None = Field(
        default=None,
        ge=1,
        description="configurations trained in one step by each process; null: 8 on a GPU, 1 on CPUs",
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0.0,
        description="longest time that an epoch may take, the first with the start of its trial, the last with its "
        "robustness, before a process counts as hung; for trials of one worker, not with pbt",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the sampler, and of what a population changes")
    final: FinalSettings = FinalSettings()
    final_workers: int | None = Field(
        default=None,
        ge=1,
        description="DDP workers that train the best configuration; null: up to 4, as fit the cluster",
    )

    @field_validator("storage")
    @classmethod
    def _kept(cls, storage: str | None) -> str | None:
        if storage is not None and in_memory(storage):
            raise ValueError(
                "names no file, and a search resumes from one: write sqlite:///PATH, or leave it out for study.db in "
                "the study's folder"
            )
        return storage

    @model_validator(mode="after")
    def _objectives(self) -> SearchSettings:
        if self.objectives not in (("macro_f1",), ("macro_f1", "robustness")):
            raise ValueError(f"objectives must be [macro_f1] or [macro_f1, robustness], got {list(self.objectives)}")
        return self

    @property
    def stopping(self) -> Scheduler:
        """The scheduler that is in force."""
        return self.scheduler or ("asha" if len(self.objectives) == 1 else "none")


class TuneSettings(TrainSettings):
    """A search (jobs/tune.py): a training configuration, and what to vary in it."""

    register_as: str | None = Field(
        default="edu-emotionnet", description="name in the model registry; null: not registered"
    )
    tuning: SearchSettings = SearchSettings()
    prepare: PrepareSettings | None = Field(default=None, description="how to make the data set where it is missing")
    cluster: ClusterSettings = ClusterSettings()

    def base(self) -> TrainSettings:
        """The configuration every trial starts from."""
        values = self.model_dump(mode="json", include=set(TrainSettings.model_fields))
        return TrainSettings.model_validate(values | {"data": str(Path(self.data).resolve()), "register_as": None})


def default_preset() -> tuple[str, str]:
    """The preset for a call without one, and the reason for the choice."""
    if joins_cluster():
        from emolab.cluster import cluster_gpus, connected  # Ray, which takes a while to import

        with connected():
            gpus, place = cluster_gpus(), "the cluster"
    else:
        gpus, place = torch.cuda.device_count(), "this machine"
    if gpus:
        return "paper", f"{place} has {gpus} GPU(s)"
    return "small", f"{place} has no GPU, and the paper's size would take days on CPUs"
