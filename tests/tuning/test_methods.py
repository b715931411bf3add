"""Samplers and schedulers: each does what its name says, and what cannot work together is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emolab.configuration import presets, read_preset, validate
from emolab.names import UserError
from emolab.tuning.methods import check_methods, make_pruner, make_sampler, rungs
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study

FLOAT = {"distribution": "float", "low": 0.0, "high": 1.0}
STEP = FLOAT | {"step": 0.25}
CHOICE = {"distribution": "categorical", "choices": ["a", "b"]}
FINE: dict[str, Any] = {
    "objectives": 1, "workers": 1, "grace": 1, "factor": 3, "epochs": 9, "trials": 12,
}  # fmt: skip


def space(**parameters: Any) -> SearchSpace:
    """Parameters below ``training``, or with double underscores below any section."""
    named = {key.replace("__", ".") if "__" in key else f"training.{key}": value for key, value in parameters.items()}
    return SearchSpace.model_validate({"parameters": named})


@pytest.mark.parametrize(
    ("sampler", "scheduler", "parameters", "changes", "parts"),
    [
        ("grid", "none", {"kl_weight": FLOAT}, {}, ["grid", "step", "training.kl_weight"]),
        ("grid", "none", {"a": CHOICE, "b": STEP | {"when": {"training.a": ["a"]}}}, {}, ["grid", "conditional"]),
        ("cmaes", "asha", {"a": CHOICE, "b": FLOAT}, {}, ["cmaes", "two parameters"]),
        ("cmaes", "none", {"a": FLOAT, "b": FLOAT}, {"objectives": 2}, ["cmaes", "one objective"]),
        ("gp", "asha", {"a": CHOICE, "b": STEP | {"when": {"training.a": ["a"]}}}, {}, ["gp", "conditional"]),
        ("tpe", "hyperband", {"a": FLOAT}, {"epochs": 2}, ["hyperband", "training.epochs", "at least", "3"]),
        ("tpe", "asha", {"a": FLOAT}, {"grace": 9}, ["asha", "grace_epochs=9", "epochs=9", "at most 8", "=none"]),
        ("tpe", "median", {"a": FLOAT}, {"grace": 10}, ["median", "can stop no trial", "at most 8"]),
        ("tpe", "hyperband", {"a": FLOAT}, {"grace": 9}, ["hyperband", "can stop no trial", "at most 8"]),
        ("tpe", "halving", {"a": FLOAT}, {"grace": 9}, ["halving", "can stop no trial", "at most 8"]),
        ("tpe", "asha", {"a": FLOAT}, {"epochs": 1}, ["can stop no trial", "epochs=1: set tuning.scheduler=none"]),
        ("random", "pbt", {"kl_weight": FLOAT}, {"grace": 9}, ["pbt", "compares no member", "at most 8"]),
        ("gp", "halving", {"a": FLOAT}, {}, ["gp", "pause", "choose tpe"]),
        ("cmaes", "halving", {"a": FLOAT, "b": FLOAT}, {}, ["cmaes", "pause"]),
        ("tpe", "halving", {"a": FLOAT}, {"workers": 2}, ["halving", "workers.count=1"]),
        ("random", "pbt", {"model__d_model": CHOICE}, {}, ["pbt", "model.d_model"]),
        ("random", "pbt", {"seed": {"distribution": "int", "low": 0, "high": 3}}, {}, ["pbt", "training.seed"]),
        ("random", "pbt", {"kl_weight": FLOAT}, {"workers": 2}, ["pbt", "workers.count=1"]),
        ("random", "pbt", {"kl_weight": FLOAT}, {"trials": 2}, ["pbt", "tuning.trials"]),
        ("grid", "pbt", {"kl_weight": STEP}, {}, ["pbt", "grid"]),
        ("grid", "none", {str(i): FLOAT | {"step": 0.1} for i in range(9)}, {}, ["grid of", "larger than 100000"]),
        ("grid", "none", {"seed": {"distribution": "int", "low": 0, "high": 2**31 - 1}}, {}, ["grid of 2147483648"]),
    ],
)
def test_what_cannot_work_together_is_refused_in_one_line(
    sampler: Any, scheduler: Any, parameters: Any, changes: Any, parts: list[str], one_line: Callable[..., None]
) -> None:
    with pytest.raises(UserError) as error:
        check_methods(sampler, scheduler, space(**parameters), **(FINE | changes))
    one_line(error, *parts)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random", "grid"])
def test_a_sampler_draws_the_same_again_and_something_else_after_a_restart(sampler: Any, tmp_path: Path) -> None:
    """Also where it draws from a model of what was found, which begins after four of these eight trials."""
    searched = space(kl_weight=STEP, learning_rate=STEP)
    check_methods(sampler, "none", searched, **FINE)

    def draws(folder: Path, count: int) -> list[tuple[float, ...]]:
        study = Study(folder / "study.db", "s", space=searched)
        study.use_sampler(make_sampler(sampler, seed=3, space=searched, startup=4, earlier=study.history()))
        points = []
        for _ in range(count):
            draw = study.ask()
            points.append(tuple(draw.parameters.values()))
            study.report(draw.number, 1, draw.parameters["training.kl_weight"])
            study.tell(draw.number, "COMPLETE", [draw.parameters["training.kl_weight"]], epochs=1)
        study.flush()
        return points

    first, second = draws(tmp_path / "a", 8), draws(tmp_path / "b", 8)
    assert first == second
    assert len(set(first)) > 1
    if sampler == "grid":
        more = draws(tmp_path / "a", 17)
        assert sorted(first + more) == sorted({(0.25 * i, 0.25 * j) for i in range(5) for j in range(5)})
    elif sampler == "random":
        assert draws(tmp_path / "a", 8) != first


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random"])
def test_a_study_goes_on_however_many_of_its_trials_have_completed(sampler: Any, tmp_path: Path) -> None:
    """CMA-ES begins with the best tenth of what there is, and with one of three trials there is no tenth."""
    searched = space(kl_weight=FLOAT, learning_rate=FLOAT)
    for count in range(12):
        study = Study(tmp_path / "study.db", "s", space=searched)
        study.use_sampler(make_sampler(sampler, seed=2**32 - 1, space=searched, startup=4, earlier=study.history()))
        draw = study.ask()
        assert draw.number == count
        study.tell(draw.number, "COMPLETE", [draw.parameters["training.kl_weight"]], epochs=1)
        study.flush()


@pytest.mark.parametrize("name", presets())
def test_the_schedulers_of_the_presets_can_stop_trials(name: str) -> None:
    settings = validate(TuneSettings, read_preset(name, TuneSettings))
    tuning = settings.tuning
    shared = {"factor": tuning.reduction_factor, "epochs": settings.training.epochs}
    check_methods(
        tuning.sampler, tuning.scheduler, space(kl_weight=FLOAT), objectives=1, workers=1, trials=tuning.trials,
        grace=tuning.grace_epochs, **shared,
    )  # fmt: skip
    assert rungs(tuning.scheduler, grace=tuning.grace_epochs, **shared)


def test_rungs() -> None:
    assert rungs("asha", grace=1, factor=3, epochs=27) == [1, 3, 9]
    assert rungs("asha", grace=2, factor=3, epochs=12) == [2, 6]
    assert rungs("asha", grace=5, factor=3, epochs=5) == []
    assert rungs("median", grace=2, factor=3, epochs=5) == [2, 3, 4]
    assert rungs("none", grace=2, factor=3, epochs=5) == []


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "none"])
def test_a_scheduler_stops_the_weak_at_its_rungs_only_and_never_the_best(scheduler: Any, tmp_path: Path) -> None:
    """Twenty trials whose value never changes: the best is always at least as good as any before it."""
    places = rungs(scheduler, grace=1, factor=3, epochs=9)
    pruner = make_pruner(scheduler, grace=1, factor=3, epochs=9)
    searched = space(kl_weight=FLOAT)
    study = Study(tmp_path / "study.db", "s", space=searched, pruner=pruner)
    study.use_sampler(make_sampler("random", seed=0, space=searched))
    for _ in range(20):
        draw = study.ask()
        value = draw.parameters["training.kl_weight"]
        for epoch in range(1, 10):
            study.report(draw.number, epoch, value)
            if epoch in places and study.should_prune(draw.number):
                study.tell(draw.number, "PRUNED", epochs=epoch)
                break
        else:
            study.tell(draw.number, "COMPLETE", [value], epochs=9)
    records = study.records()
    best = study.best()
    assert best is not None
    assert best.value == max(record.value or 0.0 for record in records)
    stopped = [record for record in records if record.state == "PRUNED"]
    assert all(record.epochs in places for record in stopped)
    assert bool(stopped) == (scheduler != "none")
    assert study.epochs() == sum(record.epochs for record in records)
