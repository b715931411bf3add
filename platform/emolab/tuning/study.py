"""The Optuna study: what was tried and how it ended; the truth from which a search resumes. It lives in SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

METRIC = "validation_macro_f1"
REASON = "reason"
INTERRUPTED = "interrupted"

Sampler = Literal["tpe", "random"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as people want to see it."""

    number: int
    state: str
    value: float | None
    epochs: int
    parameters: dict[str, Any]
    reason: str


class Study:
    """A study on disk, and the questions a search asks of it."""

    def __init__(self, path: Path, name: str, *, seed: int, sampler: Sampler) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.url = f"sqlite:///{path.resolve()}"
        self.storage = optuna.storages.RDBStorage(self.url)
        self._study = optuna.create_study(
            storage=self.storage, study_name=name, direction="maximize", load_if_exists=True
        )
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
                epochs=max(trial.intermediate_values, default=0),
                parameters=dict(trial.params),
                reason=trial.user_attrs.get(REASON, ""),
            )
            for trial in trials
        ]

    def best(self) -> TrialRecord | None:
        """The completed trial with the best final value; None where none completed."""
        return next((record for record in self.records() if record.state == "COMPLETE"), None)

    def importances(self) -> dict[str, float]:
        """Parameter -> share of the variation it explains; empty where there are too few trials to tell."""
        try:
            return optuna.importance.get_param_importances(self._study)
        except (ValueError, RuntimeError, ZeroDivisionError):
            return {}

    def history(self) -> Sequence[FrozenTrial]:
        """The trials in the order in which they were asked for."""
        return self._study.get_trials(deepcopy=False)


def _value(trial: FrozenTrial) -> float | None:
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
