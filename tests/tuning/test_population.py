"""A population: whom a member goes on from, what it changes, and what the study says of it."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import optuna
import pytest
import yaml
from ray.tune.experiment import Trial
from tests.tuning.test_search import population_settings, study_of

from emolab.names import UserError
from emolab.tracking.tracker import NoTracker
from emolab.tuning import population
from emolab.tuning.methods import check_members
from emolab.tuning.population import (
    DRAWN,
    NUMBER,
    ORIGIN,
    SCORE,
    PopulationRecorder,
    PopulationTrial,
    SynchronousPopulation,
    mutations,
    within,
)
from emolab.tuning.recorder import TrialRecorder
from emolab.tuning.search import SearchResult, search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import METRIC
from emolab.tuning.workers import BASE

RATE = "training.learning_rate"
RATES = SearchSpace.model_validate({"parameters": {RATE: {"distribution": "float", "low": 0.0, "high": 1.0}}})


def scheduler(space: SearchSpace, **options: Any) -> SynchronousPopulation:
    return SynchronousPopulation(
        perturbation_interval=1, seed=0, hyperparam_mutations=mutations(space),
        custom_explore_fn=lambda config: within(space, config), **options,
    )  # fmt: skip


def changed(space: SearchSpace, parameters: dict[str, Any], times: int, **options: Any) -> list[dict[str, Any]]:
    """What members have that go on from one with these parameters."""
    compared, member = scheduler(space, **options), cast(Trial, SimpleNamespace(config=parameters))
    return [compared._get_new_config(member, member)[0] for _ in range(times)]


def test_what_a_member_changes_lies_in_the_space() -> None:
    """Whole numbers, steps and logarithmic ranges, of few values and of many."""
    wide = {"distribution": "int", "low": 3, "high": 99_998}
    distributions: dict[str, Any] = {
        "training.gradient_clip": {"distribution": "int", "low": 1, "high": 5},
        "training.kl_weight": wide | {"step": 7},
        "training.weight_decay": wide | {"log": True},
        "model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5, "step": 0.05},
        "training.feature_noise": {"distribution": "float", "low": 0.0, "high": 1.0, "step": 0.001},
        RATE: {"distribution": "float", "low": 1e-5, "high": 1e-2, "log": True},
        "training.modality_dropout": {"distribution": "categorical", "choices": [0.0, 0.1, 0.5]},
    }
    space = SearchSpace.model_validate({"parameters": distributions})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        drawn = within(space, space.draw(study.ask()))
        for parameters in (drawn, *changed(space, drawn, 20)):
            assert list(parameters) == list(distributions)
            for key, value in parameters.items():
                values = space.parameters[key].values()
                assert value in values if values is not None else 1e-5 <= value <= 1e-2, (key, value)
                assert isinstance(value, int) == (distributions[key]["distribution"] == "int"), (key, value)


def test_a_member_that_began_between_two_steps_of_a_list_takes_a_neighbour_there() -> None:
    """Optuna draws 0.30000000000000004 where the list has 0.3."""
    space = SearchSpace.model_validate(
        {"parameters": {"model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5, "step": 0.1}}}
    )
    drawn = within(space, {"model.dropout": 0.1 + 0.2})
    neighbours = {change["model.dropout"] for change in changed(space, drawn, 30, resample_probability=0.0)}
    assert neighbours == {0.2, 0.4}


@pytest.mark.parametrize(("finished", "trials"), [(0, 4), (4, 4), (9, 8), (4, 8)])
def test_a_population_goes_on_with_enough_members_or_with_none(finished: int, trials: int) -> None:
    check_members(finished, trials)


@pytest.mark.parametrize(
    ("finished", "trials", "advice"),
    [
        (8, 9, "leaves 1: set tuning.trials to at least 12, or to 8, with which the search is over"),
        (3, 6, "leaves 3: set tuning.trials to at least 7"),
    ],
)
def test_too_few_members_are_refused(finished: int, trials: int, advice: str, one_line: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        check_members(finished, trials)
    one_line(error, "scheduler pbt", "at least 4")
    assert str(error.value).endswith(advice)


class Told:
    """A study that is told of members by hand."""

    def __init__(self, folder: Path, selection: Literal["best", "last"]) -> None:
        self.study = Study(folder / "study.db", "s", space=RATES)
        self.study.use_sampler(optuna.samplers.RandomSampler(seed=0))
        self.lines: list[str] = []
        tracked = TrialRecorder(NoTracker(), "")
        self.recorder = PopulationRecorder(
            self.study, tracked, [RATE], self.lines.append, interval=2, selection=selection
        )
        self.members: list[Any] = [
            SimpleNamespace(trial_id=str(number), config={NUMBER: self.study.ask().number}) for number in range(2)
        ]
        for member in self.members:
            self.recorder.on_trial_start(0, self.members, member)

    def epoch(self, number: int, epoch: int, score: float, *, kept: float, rate: float, origin: int) -> None:
        result = {"epoch": epoch, SCORE: score, METRIC: kept, DRAWN: {RATE: rate}, ORIGIN: origin}
        self.members[number].last_result = result
        self.recorder.on_trial_result(0, self.members, self.members[number], result)

    def ended(self) -> None:
        for member in self.members:
            self.recorder.on_trial_complete(0, self.members, member)


def ruined(folder: Path, selection: Literal["best", "last"]) -> Told:
    """Member 1 goes on from member 0's weights at epoch 2, and is ruined by the rate that it tries with them."""
    told = Told(folder, selection)
    for epoch, score in ((1, 0.5), (2, 0.7), (3, 0.71), (4, 0.65)):
        told.epoch(0, epoch, score, kept=max(score, 0.5), rate=0.25, origin=0)
    for epoch, score in ((1, 0.2), (2, 0.3)):
        told.epoch(1, epoch, score, kept=score, rate=0.5, origin=1)
    for epoch in (3, 4):
        told.epoch(1, epoch, 0.1, kept=0.7, rate=0.75, origin=0)
    told.ended()
    return told


def test_the_value_of_a_member_is_the_best_of_its_own_epochs_with_their_parameters(tmp_path: Path) -> None:
    told = ruined(tmp_path, "best")
    first, second = told.study.record(0), told.study.record(1)
    assert (first.value, first.parameters) == (0.71, {RATE: 0.25})
    assert (second.value, second.parameters) == (0.3, {RATE: 0.5})
    assert second.curve == {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.3}
    assert [point[METRIC] for point in told.study.curves(1)] == [0.2, 0.3, 0.3, 0.3]
    assert [point[SCORE] for point in told.study.curves(1)] == [0.2, 0.3, 0.1, 0.1]
    assert told.study.history()[1].user_attrs["schedule"][-1]["parameters"] == {RATE: 0.75}
    assert second.labels == {}
    assert told.lines[1] == "epoch 4 of 2 members: validation macro-F1 0.1000 to 0.6500 (trial 0)"
    again = Study(tmp_path / "study.db", "s", space=RATES)
    assert again.records() == told.study.records()


def test_the_value_of_a_member_is_that_of_its_last_epoch_where_the_recipe_keeps_the_last(tmp_path: Path) -> None:
    told = ruined(tmp_path, "last")
    first, second = told.study.record(0), told.study.record(1)
    assert (first.value, first.parameters) == (0.65, {RATE: 0.25})
    assert (second.value, second.parameters) == (0.1, {RATE: 0.75})


def test_an_epoch_that_is_trained_again_is_known_once(tmp_path: Path) -> None:
    """A process that stands in for a lost one begins at the last comparison."""
    told = Told(tmp_path, "best")
    for epoch, score in ((1, 0.5), (2, 0.7), (3, 0.6), (3, 0.6), (4, 0.8)):
        told.epoch(0, epoch, score, kept=score, rate=0.25, origin=0)
    told.epoch(1, 1, 0.2, kept=0.2, rate=0.5, origin=1)
    told.ended()
    assert [point["epoch"] for point in told.study.curves(0)] == [1, 2, 3, 4]
    assert (told.study.record(0).epochs, told.study.record(0).value) == (4, 0.8)


def test_a_member_whose_process_was_lost_is_compared_with_the_others_when_they_are() -> None:
    """Tune takes it up a second time, and would compare it after its next epoch."""
    compared, member, controller = scheduler(RATES), Trial("stub", stub=True), SimpleNamespace(search_alg=None)
    compared.on_trial_add(controller, member)
    compared._save_trial_state(compared._trial_state[member], 4, {SCORE: 0.7}, member)
    compared.on_trial_add(controller, member)
    assert (compared._trial_state[member].last_train_time, compared._trial_state[member].last_score) == (4, 0.7)


def settings_of(data: Path, folder: Path, **tuning: Any) -> TuneSettings:
    """Four members, compared after epochs 2 and 4, of which the larger rate ruins those that it meets."""
    folder.mkdir(exist_ok=True)
    settings = population_settings(data, folder, **{"grace_epochs": 2} | tuning)
    rates = {"distribution": "categorical", "choices": [0.03, 3.0]}
    (folder / "space.yaml").write_text(yaml.safe_dump({"parameters": {RATE: rates}}))
    return settings


@pytest.mark.slow
@pytest.mark.ray
def test_a_member_that_ruins_the_weights_it_took_is_weaker_than_the_one_it_took_them_from(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    """Though the best score of its line, which its checkpoint holds, is still that of the other."""
    base = settings_of(toy_data, tmp_path).base().model_dump(mode="json")

    def member(number: int, rate: float) -> PopulationTrial:
        return PopulationTrial({BASE: base, NUMBER: number, RATE: rate})

    strong, ruined = member(0, 0.03), member(1, 3.0)
    results = [strong.step() for _ in range(3)][-1:]
    strong.save_checkpoint(str(tmp_path / "taken"))
    ruined.load_checkpoint(str(tmp_path / "taken"))
    results.append(ruined.step())
    assert results[0][METRIC] == results[1][METRIC] > 2 * results[1][SCORE]
    compared = scheduler(RATES)
    trials = [Trial("stub", stub=True) for _ in results]
    for trial, result in zip(trials, results, strict=True):
        compared.on_trial_add(SimpleNamespace(search_alg=None), trial)
        compared._save_trial_state(compared._trial_state[trial], 4, result, trial)
    assert compared._quantiles() == ([trials[1]], [trials[0]])
    strong.cleanup()
    ruined.cleanup()


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(settings_of(toy_data, tmp_path_factory.mktemp("population")), NoTracker())


def schedules(result: SearchResult) -> dict[int, list[dict[str, Any]]]:
    return {trial.number: trial.user_attrs["schedule"] for trial in study_of(result.folder / "study.db")}


def at(schedule: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    """The entry of a schedule that an epoch belongs to."""
    return [entry for entry in schedule if entry["epoch"] <= epoch][-1]


@pytest.mark.slow
@pytest.mark.ray
def test_members_go_on_from_the_weights_that_are_the_best_now(undisturbed: SearchResult) -> None:
    """A ruined member has the best score of its ancestors in its checkpoint, and is weak all the same."""
    lines = schedules(undisturbed)
    scores = {n: [point[SCORE] for point in undisturbed.study.curves(n)] for n in lines}
    taken = [(n, e) for n, schedule in lines.items() for e in (3, 5) if at(schedule, e) is not at(schedule, e - 1)]
    assert taken
    for number, epoch in taken:
        best = max(member[epoch - 2] for member in scores.values())
        donors = [n for n, member in scores.items() if member[epoch - 2] == best]
        assert at(lines[number], epoch)["descends_from"] in {at(lines[n], epoch - 1)["descends_from"] for n in donors}
    for record in undisturbed.records:
        own = scores[record.number]
        assert record.value == max(own)
        assert record.parameters == at(lines[record.number], own.index(record.value) + 1)["parameters"]


@pytest.mark.slow
@pytest.mark.ray
def test_members_too_few_for_a_population_are_refused_before_they_begin(
    undisturbed: SearchResult, toy_data: Path, one_line: Callable[..., None]
) -> None:
    with pytest.raises(UserError) as error:
        search(settings_of(toy_data, undisturbed.folder.parent.parent, trials=5), NoTracker())
    one_line(error, "with 4 finished trials tuning.trials=5 leaves 1")
    assert len(study_of(undisturbed.folder / "study.db")) == 4


class MortalTrial(PopulationTrial):
    """Dies once in an epoch before it was compared, and once in one after."""

    def step(self) -> dict[str, Any]:
        result = super().step()
        flag = Path(self.config[BASE]["output"]) / f"died-{result['epoch']:g}"
        if result["epoch"] in (1, 5) and not flag.exists():
            flag.touch()
            os._exit(1)
        return result


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_process_costs_a_member_the_epochs_since_its_last_comparison(
    undisturbed: SearchResult, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(result: SearchResult) -> list[Any]:
        records = sorted(result.records, key=lambda record: record.number)
        return [(r.state, r.value, r.parameters, r.curve, schedules(result)[r.number]) for r in records]

    monkeypatch.setattr(population, "PopulationTrial", MortalTrial)
    disturbed = search(settings_of(toy_data, tmp_path), NoTracker())
    assert sorted(path.name for path in (tmp_path / "runs").glob("died-*")) == ["died-1", "died-5"]
    assert table(disturbed) == table(undisturbed)
    assert [len(disturbed.study.curves(number)) for number in range(4)] == [6] * 4


class DoomedTrial(PopulationTrial):
    """Dies whenever it comes to member 2."""

    def step(self) -> dict[str, Any]:
        if self.config[NUMBER] == 2:
            with (Path(self.config[BASE]["output"]) / "deaths").open("a") as deaths:
                deaths.write("x")
            os._exit(1)
        return super().step()


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_member_whose_process_is_always_lost_fails_and_the_others_go_on(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(toy_data, tmp_path)
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"max_failures": 1})})
    monkeypatch.setattr(population, "PopulationTrial", DoomedTrial)
    result = search(settings, NoTracker())
    assert (tmp_path / "runs" / "deaths").read_text() == "xx"
    ended = [(r.state, r.epochs, r.reason) for r in sorted(result.records, key=lambda r: r.number)]
    complete = ("COMPLETE", 6, "")
    assert ended == [complete, complete, ("FAIL", 0, "the trial's process failed"), complete]
