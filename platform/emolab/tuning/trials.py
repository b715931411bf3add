"""What a study keeps of a trial, and a trial as people want to see it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial

METRIC = "kept_macro_f1"
"""Validation macro-F1 of the weights a trial would keep."""
ROBUSTNESS = "validation_robustness"
"""Area under the missing-rate curve on validation, of the same weights."""
EPOCHS = "epochs"
SECONDS = "seconds"
REASON = "reason"
INTERRUPTED = "interrupted"
PAUSED = "paused"
"""Trial attribute: the epoch at which a running trial waited last for its turn."""
CURVES = "curves"
"""Trial attribute: the metrics of every epoch, so that a tracker can be filled from the study alone."""

SCHEDULE = "schedule"
"""Trial attribute: where a population-based trial changed its parameters, the last ones last."""
REACHED = "reached"
"""Trial attribute: the epoch of a population-based trial that its value is of."""

Objective = Literal["macro_f1", "robustness"]
SPENT = "the epoch budget was spent"
OVER = "over the limit"
"""Reasons of trials that are PRUNED begin with one of these where no scheduler stopped them."""
State = Literal["COMPLETE", "PRUNED", "FAIL"]
_OWN = (EPOCHS, SECONDS, REASON, PAUSED, CURVES, SCHEDULE, REACHED)
"""Attributes of a trial that are not labels it was enqueued with."""


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
    """As they were drawn; of a population-based trial those of the epoch that its value is of."""
    reason: str
    seconds: float = 0.0
    """From the first task to the last answer."""
    curve: dict[int, float] = field(default_factory=dict)
    """Epoch -> validation macro-F1 of the weights kept by then."""
    labels: dict[str, Any] = field(default_factory=dict)
    """What the trial was enqueued with."""
    excess: dict[str, float] = field(default_factory=dict)
    """Limit -> by how much the trial's model exceeds it; negative where it stays below."""

    def measured(self, limits: Mapping[str, float]) -> dict[str, float]:
        """What was measured of the trial's model, by the name of its limit."""
        return {name: limit + self.excess[name] for name, limit in limits.items() if name in self.excess}

    @property
    def mean_objective(self) -> float:
        """Of a completed trial: the mean of its objectives."""
        values = [value for value in (self.value, self.robustness) if value is not None]
        return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A trial to run."""

    number: int
    parameters: dict[str, Any]


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial ended for a reason of its own, and so counts towards the budget."""
    return trial.state.is_finished() and trial.user_attrs.get(REASON) != INTERRUPTED


def labels_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial was enqueued with."""
    return {key: value for key, value in trial.user_attrs.items() if key not in _OWN}


def record_of(trial: FrozenTrial) -> TrialRecord:
    """A trial of Optuna's as people want to see it."""
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        value=value_of(trial),
        robustness=trial.values[1] if trial.values and len(trial.values) > 1 else None,
        epochs=int(trial.user_attrs.get(EPOCHS, 0)),
        parameters=_parameters(trial),
        reason=trial.user_attrs.get(REASON, ""),
        seconds=float(trial.user_attrs.get(SECONDS, 0.0)),
        curve=dict(sorted(trial.intermediate_values.items())),
        labels=labels_of(trial),
        excess=dict(trial.constraints),
    )


def _parameters(trial: FrozenTrial) -> dict[str, Any]:
    schedule = trial.user_attrs.get(SCHEDULE)
    if not schedule:
        return dict(trial.params)
    reached = trial.user_attrs.get(REACHED, math.inf)  # an old study has the value and the parameters of the end
    return [entry["parameters"] for entry in schedule if entry["epoch"] <= reached][-1]


def value_of(trial: FrozenTrial) -> float | None:
    """Validation macro-F1: the final one, else the last that was reported."""
    if trial.values:
        return trial.values[0]
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
