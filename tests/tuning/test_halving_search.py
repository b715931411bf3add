"""Searches whose trials pause and go on, on a real cluster."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tuning.packs import CountingPack, DyingPack
from tests.tuning.test_halving import in_rounds
from tests.tuning.test_search import HARMLESS, started_driver, study_of, tracker_of, tune_settings

from emolab.names import UserError
from emolab.tracking.tracker import NoTracker
from emolab.tuning import processes
from emolab.tuning.plan import plan_search
from emolab.tuning.search import SearchResult, search
from emolab.tuning.settings import TuneSettings

pytestmark = [pytest.mark.slow, pytest.mark.ray]
RUNGS = [1, 3, 9]


def halving(data: Path, folder: Path, **tuning: Any) -> TuneSettings:
    """12 trials of at most 12 epochs; 4, 1 and 1 go on."""
    chosen = {"trials": 12, "scheduler": "halving", "sampler": "random"} | tuning
    settings = tune_settings(data, folder, **chosen)
    (folder / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    longer = {"epochs": 12, "patience": 12, "decay_epochs": ()}
    return settings.model_copy(update={"training": settings.training.model_copy(update=longer)})


def story(result: SearchResult) -> list[tuple[Any, ...]]:
    """What became of each trial."""
    records = sorted(result.records, key=lambda record: record.number)
    return [(r.number, r.parameters, r.state, r.epochs, r.curve, r.reason) for r in records]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(halving(toy_data, tmp_path_factory.mktemp("halving")), NoTracker())


@pytest.mark.scenario
def test_the_best_third_goes_on_from_each_rung_and_optuna_is_told_so(
    undisturbed: SearchResult, toy_data: Path, tmp_path: Path
) -> None:
    told = study_of(undisturbed.folder / "study.db")
    assert [t.number for t in told] == list(range(12))
    assert sorted(len(t.intermediate_values) for t in told) == [1] * 8 + [3] * 3 + [12]
    assert [t.state.name for t in told if len(t.intermediate_values) < 12] == ["PRUNED"] * 11
    full = search(halving(toy_data, tmp_path, scheduler="none"), NoTracker())
    curves = {r.number: list(r.curve.values()) for r in full.records}
    expected = in_rounds([curves[number] for number in range(12)], RUNGS, 3)
    assert [len(t.intermediate_values) for t in told] == expected
    for trial in told:  # paused and gone on, or at one go: the same training
        assert list(trial.intermediate_values.values()) == curves[trial.number][: expected[trial.number]]
    assert not list((undisturbed.folder / "paused").iterdir())


def trained(settings: TuneSettings) -> list[tuple[int, ...]]:
    lines = (Path(settings.output) / "trained").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]


def test_the_same_trials_go_on_whatever_the_number_of_processes(
    undisturbed: SearchResult, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TrialPack", CountingPack)
    settings = halving(toy_data, tmp_path, concurrency=2)
    result = search(settings, NoTracker())
    assert story(result) == story(undisturbed)
    assert len(trained(settings)) == len(set(trained(settings))) == result.study.epochs() == 12 + 4 * 2 + 6 + 3


@pytest.mark.fault
def test_a_killed_search_goes_on_from_its_paused_trials(
    undisturbed: SearchResult, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the driver once a trial has gone on from the first rung: nothing that paused is trained again, save
    one trial whose checkpoints are gone; it ends as it would have."""
    settings = halving(toy_data, tmp_path)
    driver = started_driver(settings)
    assert driver.stdout is not None
    try:
        driver.stdout.readline()  # of the first trial that can never go on
        wait_until_one_goes_on(tmp_path / "runs" / "search" / "study.db")
    finally:
        driver.kill()
        driver.wait()
    running = [t for t in study_of(tmp_path / "runs" / "search" / "study.db") if t.state.name == "RUNNING"]
    paused = {t.number: t.user_attrs["paused"] for t in running if "paused" in t.user_attrs}
    assert len(paused) > 1
    shutil.rmtree(next((tmp_path / "runs" / "search" / "paused").glob(f"trial-{undisturbed.best.number:05d}-*")))
    monkeypatch.setattr(processes, "TrialPack", CountingPack)
    tracker = tracker_of(settings)
    lines: list[str] = []
    result = search(settings, tracker, report=lines.append)
    assert any("go on from where they paused" in line for line in lines)
    assert story(result) == story(undisturbed)
    assert {number for number, epoch in trained(settings) if epoch <= paused.get(number, 0)} == {
        undisturbed.best.number
    }
    runs = [tracker.client.get_run(run_id) for run_id in tracker.children(result.run_id)]
    assert sorted(int(run.data.tags["emolab.trial"]) for run in runs) == list(range(12))
    assert {run.info.status for run in runs} == {"FINISHED"}
    history = tracker.client.get_metric_history(
        next(r.info.run_id for r in runs if r.data.tags["emolab.trial"] == str(result.best.number)), "kept_macro_f1"
    )
    assert [point.step for point in history] == list(range(1, 13))


def wait_until_one_goes_on(path: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(len(t.intermediate_values) > 1 for t in study_of(path)):
            return
        time.sleep(0.02)
    raise AssertionError("no trial went on from the first rung")


@pytest.mark.fault
def test_a_lost_process_costs_no_trial_that_had_paused(
    undisturbed: SearchResult, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "TrialPack", DyingPack)
    settings = halving(toy_data, tmp_path)
    result = search(settings, NoTracker())
    assert (tmp_path / "runs" / "died").exists()
    assert story(result) == story(undisturbed)


def test_a_budget_that_no_trial_would_survive_is_refused(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    assert plan_search(halving(toy_data, tmp_path, epoch_budget=29)).rungs == RUNGS
    with pytest.raises(UserError, match=r"12 trials takes 29 epochs, .*28: set tuning.trials=11"):
        plan_search(halving(toy_data, tmp_path, epoch_budget=28))
    with pytest.raises(UserError, match=r"budget is 5: set tuning.epoch_budget to at least 12"):
        plan_search(halving(toy_data, tmp_path, epoch_budget=5))
