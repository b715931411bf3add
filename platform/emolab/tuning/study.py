"""The Optuna study: what was tried and how it ended; the truth from which a search resumes. It lives in SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

METRIC = "kept_macro_f1"
"""Validation macro-F1 of the weights a trial would keep."""
ROBUSTNESS = "validation_robustness"
"""Area under the missing-rate curve on validation, of the same weights."""
EPOCHS = "epochs"
REASON = "reason"
INTERRUPTED = "interrupted"

Sampler = Literal["tpe", "random"]
Objective = Literal["macro_f1", "robustness"]
RESULT_KEYS: dict[Objective, str] = {"macro_f1": METRIC, "robustness": ROBUSTNESS}


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as people want to see it."""

    number: int
    state: str
    value: float | None
    """Validation macro-F1."""
    robustness: float | None
    """Area under the missing-rate curve, where it is an objective and the trial completed."""
    epochs: int
    parameters: dict[str, Any]
    reason: str


class Study:
    """A study on disk, and the questions a search asks of it."""

    def __init__(
        self, path: Path, name: str, *, seed: int, sampler: Sampler, objectives: Sequence[Objective] = ("macro_f1",)
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.url = f"sqlite:///{path.resolve()}"
        self.storage = optuna.storages.RDBStorage(self.url)
        self._study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            directions=[optuna.study.StudyDirection.MAXIMIZE] * len(objectives),
            load_if_exists=True,
        )
        self.objectives = tuple(objectives)
        # A resumed search must not draw again what the same seed drew before.
        shifted = seed + 1_000_003 * len(self._study.trials)
        self.sampler = (
            optuna.samplers.RandomSampler(seed=shifted)
            if sampler == "random"
            else optuna.samplers.TPESampler(seed=shifted, multivariate=True, constant_liar=True)
        )

    def requeue_interrupted(self) -> int:
        """End trials that a killed search left running and queue their parameters again; returns how many."""
        interrupted = [t for t in self._study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
        for trial in interrupted:
            self.storage.set_trial_user_attr(trial._trial_id, REASON, INTERRUPTED)  # pyright: ignore[reportPrivateUsage]
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params)
        return len(interrupted)

    def finished(self) -> int:
        """Trials that count towards the budget: all that ended for a reason of their own."""
        return sum(
            trial.state.is_finished() and trial.user_attrs.get(REASON) != INTERRUPTED
            for trial in self._study.get_trials(deepcopy=False)
        )

    def records(self) -> list[TrialRecord]:
        """Every trial that counts, best first, then pruned, then failed."""
        trials = [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished() and trial.user_attrs.get(REASON) != INTERRUPTED
        ]
        order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.FAIL: 2}
        trials.sort(key=lambda trial: (order[trial.state], -(_value(trial) or 0.0), trial.number))
        return [
            TrialRecord(
                number=trial.number,
                state=trial.state.name,
                value=_value(trial),
                robustness=trial.values[1] if trial.values and len(trial.values) > 1 else None,
                epochs=int(trial.user_attrs.get(EPOCHS, 0)),
                parameters=dict(trial.params),
                reason=trial.user_attrs.get(REASON, ""),
            )
            for trial in trials
        ]

    def best(self) -> TrialRecord | None:
        """The completed trial with the best final value, with several objectives the best mean of them; None where
        none completed."""
        complete = [record for record in self.records() if record.state == "COMPLETE" and record.value is not None]
        return max(complete, key=lambda record: (_mean(record), -record.number), default=None)

    def front(self) -> list[int]:
        """Numbers of the trials that no other trial beats in every objective."""
        return sorted(trial.number for trial in self._study.best_trials)

    def importances(self) -> dict[str, float]:
        """Parameter -> share of the variation it explains; empty where there are too few trials to tell."""
        try:
            return optuna.importance.get_param_importances(self._study)
        except (ValueError, RuntimeError, ZeroDivisionError):
            return {}

    def history(self) -> Sequence[FrozenTrial]:
        """The trials in the order in which they were asked for."""
        return self._study.get_trials(deepcopy=False)


def _mean(record: TrialRecord) -> float:
    values = [value for value in (record.value, record.robustness) if value is not None]
    return sum(values) / len(values)


def _value(trial: FrozenTrial) -> float | None:
    if trial.values:
        return trial.values[0]
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
