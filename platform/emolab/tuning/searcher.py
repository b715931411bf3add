"""Ray Tune's Optuna searcher, made to tell Optuna how a trial really ended."""

from __future__ import annotations

import math
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from emolab.tuning.study import EPOCHS, METRIC, REASON, RESULT_KEYS, Study

FAILURE = "failure"
"""Result key: why a trial could not go on."""
FINISHED = "finished"
"""Result key: whether a trial came to its own end (all epochs, or early stopping by validation)."""


class StudySearch(OptunaSearch):
    """Stock ``OptunaSearch`` records a trial stopped by the scheduler as COMPLETE with the value of a small budget,
    which misleads the sampler, and leaves one that returned NaN unfinished. Here they end as PRUNED and FAIL."""

    def __init__(self, study: Study, space: dict[str, optuna.distributions.BaseDistribution]) -> None:
        keys = [RESULT_KEYS[objective] for objective in study.objectives]
        several = len(keys) > 1
        super().__init__(
            space,
            metric=keys if several else METRIC,
            mode=["max"] * len(keys) if several else "max",
            sampler=study.sampler,
            study_name=study.name,
            storage=study.storage,
        )
        self._keys = keys
        self._reported: dict[str, int] = {}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        value, epoch = result.get(METRIC), int(result.get("epoch", 0))
        if len(self._keys) > 1:  # Optuna takes intermediate values for a single objective only
            return
        if value is not None and math.isfinite(value) and self._reported.get(trial_id) != epoch:
            self._ot_trials[trial_id].report(value, epoch)
            self._reported[trial_id] = epoch

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials or self._ot_study is None:
            return
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        result = result or {}
        reason = result.get(FAILURE) or ("the trial's process failed" if error else None)
        values = [result.get(key) for key in self._keys]
        trial.set_user_attr(EPOCHS, int(result.get("epoch", 0)))
        self.on_trial_result(trial_id, result)  # Tune passes a trial's last result here only
        if reason is not None or not result:
            trial.set_user_attr(REASON, reason or "no result was reported")
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif result.get(FINISHED):
            self._ot_study.tell(trial, [float(value) for value in values if value is not None])
        else:
            trial.set_user_attr(REASON, f"pruned after epoch {result['epoch']}")
            self._ot_study.tell(trial, state=TrialState.PRUNED)

    def number(self, trial_id: str) -> int:
        """Optuna's number of a Tune trial."""
        return self._ot_trials[trial_id].number
