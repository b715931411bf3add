"""Samplers and schedulers: each does what its name says, and what cannot work together is refused."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import REPOSITORY

from emolab.configuration import presets, read_preset, validate
from emolab.names import UserError
from emolab.training.recipe import TrainingSettings
from emolab.tuning.methods import check_epoch_budget, check_methods, make_pruner, make_sampler, rungs
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import Draw

FLOAT = {"distribution": "float", "low": 0.0, "high": 1.0}
STEP = FLOAT | {"step": 0.25}
CHOICE = {"distribution": "categorical", "choices": ["a", "b"]}
FINE: dict[str, Any] = {
    "objectives": 1, "constrained": False, "workers": 1, "grace": 1, "factor": 3, "epochs": 9, "trials": 12,
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
        ("gp", "halving", {"a": FLOAT}, {}, ["gp", "pause", "scheduler=none", "choose tpe"]),
        ("gp", "asha", {"a": FLOAT}, {}, ["gp", "scheduler asha", "tuning.scheduler=none", "choose tpe"]),
        ("gp", "hyperband", {"a": FLOAT}, {}, ["gp", "scheduler hyperband", "tuning.scheduler=none"]),
        ("gp", "median", {"a": FLOAT}, {}, ["gp", "scheduler median", "tuning.scheduler=none"]),
        ("gp", "none", {"a": FLOAT}, {"constrained": True}, ["gp", "over a limit", "choose tpe", "tuning.constraints"]),
        ("cmaes", "none", {"a": FLOAT, "b": FLOAT}, {"constrained": True}, ["cmaes", "over a limit", "choose tpe"]),
        ("tpe", "asha", {"a": FLOAT}, {"objectives": 2}, ["asha", "one objective", "leave out tuning.scheduler"]),
        ("tpe", "halving", {"a": FLOAT}, {"objectives": 2}, ["halving", "one objective", "leave out tuning.scheduler"]),
        ("random", "pbt", {"kl_weight": FLOAT}, {"objectives": 2}, ["pbt", "one objective", "set it to none"]),
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


@pytest.mark.parametrize(
    ("budget", "training", "parameters", "shortest"),
    [
        (11, {"epochs": 12, "patience": 12}, {}, 12),
        (4, {"epochs": 12, "patience": 4}, {}, 5),  # the first epoch was the best, and four more were waited
        (11, {"epochs": 12, "patience": 4, "selection": "last"}, {}, 12),  # which waits for nothing
        (2, {"epochs": 12, "patience": 4}, {"patience": {"distribution": "int", "low": 2, "high": 9}}, 3),
        (4, {"patience": 4, "selection": "last"}, {"selection": CHOICE | {"choices": ["best", "last"]}}, 5),
    ],
)
def test_an_epoch_budget_below_the_shortest_trial_is_refused(
    budget: int, training: Any, parameters: Any, shortest: int, one_line: Callable[..., None]
) -> None:
    chosen = TrainingSettings.model_validate(training)
    searched = space(kl_weight=FLOAT, **parameters)
    check_epoch_budget(None, chosen, searched)
    check_epoch_budget(budget + 1, chosen, searched)
    with pytest.raises(UserError) as error:
        check_epoch_budget(budget, chosen, searched)
    one_line(error, f"for {shortest} epochs at least", f"is {budget}: set tuning.epoch_budget to", f"{chosen.epochs},")


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
    else:
        assert draws(tmp_path / "a", 8) != first
        # Also where the search ended before there was anything to learn from, and all is drawn at random.
        assert draws(tmp_path / "c", 2) == first[:2]
        assert draws(tmp_path / "c", 2) != first[:2]


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


def ended(study: Study, draw: Draw, *, places: Sequence[int], epochs: int) -> float:
    """The draw's ``kl_weight``, which is the trial's value at every epoch until its end."""
    value = draw.parameters["training.kl_weight"]
    for epoch in range(1, epochs + 1):
        study.report(draw.number, epoch, value)
        if epoch in places and study.should_prune(draw.number):
            study.tell(draw.number, "PRUNED", epochs=epoch)
            return value
    study.tell(draw.number, "COMPLETE", [value], epochs=epochs)
    return value


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median", "none"])
def test_a_sampler_learns_with_every_scheduler_that_it_may_be_combined_with(
    sampler: Any, scheduler: Any, tmp_path: Path
) -> None:
    searched = space(kl_weight=FLOAT, learning_rate=FLOAT)
    try:
        check_methods(sampler, scheduler, searched, **FINE)
    except UserError:
        assert (sampler, scheduler == "none") == ("gp", False)
        return
    shared = {"grace": 1, "factor": 3, "epochs": 9}
    places = rungs(scheduler, **shared)
    study = Study(tmp_path / "study.db", "s", space=searched, pruner=make_pruner(scheduler, **shared))
    study.use_sampler(make_sampler(sampler, seed=0, space=searched, startup=8, pruning=bool(places)))
    values = [ended(study, study.ask(), places=places, epochs=9) for _ in range(20 if sampler == "gp" else 45)]
    latest = values[-len(values) // 3 :]
    assert sum(latest) / len(latest) > 0.75  # drawn at random it would be 0.5
    study.flush()


def test_gp_draws_without_a_warning_of_what_is_not_installed(tmp_path: Path) -> None:
    """In a process of its own: Optuna says it once, when the first draw from a model imports what draws."""
    code = f"""
from pathlib import Path
from emolab.tuning.methods import make_sampler
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
space = SearchSpace.model_validate({{"parameters": {{"training.kl_weight": {FLOAT}}}}})
sampler = make_sampler("gp", seed=0, space=space, startup=1)
study = Study(Path({str(tmp_path / "study.db")!r}), "s", space=space, sampler=sampler)
for _ in range(3):
    study.tell(study.ask().number, "COMPLETE", [0.5])
study.flush()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("beside", [{}, {"selection": CHOICE, "gradient_clip": {**FLOAT, "low": 1.0}}])
@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED"])
def test_cma_es_goes_on_where_the_good_trials_of_a_killed_search_were(state: Any, beside: Any, tmp_path: Path) -> None:
    """Also where a scheduler stopped them, and where there are parameters that it does not draw itself."""
    searched = space(kl_weight=FLOAT, learning_rate=FLOAT, **beside)
    study = Study(tmp_path / "study.db", "s", space=searched)
    study.use_sampler(make_sampler("random", seed=0, space=searched))
    for number in range(20):
        draw = study.ask()
        study.report(draw.number, 1, draw.parameters["training.kl_weight"])
        end = state if number else "COMPLETE"  # no scheduler stops the first
        study.tell(draw.number, end, [draw.parameters["training.kl_weight"]], epochs=1)
    study.flush()
    resumed = Study(tmp_path / "study.db", "s", space=searched)
    resumed.use_sampler(make_sampler("cmaes", seed=0, space=searched, pruning=True, earlier=resumed.history()))
    drawn = [resumed.ask().parameters["training.kl_weight"] for _ in range(6)]
    assert sum(drawn) / len(drawn) > 0.75
    resumed.flush()


@pytest.mark.parametrize("name", presets())
def test_the_schedulers_of_the_presets_can_stop_trials(name: str) -> None:
    settings = validate(TuneSettings, read_preset(name, TuneSettings))
    tuning = settings.tuning
    shared = {"factor": tuning.reduction_factor, "epochs": settings.training.epochs}
    check_methods(
        tuning.sampler, tuning.stopping, space(kl_weight=FLOAT), objectives=1, constrained=False, workers=1,
        trials=tuning.trials, grace=tuning.grace_epochs, **shared,
    )  # fmt: skip
    assert rungs(tuning.stopping, grace=tuning.grace_epochs, **shared)


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
        ended(study, study.ask(), places=places, epochs=9)
    records = study.records()
    best = study.best()
    assert best is not None
    assert best.value == max(record.value or 0.0 for record in records)
    stopped = [record for record in records if record.state == "PRUNED"]
    assert all(record.epochs in places for record in stopped)
    assert bool(stopped) == (scheduler != "none")
    assert study.epochs() == sum(record.epochs for record in records)
