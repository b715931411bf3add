"""Which parameters told good trials from bad ones, where a search has tried enough to say so.

A scheduler lets few trials complete, of few trials chance decides which parameter seems to matter, and those that it
let go on are alike in what does. So trials are compared where they all have a score: after the last epoch before many
of them were stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from emolab.tuning.trials import EPOCHS, SCHEDULE, counts

FEWEST_TRIALS = 20
"""Of fewer, a parameter that does not matter comes out first too often."""
_COMPARED = 0.9
"""Part of the trials with a score that must be compared: the few that end at once, when epochs are spent, do not
decide about all others."""
_BEST = 0.25
"""Part of the trials that count as the best ones: of 20 they are the 5 that PED-ANOVA wants at least. A tenth, Optuna's
choice, named a parameter that does not matter more often."""


@dataclass(frozen=True, kw_only=True)
class Importances:
    """How far the values of the best trials lie from those of all, parameter by parameter (PED-ANOVA)."""

    trials: int
    """That were compared."""
    epoch: int | None
    """After which they were; None: at their end."""
    shares: dict[str, float] = field(default_factory=dict)
    """Parameter -> its part of all differences, the largest first; together 1. Empty where nothing can be said."""
    reason: str = ""
    """Why nothing can be said."""

    @property
    def compared(self) -> str:
        """What was compared, in words."""
        scores = "score at the end" if self.epoch is None else f"score after epoch {self.epoch}"
        return f"{scores} of {self.trials} trial{'s' * (self.trials != 1)}"


def importances_of(trials: Sequence[FrozenTrial], *, objectives: int) -> Importances:
    """Compare the trials of a search, after the latest epoch that nearly all of them reached.

    Args:
        trials: all of them.
        objectives: with several only completed trials have scores, and the best are those near the Pareto front.
    """
    ended = [t for t in trials if counts(t) and t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    epochs = sorted({epoch for trial in ended for epoch in (*trial.intermediate_values, _length(trial))})
    points: list[int | None] = [None] if objectives > 1 else [*reversed(epochs)]
    known = [(point, found) for point in points if (found := _scored(ended, point))]
    most = max((len(found) for _, found in known), default=0)
    point, scored = next((entry for entry in known if len(entry[1]) >= _COMPARED * most), (None, []))
    if len(scored) < FEWEST_TRIALS:
        return Importances(trials=len(scored), epoch=point, reason=_too_few(len(scored), point))
    shares = _shares(scored, objectives=objectives)
    reason = "" if shares else "The trials' scores, or the parameters, are too much alike to tell which one matters."
    return Importances(trials=len(scored), epoch=point, shares=shares, reason=reason)


def _scored(trials: Sequence[FrozenTrial], epoch: int | None) -> list[tuple[FrozenTrial, list[float]]]:
    """The trials that have scores after an epoch, with them."""
    found = [(trial, _scores(trial, epoch)) for trial in trials]
    return [(trial, scores) for trial, scores in found if scores and all(map(math.isfinite, scores))]


def _scores(trial: FrozenTrial, epoch: int | None) -> list[float]:
    """Scores of a trial after an epoch (None: its final ones); empty where it has none. What has completed keeps its
    score, and one that took over another's parameters has one for its own only before that."""
    if epoch is None:
        return trial.values or []
    changes = trial.user_attrs.get(SCHEDULE, [])[1:]
    if changes and epoch >= changes[0]["epoch"]:
        return []
    if epoch in trial.intermediate_values:
        return [trial.intermediate_values[epoch]]
    completed = trial.state == TrialState.COMPLETE  # one that was stopped has a final value too: its last report
    return trial.values[:1] if completed and epoch >= _length(trial) else []


def _length(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(EPOCHS, 0))


def _too_few(trials: int, epoch: int | None) -> str:
    where = "" if epoch is None else f" after the same epoch ({epoch})"
    have = "trial has a score" if trials == 1 else "trials have scores"
    return (
        f"{trials} {have} that can be compared{where}; it takes {FEWEST_TRIALS} to tell which parameter matters: "
        "of fewer, chance decides which one seems to."
    )


def _shares(scored: Sequence[tuple[FrozenTrial, list[float]]], *, objectives: int) -> dict[str, float]:
    parameters = list(dict.fromkeys(name for trial, _ in scored for name in trial.distributions))
    if len(parameters) < 2:
        return {}
    study = optuna.create_study(directions=[StudyDirection.MAXIMIZE] * objectives)
    study.add_trials(
        [create_trial(values=scores, params=t.params, distributions=t.distributions) for t, scores in scored]
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=_BEST)
    try:
        with warnings.catch_warnings():
            # Where all scores are equal Optuna warns, and then says that all parameters are alike.
            warnings.filterwarnings("error", message="Target and region quantiles select the same set")
            warnings.filterwarnings("ignore", message="Some regimes for parameter")
            return get_param_importances(study, evaluator=evaluator, params=parameters)
    except UserWarning:
        return {}
