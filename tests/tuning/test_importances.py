"""Which parameter mattered is said where there are trials enough to tell, and of the score that was compared."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from emolab.tuning.importances import FEWEST_TRIALS, importances_of
from emolab.tuning.methods import make_pruner
from emolab.tuning.space import SearchSpace
from emolab.tuning.trials import EPOCHS, SCHEDULE

SPACE = SearchSpace.model_validate(
    {
        "parameters": {
            "training.kl_weight": {"distribution": "float", "low": 0.001, "high": 1.0, "log": True},
            "training.learning_rate": {"distribution": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5, "step": 0.05},
        }
    }
)


def quality(parameters: dict[str, Any]) -> float:
    """The learning rate alone matters."""
    return -((math.log10(parameters["training.learning_rate"]) + 3.0) ** 2)


def searched(count: int, *, seed: int, noise: float = 0.0, scheduler: str = "asha") -> list[FrozenTrial]:
    """Trials of up to nine epochs, stopped by a scheduler."""
    pruner = make_pruner(scheduler, grace=1, factor=3, epochs=9)  # pyright: ignore[reportArgumentType]
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=seed), pruner=pruner)
    luck = np.random.default_rng(seed)
    for _ in range(count):
        trial = study.ask()
        final = quality(SPACE.draw(trial)) + noise * luck.normal()
        for epoch in range(1, 10):
            trial.report(final - 1.0 / epoch, epoch)
            trial.set_user_attr(EPOCHS, epoch)
            if epoch in (1, 3) and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, final - 1.0 / 9)
    return study.trials


def test_the_parameter_that_matters_comes_first_although_few_trials_complete() -> None:
    first = []
    for seed in range(12):
        trials = searched(40, seed=seed, noise=0.1)
        assert sum(trial.state == TrialState.COMPLETE for trial in trials) < FEWEST_TRIALS
        first.append(next(iter(importances_of(trials, objectives=1).shares)))
    assert first.count("training.learning_rate") >= 10  # of 12; by the trials that completed it is none


def test_too_few_trials_tell_nothing_and_say_so() -> None:
    found = importances_of(searched(FEWEST_TRIALS - 1, seed=0), objectives=1)
    assert found.shares == {}
    assert found.reason.startswith("19 trials have scores that can be compared after the same epoch (1); it takes 20")
    assert importances_of([], objectives=1).reason.startswith("0 trials")
    enough = importances_of(searched(FEWEST_TRIALS, seed=0), objectives=1)
    assert enough.reason == ""
    assert sum(enough.shares.values()) == pytest.approx(1.0)


def test_the_latest_epoch_counts_that_nearly_all_trials_reached() -> None:
    """Those that a scheduler let go on are alike in the parameters that matter."""
    trials = searched(70, seed=0)
    assert sum(3 in trial.intermediate_values for trial in trials) >= FEWEST_TRIALS
    assert importances_of(trials, objectives=1).compared == "score after epoch 1 of 70 trials"
    unstopped = searched(30, seed=0, scheduler="none")
    assert importances_of(unstopped, objectives=1).compared == "score after epoch 9 of 30 trials"
    for trial in unstopped[:3]:  # the epochs were spent
        trial.state = TrialState.PRUNED
        trial.intermediate_values = {1: trial.intermediate_values[1]}
    assert importances_of(unstopped, objectives=1).compared == "score after epoch 9 of 27 trials"


def test_a_trial_that_completed_early_keeps_its_score() -> None:
    trials = searched(25, seed=0, scheduler="none")
    for trial in trials[:10]:  # validation stopped them
        for epoch in range(4, 10):
            del trial.intermediate_values[epoch]
        trial.user_attrs[EPOCHS] = 3
    assert importances_of(trials, objectives=1).compared == "score after epoch 9 of 25 trials"
    trials[0].state, trials[0].values = TrialState.PRUNED, None
    assert importances_of(trials, objectives=1).compared == "score after epoch 9 of 24 trials"


def changed(trials: Sequence[FrozenTrial], count: int) -> None:
    """That many members of a population took over another one's parameters after epoch 3."""
    for trial in trials:
        own = {"epoch": 1, "descends_from": trial.number, "parameters": dict(trial.params)}
        trial.user_attrs[SCHEDULE] = [own, own | {"epoch": 4}] if trial.number < count else [own]


@pytest.mark.parametrize(("count", "compared"), [(0, "9 of 30"), (3, "9 of 27"), (4, "3 of 30")])
def test_a_member_of_a_population_speaks_for_its_own_parameters_only(count: int, compared: str) -> None:
    trials = searched(30, seed=0, scheduler="none")
    changed(trials, count)
    assert importances_of(trials, objectives=1).compared == f"score after epoch {compared} trials"


def two_objectives(count: int) -> list[FrozenTrial]:
    study = optuna.create_study(directions=["maximize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial = study.ask()
        value = quality(SPACE.draw(trial))
        study.tell(trial, [value, 2.0 * value])
    return study.trials


def test_with_two_objectives_the_trials_that_ended_are_compared() -> None:
    found = importances_of(two_objectives(25), objectives=2)
    assert found.compared == "score at the end of 25 trials"
    assert next(iter(found.shares)) == "training.learning_rate"
    assert importances_of(two_objectives(19), objectives=2).reason.startswith(
        "19 trials have scores that can be compared; it takes 20"
    )


def all_alike(trials: Sequence[FrozenTrial]) -> None:
    for trial in trials:
        trial.intermediate_values = dict.fromkeys(trial.intermediate_values, 0.5)
        trial.values = [0.5]


def one_parameter(trials: Sequence[FrozenTrial]) -> None:
    for trial in trials:
        del trial.params["model.dropout"], trial.params["training.kl_weight"]
        del trial.distributions["model.dropout"], trial.distributions["training.kl_weight"]


@pytest.mark.parametrize("change", [all_alike, one_parameter])
def test_where_nothing_differs_no_parameter_is_called_important(
    change: Callable[[Sequence[FrozenTrial]], None],
) -> None:
    trials = searched(25, seed=0, scheduler="none")
    change(trials)
    found = importances_of(trials, objectives=1)
    assert found.shares == {}
    assert "too much alike" in found.reason


def test_a_parameter_that_only_some_trials_have_is_compared_too() -> None:
    space = SearchSpace.model_validate(
        {
            "parameters": {
                "model.name": {"distribution": "categorical", "choices": ["late_fusion", "mult"]},
                "model.layers": {"distribution": "int", "low": 1, "high": 4},
                "model.attention_dropout": {
                    "distribution": "float", "low": 0.0, "high": 0.3, "when": {"model.name": ["mult"]},
                },
            }
        }
    )  # fmt: skip
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        drawn = space.draw(trial)
        study.tell(trial, float(drawn["model.layers"]))
    found = importances_of(study.trials, objectives=1)
    assert set(found.shares) == set(space.parameters)
    assert next(iter(found.shares)) == "model.layers"
