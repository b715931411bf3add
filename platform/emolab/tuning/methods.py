"""Samplers and schedulers by name: Optuna's own, and the combinations that cannot work."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from emolab.names import UserError
from emolab.training.recipe import TrainingSettings
from emolab.tuning.space import SHAPE_FREE, CategoricalParameter, SearchSpace

Sampler = Literal["tpe", "gp", "cmaes", "random", "grid"]
Scheduler = Literal["asha", "halving", "hyperband", "median", "none", "pbt"]

STARTUP_TRIALS = 10
"""Trials drawn at random before TPE and Gaussian processes learn."""
_CMAES_SOURCES = 10
"""Trials of which CMA-ES can take the best tenth to begin with."""
_LARGEST_GRID = 100_000
"""Points; Optuna writes all of them down before the first is drawn."""
_STARTUP = 4
"""Trials that the median scheduler lets run to their end before it stops one."""
_MEMBERS = 4
"""Of the smallest population, of which the weakest goes on from the strongest."""


def make_sampler(
    name: Sampler,
    *,
    seed: int,
    space: SearchSpace,
    startup: int = STARTUP_TRIALS,
    pruning: bool = False,
    earlier: Sequence[FrozenTrial] = (),
) -> BaseSampler:
    """A sampler that draws the same configurations for the same seed and the same earlier trials.

    Args:
        startup: trials drawn at random before TPE and Gaussian processes learn.
        pruning: whether trials may be stopped early.
        earlier: trials of the study that ended before this process began.
    """
    seed = (seed + 1_000_003 * len(earlier)) % 2**32  # a resumed search must not draw again what was drawn before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return RandomSampler(seed=seed)
        if name == "grid":
            return AskedGrid(space.grid())  # its own seed stays: it decides which point has which number
        if name == "gp":
            # It warns that greenlet is missing, with which a draw takes 0.13 s of a CPU in place of 0.28 s: too little
            # beside a trial for a dependency, and nothing that people could do about.
            logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)
            return GPSampler(seed=seed, n_startup_trials=startup)
        if name == "cmaes":
            return _cmaes(seed, pruning, earlier)
        return TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, group=space.conditional, constant_liar=True
        )


class AskedGrid(GridSampler):
    """The grid for a study that is asked: Optuna's would end the study's own loop after the last point, and the
    study has none."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Nothing: whoever asks knows how many points there are."""


def _cmaes(seed: int, pruning: bool, earlier: Sequence[FrozenTrial]) -> CmaEsSampler:
    """A resumed search begins with the distribution that its finished trials suggest: CMA-ES's own state would have
    to be kept as a pickle."""
    learnt = (TrialState.COMPLETE, TrialState.PRUNED) if pruning else (TrialState.COMPLETE,)
    sources = [_numbers_of(trial) for trial in earlier if trial.state in learnt and trial.values]
    return CmaEsSampler(
        seed=seed,
        warn_independent_sampling=False,
        consider_pruned_trials=pruning,
        source_trials=sources if len(sources) >= _CMAES_SOURCES else None,
    )


def _numbers_of(trial: FrozenTrial) -> FrozenTrial:
    """What CMA-ES draws of a trial: it takes no trial for a source that has parameters beside those."""
    drawn = {
        key: kind
        for key, kind in trial.distributions.items()
        if not isinstance(kind, CategoricalDistribution) and not kind.single()
    }
    parameters = {key: trial.params[key] for key in drawn}
    return create_trial(state=trial.state, values=trial.values, params=parameters, distributions=drawn)


def make_pruner(scheduler: Scheduler, *, grace: int, factor: int, epochs: int) -> BasePruner:
    """Who decides that a trial stops before its end; with halving the driver of the trials does.

    Args:
        grace: epochs before the first decision.
        factor: one trial in so many goes on at each rung.
        epochs: of a trial that is never stopped.
    """
    if scheduler == "asha":
        return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=factor)
    if scheduler == "hyperband":
        return HyperbandPruner(min_resource=grace, max_resource=epochs, reduction_factor=factor)
    if scheduler == "median":
        return MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=grace)
    return NopPruner()


def rungs(scheduler: Scheduler, *, grace: int, factor: int, epochs: int) -> list[int]:
    """The epochs after which a trial may be stopped, in order."""
    if scheduler in ("asha", "halving", "hyperband"):
        steps = max(1, math.ceil(math.log(max(2, epochs)) / math.log(factor)) + 1)
        return [grace * factor**step for step in range(steps) if grace * factor**step < epochs]
    return list(range(grace, epochs)) if scheduler == "median" else []


def check_methods(
    sampler: Sampler,
    scheduler: Scheduler,
    space: SearchSpace,
    *,
    objectives: int,
    constrained: bool,
    workers: int,
    grace: int,
    factor: int,
    epochs: int,
    trials: int,
) -> None:
    """Refuse what cannot work together.

    Args:
        constrained: whether models have limits.

    Raises:
        UserError: the first such combination, and what to choose instead.
    """
    _check_sampler(sampler, space, objectives=objectives, constrained=constrained)
    if objectives > 1 and scheduler != "none":
        raise UserError(
            f"scheduler {scheduler} decides by one objective, tuning.objectives has {objectives}: leave out "
            "tuning.scheduler, or set it to none"
        )
    if scheduler != "none" and grace >= epochs:
        what = "compares no member with another" if scheduler == "pbt" else "can stop no trial"
        lower = f"set tuning.grace_epochs to at most {epochs - 1}, or " if epochs > 1 else "set "
        raise UserError(
            f"scheduler {scheduler} {what}: its first decision, after tuning.grace_epochs={grace}, is not before the "
            f"end, training.epochs={epochs}: {lower}tuning.scheduler=none"
        )
    if scheduler == "hyperband" and epochs < grace * factor:
        raise UserError(
            f"scheduler hyperband needs training.epochs of at least grace_epochs x reduction_factor = "
            f"{grace * factor}, got {epochs}: choose asha"
        )
    if scheduler == "halving" and workers > 1:
        raise UserError("scheduler halving needs trials of one worker: set workers.count=1, or choose asha")
    if scheduler == "pbt":
        _check_population(sampler, space, workers=workers, trials=trials)
    elif scheduler != "none" and sampler == "gp":
        raise UserError(
            f"sampler gp learns nothing from trials that stop or pause early, as scheduler {scheduler} has them: set "
            "tuning.scheduler=none, or choose tpe"
        )
    if scheduler == "halving" and sampler == "cmaes":
        raise UserError("sampler cmaes learns nothing from trials that pause: choose tpe or random, or asha")


def _check_sampler(sampler: Sampler, space: SearchSpace, *, objectives: int, constrained: bool) -> None:
    """Refuse what a sampler cannot draw, or could not learn from."""
    numeric = [key for key, p in space.parameters.items() if not isinstance(p, CategoricalParameter)]
    if sampler in ("gp", "cmaes", "grid") and space.conditional:
        raise UserError(f"sampler {sampler} cannot draw conditional parameters (when): choose tpe or random")
    if sampler == "cmaes" and len(numeric) < 2:
        raise UserError(f"sampler cmaes needs at least two parameters that are numbers, got {numeric}: choose tpe")
    if sampler == "cmaes" and objectives > 1:
        raise UserError("sampler cmaes takes one objective: choose tpe, gp or random")
    if sampler in ("gp", "cmaes") and constrained:
        raise UserError(
            f"sampler {sampler} does not learn from trials over a limit: choose tpe, or leave out tuning.constraints"
        )
    if sampler == "grid":
        points = math.prod(len(values) for values in space.grid().values())
        if points > _LARGEST_GRID:
            raise UserError(
                f"a grid of {points} points is larger than {_LARGEST_GRID}: take fewer values or larger steps in the "
                "space, or choose random"
            )


def check_epoch_budget(budget: int | None, training: TrainingSettings, space: SearchSpace) -> None:
    """Refuse a budget, in epochs over all trials, of which not even the first trial would see its end.

    Raises:
        UserError: it is smaller than the shortest trial there can be, whatever stops the others.
    """
    patience, selection = (space.parameters.get(f"training.{key}") for key in ("patience", "selection"))
    waits = [training.patience, *(patience.representatives() if patience is not None else ())]
    ends_early = "best" in [training.selection, *(selection.representatives() if selection is not None else ())]
    shortest = min(training.epochs, 1 + min(waits)) if ends_early else training.epochs
    if budget is not None and budget < shortest:
        raise UserError(
            f"no trial could complete: it trains for {shortest} epochs at least, tuning.epoch_budget is {budget}: set "
            f"tuning.epoch_budget to at least {training.epochs}, training.epochs of one trial"
        )


def _check_population(sampler: Sampler, space: SearchSpace, *, workers: int, trials: int) -> None:
    shaping = [key for key in space.parameters if key not in SHAPE_FREE or key == "training.seed"]
    if shaping or space.conditional:
        what = f"{', '.join(shaping)} cannot change while a model trains" if shaping else "conditional parameters"
        raise UserError(f"scheduler pbt copies weights between trials: {what}; choose asha, or another space")
    if workers > 1:
        raise UserError("scheduler pbt needs trials of one worker: set workers.count=1")
    if sampler not in ("random", "tpe"):
        raise UserError(f"scheduler pbt changes configurations itself: sampler {sampler} cannot; choose random")
    if trials < _MEMBERS:
        raise UserError(f"scheduler pbt needs a population of at least {_MEMBERS}: set tuning.trials, got {trials}")


def check_members(finished: int, trials: int) -> None:
    """Refuse to go on with a population of too few: whoever has finished is compared with nobody any more.

    Args:
        finished: trials that the study holds.
        trials: that it shall hold.

    Raises:
        UserError: some are left, but fewer than a population needs.
    """
    left = trials - finished
    if 0 < left < _MEMBERS:
        end = f", or to {finished}, with which the search is over" if finished >= _MEMBERS else ""
        raise UserError(
            f"scheduler pbt needs a population of at least {_MEMBERS}, and with {finished} finished trials "
            f"tuning.trials={trials} leaves {left}: set tuning.trials to at least {finished + _MEMBERS}{end}"
        )
