"""How many epochs a search will take. A scheduler that stops trials is played through, with scores drawn at random:
the early ones meet few rivals, so that more go on than one in ``reduction_factor``, and how many depends on all."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from emolab.tuning.methods import Scheduler, make_pruner

_SIMULATIONS = 20
_DECISIONS = 4000
"""Of all simulations together, about: a few seconds."""
_MOST_TRIALS = 200
"""Of a simulated search: a larger one is taken for several of them."""
_NOISE = 0.75
"""How much a trial's score changes from one decision to the next, of how much trials differ."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """How far a search is before its next call."""

    trials: int = 0
    """That have ended."""
    epochs: int = 0
    """That these have trained, and those that pause."""
    finals: int = 0
    """Trainings of the final that have ended."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Epochs of a search."""

    mean: float
    least: float
    most: float
    simulations: int
    """None of them: the number is known."""


def known(epochs: float) -> Expected:
    """Epochs that nothing but a failure can change."""
    return Expected(mean=epochs, least=epochs, most=epochs, simulations=0)


def expected_epochs(
    scheduler: Scheduler,
    *,
    grace: int,
    factor: int,
    epochs: int,
    rungs: Sequence[int],
    trials: int,
    ended: int = 0,
    at_once: int = 1,
) -> Expected:
    """Epochs that the trials of a search take which have not ended, where no trial ends by itself before its last one.

    Args:
        grace: epochs before the first decision.
        factor: one trial in so many is to pass a rung.
        epochs: of a trial that is never stopped.
        rungs: epochs after which the scheduler is asked.
        trials: of the whole search.
        ended: how many of these have ended.
        at_once: how many train at the same time.
    """
    left = max(0, trials - ended)
    if not rungs or not left:
        return known(left * epochs)
    most = max(10, min(_MOST_TRIALS, _DECISIONS // len(rungs)))
    count = min(trials, most)
    share = count / trials
    before, at_once = min(round(ended * share), count - 1), max(1, round(at_once * share))
    simulations = max(3, min(_SIMULATIONS, _DECISIONS // (count * len(rungs))))
    taken = [
        _played(
            make_pruner(scheduler, grace=grace, factor=factor, epochs=epochs),
            [*rungs, epochs], trials=count, ended=before, at_once=at_once, seed=seed,
        ) * left / (count - before)
        for seed in range(simulations)
    ]  # fmt: skip
    return Expected(mean=statistics.fmean(taken), least=min(taken), most=max(taken), simulations=simulations)


def _played(pruner: BasePruner, places: Sequence[int], *, trials: int, ended: int, at_once: int, seed: int) -> int:
    """Epochs of the trials after the first ``ended`` ones in one search that is played through.

    Args:
        places: the epochs after which the pruner is asked, and the last one.
    """
    generator = np.random.default_rng(seed)
    study = optuna.create_study(
        direction="maximize",
        study_name=f"played-{seed}",  # hyperband deals its brackets by this name
        pruner=pruner,
        sampler=RandomSampler(seed=seed),
    )
    running: list[tuple[int, int, int]] = []
    """When a trial comes to its next place, its number, and which place that is."""
    asked: list[tuple[optuna.Trial, float]] = []
    taken = 0

    def begin(now: int) -> None:
        if len(asked) < trials:
            heapq.heappush(running, (now + places[0], len(asked), 0))
            asked.append((study.ask(), float(generator.normal())))

    for _ in range(at_once):
        begin(0)
    while running:
        now, number, place = heapq.heappop(running)
        trial, ability = asked[number]
        trial.report(ability + _NOISE * float(generator.normal()), places[place])
        over = place == len(places) - 1
        if not over and not trial.should_prune():
            heapq.heappush(running, (now + places[place + 1] - places[place], number, place + 1))
            continue
        study.tell(trial, ability if over else None, state=TrialState.COMPLETE if over else TrialState.PRUNED)
        taken += places[place] if number >= ended else 0
        begin(now)
    return taken
