"""Trials of several workers: each a Ray Train run of its own below Ray Tune. The only module that knows Ray Tune's
loop; Optuna draws and judges here as it does for packed trials."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from emolab.cluster import worker_environment
from emolab.training.distributed import fit_distributed, trained_epochs
from emolab.training.recipe import TrainSettings
from emolab.tuning.pack import reason_of
from emolab.tuning.recorder import TRACKED, TrialRecorder
from emolab.tuning.space import configured
from emolab.tuning.study import Study
from emolab.tuning.trials import METRIC, SPENT, State

BASE, ENVIRONMENT = "base", "environment"
"""Keys of a trial's configuration: the settings that all trials share, and variables that its process needs."""
FAILURE = "failure"
"""Result key: why a trial could not go on."""
FINISHED = "finished"
"""Result key: whether a trial came to its own end (all epochs, or early stopping by validation)."""


class Unsaved:
    """Part of a run of Ray Tune that is not written to disk. Tune pickles all it was given, for a restore of its
    own; what resumes here is the study, which is no thing to be pickled."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (Unsaved, ())


class StudySearcher(Unsaved, Searcher):
    """Gives Ray Tune the study's draws, and tells the study how each trial ended."""

    def __init__(
        self,
        study: Study,
        recorder: TrialRecorder,
        rungs: Sequence[int],
        report: Callable[[str], None],
        *,
        epoch_budget: int | None = None,
        deadline: float = math.inf,
        kind: str = "trial",
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._study, self._recorder, self._rungs, self._report = study, recorder, rungs, report
        self._epoch_budget, self._deadline, self._kind = epoch_budget, deadline, kind
        self._numbers: dict[str, int] = {}
        self._curves: dict[str, list[dict[str, float]]] = {}
        self._started: dict[str, float] = {}
        self._causes: dict[str, str] = {}
        self._ends: dict[str, dict[str, Any]] = {}
        """The results with which trials came to their own end."""

    @property
    def spent(self) -> bool:
        """Whether no epoch of the budget is left."""
        if self._epoch_budget is None:
            return False
        return self._study.epochs() + sum(map(len, self._curves.values())) >= self._epoch_budget

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.spent or time.monotonic() >= self._deadline:
            return Searcher.FINISHED  # pyright: ignore[reportReturnType]  # as Tune itself wants it
        draw = self._study.ask()
        self._numbers[trial_id], self._curves[trial_id] = draw.number, []
        self._started[trial_id] = time.perf_counter()
        self._recorder.began(draw.number, draw.parameters)
        return draw.parameters

    def learn(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Take the result of an epoch, which may come after that of a later one; whether the trial goes on."""
        value, epoch = result.get(METRIC), int(result.get("epoch", 0))
        curve, number = self._curves.get(trial_id, []), self._numbers[trial_id]
        epochs = {int(point["epoch"]) for point in curve}
        if trial_id not in self._started or epoch in epochs or value is None or not math.isfinite(value):
            return True
        self._study.report(number, epoch, value)
        curve.append({key: float(result[key]) for key in ("epoch", *TRACKED) if key in result})
        self._recorder.epochs(number, curve[-1:])
        curve.sort(key=lambda point: point["epoch"])
        if result.get(FINISHED):
            self._ends[trial_id] = result
        if trial_id in self._ends:
            return True
        before = max(epochs, default=0)
        if self.spent:
            self._causes[trial_id] = SPENT
        elif any(before < rung <= epoch for rung in self._rungs) and self._study.should_prune(number):
            self._causes[trial_id] = "pruned"
        return trial_id not in self._causes

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._started:  # Tune may say it twice
            return
        self.learn(trial_id, result or {})
        result = self._ends.pop(trial_id, result or {})
        seconds = time.perf_counter() - self._started.pop(trial_id)
        state, reason = _end(result, error, cause=self._causes.pop(trial_id, "pruned"))
        number, curves = self._numbers[trial_id], self._curves.pop(trial_id)
        values = [float(result[METRIC])] if state == "COMPLETE" else []
        self._study.tell(number, state, values, reason=reason, epochs=len(curves), seconds=seconds, curves=curves)
        self._study.flush()
        record = self._study.record(number)
        self._recorder.ended(record)
        unscored = state == "FAIL" or record.value is None
        outcome = reason if unscored else f"validation macro-F1 {record.value:.4f}"
        named = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[state]
        self._report(f"{self._kind} {number} {named} after {record.epochs} epochs: {outcome}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what resumes is the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


def _end(result: dict[str, Any], error: bool, *, cause: str) -> tuple[State, str]:
    failure = result.get(FAILURE)
    if error or failure or not result:
        return "FAIL", failure or ("the trial's process failed" if error else "no result was reported")
    if result.get(FINISHED):
        return "COMPLETE", ""
    return "PRUNED", f"{cause} after epoch {int(result.get('epoch', 0))}"


class StudyScheduler(FIFOScheduler):
    """Stops the trials that the study's pruner wants stopped. One that has finished must end by itself: stopped at
    its last report, it would leave its workers, and their CPUs, behind."""

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        goes_on = self._searcher.learn(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


def run_with_workers(
    base: TrainSettings,
    study: Study,
    recorder: TrialRecorder,
    report: Callable[[str], None],
    *,
    folder: Path,
    trials: int,
    concurrency: int,
    rungs: Sequence[int],
    epoch_budget: int | None = None,
    deadline: float = math.inf,
    kind: str = "trial",
) -> None:
    """Run trials of several workers until the study holds ``trials`` of them, or their epochs or the time are over.

    Args:
        deadline: by the monotonic clock; no trial starts after it.
        kind: what a trial is called in what people read.
    """
    searcher = StudySearcher(study, recorder, rungs, report, epoch_budget=epoch_budget, deadline=deadline, kind=kind)
    if searcher.spent:
        return
    ray.tune.Tuner(
        # The workers reserve their own CPUs; the trial's own process only waits for them.
        ray.tune.with_resources(distributed_trial, {"memory": 64 * 2**20}),
        param_space={  # Tune writes it down
            BASE: base.model_dump(mode="json", exclude={"tracking"}),
            ENVIRONMENT: worker_environment(),
        },
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=StudyScheduler(searcher),
            num_samples=trials - study.finished(),
            max_concurrent_trials=concurrency,
        ),
        run_config=ray.tune.RunConfig(
            name=f"trials-{os.urandom(3).hex()}",  # Tune's own records; what resumes is the study
            storage_path=str(folder.resolve() / "ray"),
            verbose=0,
            # Only the loss of the trial's own process: whatever else goes wrong in it is reported with its reason.
            failure_config=ray.tune.FailureConfig(max_failures=base.workers.max_failures),
        ),
    ).fit()


def distributed_trial(config: dict[str, Any]) -> None:
    """One trial: training with DDP workers, as anywhere else."""
    os.environ.update(config[ENVIRONMENT])
    base = TrainSettings.model_validate(config[BASE])
    # A folder of its own for each life of the trial: one that begins anew is not to go on from the weights of another.
    folder = Path(ray.tune.get_context().get_trial_dir()) / os.urandom(3).hex()
    try:
        chosen = configured(base, {key: value for key, value in config.items() if key not in (BASE, ENVIRONMENT)})
        settings = chosen.model_copy(update={"checkpoints": None})  # a trial's name is Tune's own: nothing resumes it
        fit_distributed(settings, folder, callbacks=[TuneReportCallback()])
        for report in trained_epochs(folder):  # one whose worker was lost as it was reported is known only here
            ray.tune.report(report.metrics() | {FINISHED: report.finished})
    except Exception as error:
        ray.tune.report({METRIC: math.nan, "epoch": 0, FAILURE: reason_of(error), FINISHED: False, "done": True})
