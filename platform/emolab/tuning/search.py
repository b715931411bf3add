"""A search from configuration to a registered challenger."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.tune
import yaml
from pydantic import Field, model_validator
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from emolab.cluster import ClusterSettings, require
from emolab.configuration import Settings, to_yaml
from emolab.locks import holding
from emolab.names import UserError, contained
from emolab.sessions.manifest import Manifest, read_manifest, write_atomically
from emolab.sessions.preparation import PrepareSettings
from emolab.tracking.provenance import code_version
from emolab.tracking.tracker import Run, Tracker
from emolab.training.data import shared_datasets
from emolab.training.recipe import TrainSettings, WorkerSettings, fingerprint
from emolab.tuning.searcher import FAILURE, FINISHED, StudySearch
from emolab.tuning.space import SearchSpace, configured, read_space
from emolab.tuning.study import METRIC, ROBUSTNESS, Objective, Sampler, Study, TrialRecord
from emolab.tuning.trials import BASE, OBJECTIVES, TrainingTrial, distributed_trial


class SearchSettings(Settings):
    """How to search."""

    space: str = Field(
        default="search_spaces/paper.yaml", description="file with the parameters and their distributions"
    )
    trials: int = Field(default=12, ge=1, description="trials in total; those already in the study count")
    sampler: Sampler = "tpe"
    scheduler: Literal["asha", "none"] = Field(
        default="asha", description="asha stops weak trials early; with several objectives none does"
    )
    objectives: tuple[Objective, ...] = Field(
        default=("macro_f1",), description="[macro_f1] or [macro_f1, robustness], both on validation"
    )
    grace_epochs: int = Field(default=2, ge=1, description="epochs before ASHA may stop a trial")
    reduction_factor: int = Field(default=3, ge=2, description="ASHA keeps one in so many at each rung")
    concurrency: int | None = Field(
        default=None, ge=1, description="trials at a time; null: as many as the cluster holds"
    )
    seed: int = Field(default=0, ge=0, description="of the sampler")

    @model_validator(mode="after")
    def _objectives(self) -> SearchSettings:
        if self.objectives not in (("macro_f1",), ("macro_f1", "robustness")):
            raise ValueError(f"objectives must be [macro_f1] or [macro_f1, robustness], got {list(self.objectives)}")
        return self

    final_workers: int | None = Field(
        default=None,
        ge=1,
        description="DDP workers that train the best configuration; null: up to 4, as fit the cluster",
    )


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


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A finished search."""

    folder: Path
    run_id: str
    manifest: Manifest
    records: list[TrialRecord]
    best: TrialRecord
    settings: TrainSettings
    """The base configuration with the best parameters, and the workers to train it with."""
    study: Study


def search(settings: TuneSettings, tracker: Tracker, *, report: Callable[[str], None] = lambda _: None) -> SearchResult:
    """Run, or go on with, the search that the settings name, until the study holds all its trials.

    Ray must be connected. Finished trials are kept; trials that a killed search left running are run again with
    the same parameters.

    Raises:
        UserError: unusable space, data or cluster; another process holds the study; no trial completed.
    """
    plan = plan_search(settings)
    with holding(plan.folder, what="study"):
        study = Study(
            plan.folder / "study.db",
            plan.folder.name,
            seed=settings.tuning.seed,
            sampler=settings.tuning.sampler,
            objectives=settings.tuning.objectives,
        )
        run = _parent_run(settings, plan, tracker)
        requeued = study.requeue_interrupted()
        done = study.finished()
        if requeued or done:
            report(f"resuming: {done} trials are finished, {requeued} were interrupted and run again")
        if done < settings.tuning.trials:
            _run_trials(settings, plan, study, tracker, run, report)
        return _result(settings, plan, study, run)


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search that has been checked and can start."""

    folder: Path
    manifest: Manifest
    space: SearchSpace
    concurrency: int
    final_workers: int

    def describe(self, settings: TuneSettings) -> str:
        """The plan for people."""
        tuning = settings.tuning
        keys = ", ".join(self.space.parameters)
        return (
            f"{tuning.trials} trials of at most {settings.training.epochs} epochs ({settings.model.name}), "
            f"{self.concurrency} at a time, {tuning.sampler} over {keys}, scheduler {tuning.scheduler}; "
            f"the best trained with {self.final_workers} worker(s); study {self.folder / 'study.db'}"
        )


def plan_search(settings: TuneSettings) -> SearchPlan:
    """Check a search against its files and the cluster, without starting anything.

    Raises:
        UserError: the first thing that does not fit.
    """
    manifest = read_manifest(Path(settings.data))
    space = read_space(Path(settings.tuning.space), settings.base())
    # The budget and the sampler may change between calls: a study can be extended.
    objectives = {} if settings.tuning.objectives == ("macro_f1",) else {"objectives": settings.tuning.objectives}
    content = (
        settings.base().identity() | objectives | {"space": space.model_dump(mode="json"), "data": manifest.digest}
    )
    name = settings.name or f"search-{Path(settings.tuning.space).stem}-{fingerprint(content)}"
    if "robustness" in settings.tuning.objectives and settings.workers.count > 1:
        raise UserError("robustness as an objective needs trials of one worker: set workers.count=1")
    needs = _resources(settings.workers, settings.workers.count)
    require(needs, purpose="a trial")
    total = ray.cluster_resources()
    fitting = int(min(total.get(key, 0.0) // amount for key, amount in needs.items()))
    workers = settings.workers
    final_workers = max(workers.count, settings.tuning.final_workers or min(4, fitting * workers.count))
    require(_resources(workers, final_workers), purpose=f"training the best configuration with {final_workers} workers")
    return SearchPlan(
        folder=contained(Path(settings.output), name, what="study name"),
        manifest=manifest,
        space=space,
        concurrency=min(settings.tuning.concurrency or fitting, fitting, settings.tuning.trials),
        final_workers=final_workers,
    )


def _resources(workers: WorkerSettings, count: int) -> dict[str, float]:
    """What so many workers hold."""
    return {"CPU": count * workers.cpus} | ({"GPU": float(count * workers.gpus)} if workers.gpus else {})


def _run_trials(
    settings: TuneSettings,
    plan: SearchPlan,
    study: Study,
    tracker: Tracker,
    run: Run,
    report: Callable[[str], None],
) -> None:
    base = settings.base()
    shared_datasets(Path(base.data), plan.manifest)  # damaged data is refused here, once, not by every trial
    searcher = StudySearch(study, plan.space.distributions())
    if base.workers.count == 1:
        trainable = ray.tune.with_resources(TrainingTrial, _resources(base.workers, base.workers.count))
    else:  # the workers reserve their own CPUs; the driver only waits for them
        trainable = ray.tune.with_resources(distributed_trial, {"memory": 64 * 2**20})
    tuner = ray.tune.Tuner(
        trainable,
        param_space={BASE: base.model_dump(mode="json"), OBJECTIVES: list(settings.tuning.objectives)},
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(settings),
            num_samples=settings.tuning.trials - study.finished(),
            max_concurrent_trials=plan.concurrency,
            reuse_actors=base.workers.count == 1,
        ),
        run_config=ray.tune.RunConfig(
            name=f"trials-{os.urandom(3).hex()}",  # Tune's own records; what resumes is the study
            storage_path=str(plan.folder.resolve() / "ray"),
            callbacks=[TrialRecorder(tracker, run.run_id, study, searcher, settings.tuning.trials, report)],
            verbose=0,
        ),
    )
    tuner.fit()


def _scheduler(settings: TuneSettings) -> TrialScheduler:
    if settings.tuning.scheduler == "none" or len(settings.tuning.objectives) > 1:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        # One more than there are: a trial that reaches its end must end by itself. Stopped at its last report, a
        # trial with several workers would leave them, and their CPUs, behind.
        max_t=settings.training.epochs + 1,
        grace_period=min(settings.tuning.grace_epochs, settings.training.epochs),
        reduction_factor=settings.tuning.reduction_factor,
    )


class TrialRecorder(ray.tune.Callback):
    """Writes every trial to the tracker as a child run; runs in the driver, the only writer."""

    def __init__(
        self,
        tracker: Tracker,
        parent: str,
        study: Study,
        searcher: StudySearch,
        budget: int,
        report: Callable[[str], None],
    ) -> None:
        self._tracker, self._parent, self._study, self._searcher = tracker, parent, study, searcher
        self._budget, self._report = budget, report
        self._runs: dict[str, Run] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: object
    ) -> None:
        if FAILURE in result:  # its value is NaN; the reason follows when the trial ends
            return
        metrics = {key: result[key] for key in _TRACKED if isinstance(result.get(key), float)}
        self._run(trial).log_metrics(metrics, step=int(result["epoch"]))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        result = trial.last_result or {}
        failure = result.get(FAILURE)
        state = "failed" if failure else "complete" if result.get(FINISHED) else "pruned"
        self._finish(trial, state, failure or "")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        self._finish(trial, "failed", "the trial's process failed")

    def _finish(self, trial: Trial, state: str, reason: str) -> None:
        run = self._run(trial)
        run.set_tags({"emolab.trial_state": state} | ({"failure": reason} if reason else {}))
        run.finish("FAILED" if state == "failed" else "FINISHED")
        result = trial.last_result or {}
        outcome = reason or f"validation macro-F1 {result.get(METRIC, float('nan')):.4f}"
        self._report(
            f"trial {self._searcher.number(trial.trial_id)} {state} after {int(result.get('epoch', 0))} epochs: "
            f"{outcome} ({self._study.finished()} of {self._budget})"
        )

    def _run(self, trial: Trial) -> Run:
        if trial.trial_id not in self._runs:
            number = self._searcher.number(trial.trial_id)
            run = self._tracker.start(
                f"trial-{number:04d}",
                parent=self._parent,
                tags=code_version()
                | {"emolab.kind": "trial", "emolab.trial": str(number), "emolab.tune_id": trial.trial_id},
            )
            run.log_parameters({key: value for key, value in trial.config.items() if key not in (BASE, OBJECTIVES)})
            self._runs[trial.trial_id] = run
        return self._runs[trial.trial_id]


_TRACKED = (
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "validation_macro_f1",
    METRIC,
    ROBUSTNESS,
    "learning_rate",
    "sessions_per_second",
)


def _parent_run(settings: TuneSettings, plan: SearchPlan, tracker: Tracker) -> Run:
    record = plan.folder / "run.json"
    if record.exists():
        known = json.loads(record.read_text())
        if known["digest"] != plan.manifest.digest:
            raise UserError(f"the study in {plan.folder} was made on other data: choose another name")
        if known["tracker"] == tracker.uri:
            return tracker.resume(known["run_id"])
    run = tracker.start(
        plan.folder.name,
        tags=code_version() | {"emolab.dataset": plan.manifest.digest, "emolab.kind": "search"},
    )
    run.log_text(to_yaml(settings), "config.yaml")
    run.log_text(Path(settings.tuning.space).read_text(encoding="utf-8"), "search_space.yaml")
    run.log_parameters(
        {f"tuning.{key}": value for key, value in settings.tuning.model_dump(mode="json").items() if key != "trials"}
    )
    content = {"run_id": run.run_id, "tracker": tracker.uri, "digest": plan.manifest.digest}
    write_atomically(record, json.dumps(content).encode())
    return run


def _result(settings: TuneSettings, plan: SearchPlan, study: Study, run: Run) -> SearchResult:
    best = study.best()
    records = study.records()
    if best is None:
        reasons = "; ".join(sorted({record.reason for record in records if record.reason})[:3])
        run.finish("FAILED")
        raise UserError(f"none of the {len(records)} trials completed ({reasons or 'all were pruned'})")
    workers = settings.workers.model_copy(update={"count": plan.final_workers})
    chosen = configured(settings.base(), best.parameters).model_copy(update={"workers": workers})
    best_file = plan.folder / "best.yaml"
    content = chosen.model_dump(mode="json", include={"model", "training"})
    write_atomically(best_file, yaml.safe_dump(content, sort_keys=False).encode())
    run.log_file(best_file)
    return SearchResult(
        folder=plan.folder,
        run_id=run.run_id,
        manifest=plan.manifest,
        records=records,
        best=best,
        settings=chosen,
        study=study,
    )
