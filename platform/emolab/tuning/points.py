"""Configurations that a search tries before it draws any: known good ones, and the one it begins from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emolab.mistakes import shown
from emolab.names import UserError, nearest
from emolab.training.recipe import TrainSettings
from emolab.tuning.settings import BASE, SearchSettings
from emolab.tuning.space import SearchSpace, configured
from emolab.tuning.study import Study
from emolab.tuning.trials import TrialRecord

POINT = "point"
"""Trial attribute: which of ``tuning.points_to_evaluate`` it is, as it was given."""
_WHERE = "tuning.points_to_evaluate"


def points(tuning: SearchSettings, space: SearchSpace, base: TrainSettings) -> list[dict[str, Any]]:
    """Values of parameters for each point; what a point leaves open is drawn.

    Raises:
        UserError: a point that the space cannot draw or the configuration refuses, more points than trials, or a grid.
    """
    given = tuning.points_to_evaluate
    if given and tuning.sampler == "grid":
        raise UserError(f"{_WHERE}: a grid tries its own points alone: leave them out, or choose another sampler")
    if len(given) > tuning.trials:
        raise UserError(f"{_WHERE}: {len(given)} points for tuning.trials={tuning.trials}: raise tuning.trials")
    return [_own_values(space, base) if point == BASE else _checked(dict(point), space, base) for point in given]


def enqueue_points(tuning: SearchSettings, space: SearchSpace, base: TrainSettings, study: Study) -> None:
    """Queue the points that the study does not hold yet."""
    for given, values in zip(tuning.points_to_evaluate, points(tuning, space, base), strict=True):
        study.enqueue(values, {POINT: given})


def beside_base(records: Sequence[TrialRecord], best: TrialRecord) -> list[str]:
    """What the search found beside the configuration it began from, where that was a trial; at most one sentence."""
    own = next((record for record in records if record.labels.get(POINT) == BASE), None)
    if own is None or own.value is None or best.value is None:
        return []
    what = f"The configuration's own values (trial {own.number}) had {own.value:.4f}"
    if own.number == best.number:
        return [f"{what}: no trial was better."]
    if own.state == "PRUNED":
        then = best.curve.get(own.epochs)  # scores after different numbers of epochs are no gain
        there = "" if then is None else f"; the chosen trial had {then:.4f} there"
        return [f"{what} when they were stopped after {own.epochs} epochs{there}."]
    luck = f"part of which is luck of the best among {len(records)}"
    return [f"{what}; the chosen trial {best.value - own.value:+.4f}, {luck}."]


def _own_values(space: SearchSpace, base: TrainSettings) -> dict[str, Any]:
    """The parameters of the space as the configuration has them."""
    values: dict[str, Any] = {}
    for key, parameter in space.parameters.items():
        if space.holds(parameter, values):
            value: Any = base.model_dump(mode="json")
            for name in key.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if not parameter.contains(value):
                raise UserError(
                    f"{_WHERE}: {BASE}: the configuration's {key}={shown(value)} is not in the space: change the "
                    f"space, or leave {BASE} out"
                )
            values[key] = value
    return values


def _checked(point: dict[str, Any], space: SearchSpace, base: TrainSettings) -> dict[str, Any]:
    for key, value in point.items():
        parameter = space.parameters.get(key)
        if parameter is None:
            raise UserError(f"{_WHERE}: {key} is not in the space{nearest(key, space.parameters)}")
        if not parameter.contains(value):
            raise UserError(f"{_WHERE}: {key}={shown(value)} is not in the space")
        if not _may_hold(parameter.when, point):
            raise UserError(f"{_WHERE}: {key} is not drawn where its condition does not hold: leave it out")
    configured(base, point)
    return point


def _may_hold(when: Mapping[str, Sequence[Any]], point: Mapping[str, Any]) -> bool:
    return all(parent not in point or point[parent] in wanted for parent, wanted in when.items())
