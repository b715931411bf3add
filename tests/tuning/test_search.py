"""A search on a real cluster, with a real study and a real tracker."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import ray
import yaml
from ray._private.services import find_gcs_addresses
from ray.exceptions import OutOfMemoryError
from tests.conftest import REPOSITORY
from tests.docs.guides import notebook, run_section
from tests.tuning.mortal_trial import mortal_trial
from tests.tuning.packs import DrowsyPack, MortalPack, StuckPack

from emolab.names import UserError, checked_name
from emolab.tracking.beginning import write_record
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tracking.tracker import NoTracker
from emolab.tuning import forecast, packed, processes, workers
from emolab.tuning.expectation import Begun
from emolab.tuning.forecast import calibrate
from emolab.tuning.plan import plan_search, winner_name
from emolab.tuning.running import packed_plan
from emolab.tuning.search import SearchResult, search
from emolab.tuning.settings import TuneSettings

SPACE = {
    "parameters": {
        "training.learning_rate": {"distribution": "categorical", "choices": [0.01, 0.003, 1.0e30]},
        "training.kl_weight": {"distribution": "float", "low": 0.001, "high": 1.0, "log": True},
    }
}
HARMLESS = {"parameters": {"training.kl_weight": SPACE["parameters"]["training.kl_weight"]}}
"""No trial of which diverges."""


def tune_settings(data: Path, folder: Path, **tuning: object) -> TuneSettings:
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return TuneSettings.model_validate(
        {
            "data": str(data),
            "output": str(folder / "runs"),
            "name": "search",
            "model": {"d_model": 8, "layers": 1, "heads": 2, "dropout": 0.0},
            "training": {"epochs": 6, "batch_size": 8, "warmup_epochs": 0, "patience": 6},
            "tuning": {"space": str(folder / "space.yaml"), "trials": 8, "grace_epochs": 1, "concurrency": 1} | tuning,
        }
    )


def tracker_of(settings: TuneSettings) -> MLflowTracker:
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    assert isinstance(tracker, MLflowTracker)
    return tracker


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, toy_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TuneSettings, SearchResult, list[str]]]:
    """One search of eight trials, some of which must diverge."""
    settings = tune_settings(toy_data, tmp_path_factory.mktemp("search"))
    lines: list[str] = []
    yield settings, search(settings, tracker_of(settings), report=lines.append), lines


Finished = tuple[TuneSettings, SearchResult, list[str]]


@pytest.mark.slow
@pytest.mark.ray
def test_every_trial_ends_in_one_state_and_a_diverging_one_does_not_stop_the_rest(finished: Finished) -> None:
    _, result, lines = finished
    assert len(result.records) == 8
    assert sorted(r.number for r in result.records) == list(range(8))
    failed = [r for r in result.records if r.parameters["training.learning_rate"] == 1e30]
    assert failed
    for record in result.records:
        if record in failed:
            assert record.state == "FAIL"
            assert "non-finite loss at epoch 1, step 2" in record.reason
        else:
            assert record.state in ("COMPLETE", "PRUNED")
            assert record.value is not None
            assert (record.epochs == 6) == (record.state == "COMPLETE")
    assert sum("non-finite" in line for line in lines) == len(failed)
    assert result.best.value == max(r.value for r in result.records if r.state == "COMPLETE" and r.value is not None)


@pytest.mark.slow
@pytest.mark.ray
def test_the_tracker_holds_every_trial_once_below_the_search(finished: Finished) -> None:
    settings, result, _ = finished
    tracker = tracker_of(settings)
    parent = tracker.client.get_run(result.run_id).data  # so that two searches can be compared on MLflow's page
    assert parent.params["training.kl_weight"] == "searched"
    assert parent.params["training.epochs"] == str(settings.training.epochs)
    assert parent.params["tuning.scheduler"] == "asha"  # the one in force, which the settings leave open
    assert (parent.params["model.name"], parent.params["data"]) == (settings.model.name, settings.data)
    assert parent.tags["mlflow.user"] and parent.tags["mlflow.source.name"]
    runs = tracker.find("emolab.kind", "trial", parent=result.run_id)
    assert len(runs) == 8
    states = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    by_number = {record.number: record for record in result.records}
    for run_id in runs:
        run = tracker.client.get_run(run_id)
        record = by_number[int(run.data.tags["emolab.trial"])]
        assert states[run.data.tags["emolab.trial_state"]] == record.state
        assert run.info.status == ("FAILED" if record.state == "FAIL" else "FINISHED")
        history = tracker.client.get_metric_history(run_id, "kept_macro_f1")
        assert sorted(metric.step for metric in history) == list(range(1, record.epochs + 1))
        assert float(run.data.params["training.kl_weight"]) == pytest.approx(record.parameters["training.kl_weight"])


@pytest.mark.slow
@pytest.mark.ray
def test_the_guide_to_python_reads_a_search(finished: Finished) -> None:
    settings, result, _ = finished
    with notebook(result.folder.parent.parent, tracker_of(settings).uri) as namespace:
        found = run_section("A search", namespace, {"NAME": result.folder.name})
    found_states = dict(zip(found["trials"]["number"], found["trials"]["state"], strict=True))
    assert found_states == {record.number: record.state for record in result.records}
    assert found["best"] == result.best.parameters
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    told = {int(row["tags.emolab.trial"]): row["tags.emolab.trial_state"] for _, row in found["scores"].iterrows()}
    assert told == {record.number: states[record.state] for record in result.records}


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_search_that_was_deleted_in_the_tracker_is_recorded_anew(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=2)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    tracker = tracker_of(settings)
    first = search(settings, tracker)
    for run_id in (first.run_id, *tracker.children(first.run_id)):
        tracker.client.delete_run(run_id)
    again = search(settings, tracker)
    assert again.run_id != first.run_id
    assert again.records == first.records  # nothing was trained again
    runs = [tracker.client.get_run(run_id) for run_id in tracker.children(again.run_id)]
    assert sorted(run.data.tags["emolab.trial"] for run in runs) == ["0", "1"]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["emolab.trial_state"] in ("complete", "pruned")
        assert tracker.client.get_metric_history(run.info.run_id, "kept_macro_f1")


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_call_runs_nothing_again(finished: Finished) -> None:
    settings, result, _ = finished
    again = search(settings, tracker_of(settings))
    assert again.records == result.records
    assert again.run_id == result.run_id


@pytest.mark.slow
@pytest.mark.ray
def test_a_larger_budget_runs_only_the_rest(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=2)
    first = search(settings, tracker_of(settings))
    more = settings.model_copy(update={"tuning": settings.tuning.model_copy(update={"trials": 4})})
    extended = search(more, tracker_of(settings))
    assert extended.run_id == first.run_id
    assert sorted(record.number for record in extended.records) == [0, 1, 2, 3]
    assert [r for r in extended.records if r.number < 2] == first.records


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_that_is_over_leaves_its_run_as_it_is_when_it_is_called_again(finished: Finished) -> None:
    settings, result, _ = finished
    tracker = tracker_of(settings)
    before = tracker.client.get_run(result.run_id).to_dictionary()
    assert (before["info"]["status"], before["data"]["tags"]["emolab.search"]) == ("FINISHED", "over")
    assert not search(settings, tracker).computed
    assert tracker.client.get_run(result.run_id).to_dictionary() == before


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_that_has_been_silent_says_where_it_stands(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_SILENCE_SECONDS", 0.0)
    settings = tune_settings(toy_data, tmp_path, trials=3, scheduler="halving", sampler="random")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    lines: list[str] = []
    search(settings, NoTracker(), report=lines.append)
    assert "0 of 3 ended, trial 0 training" in lines
    assert "0 of 3 ended, trial 1 training, 1 waiting" in lines
    assert any(line.startswith("2 of 3 ended, trial ") and line.endswith(" training") for line in lines)


@pytest.mark.slow
@pytest.mark.ray
def test_another_experiment_does_not_go_on_with_a_study(finished: Finished, tmp_path: Path) -> None:
    settings, _, _ = finished
    values = settings.model_dump(mode="json")
    longer = TuneSettings.model_validate(values | {"training": values["training"] | {"epochs": 7}})
    with pytest.raises(UserError, match=r"study search was made with training\.epochs 6, not 7: choose another name"):
        search(longer, tracker_of(longer))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    other = TuneSettings.model_validate(values | {"tuning": values["tuning"] | {"space": str(tmp_path / "space.yaml")}})
    with pytest.raises(UserError, match=r"made with space\.parameters\.training\.learning_rate\."):
        search(other, tracker_of(other))


@pytest.mark.slow
@pytest.mark.ray
def test_the_best_configuration_is_a_file_that_training_takes(finished: Finished) -> None:
    _, result, _ = finished
    values = yaml.safe_load((result.folder / "best.yaml").read_text())
    assert values["training"]["kl_weight"] == result.best.parameters["training.kl_weight"]
    assert set(values) == {"model", "training"}


@pytest.mark.ray
def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, final_workers=50)
    with pytest.raises(UserError, match="50 CPU needed, 2 in the cluster"):
        plan_search(settings)
    wide = settings.model_copy(update={"workers": settings.workers.model_copy(update={"count": 8})})
    with pytest.raises(UserError, match="a trial cannot run here"):
        plan_search(wide)
    assert not Path(settings.output).exists()


@pytest.mark.ray
def test_a_name_with_no_room_for_that_of_the_winner_is_refused_before_anything_starts(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=12)
    longest = 120 - len("-best-120")
    plan = plan_search(settings.model_copy(update={"name": "s" * longest}))
    checked_name(winner_name(plan.folder.name, 119), what="run name")
    for length in (longest + 1, 120, 121):
        with pytest.raises(UserError) as error:
            plan_search(settings.model_copy(update={"name": "s" * length}))
        one_line(error, "study name 'ss", f"at most {longest} characters", "NAME-best-NUMBER")


@pytest.mark.ray
def test_a_dry_run_says_how_long_it_will_take(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = tune_settings(toy_data, tmp_path, final={"top": 2, "seeds": 3})
    plan = plan_search(settings)
    text = plan.describe(settings) + calibrate(settings, plan, Begun())
    for part in (
        "8 trials of at most 6 epochs",
        "1 at a time with 1 CPU each",
        "decisions after epochs 1, 3",
        "the best 2 trained with 3 seeds each",
        " simulations with random scores: ",
        "; more where tpe learns), 36 in the final, 6 for the best",
        " s an epoch from 3 steps of 1 configuration(s)",
        ": about ",
    ):
        assert part in text, text
    told = re.search(r"expected: (\d+) of at most 48 epochs in the search \(20 simulations", text)
    assert told is not None and 16 < int(told[1]) < 48  # 16 if exactly a third passed each rung
    known = settings.model_copy(update={"tuning": settings.tuning.model_copy(update={"scheduler": "none"})})
    text = calibrate(known, plan_search(known), Begun(trials=5, epochs=30, finals=4))
    assert text.startswith("5 trials have ended; expected: 18 of at most 18 epochs in the search, 12 in the final, 6 ")
    assert "this call comes to" not in text
    hurried = known.model_copy(update={"tuning": known.tuning.model_copy(update={"time_budget_s": 1e-4})})
    text = plan_search(hurried).describe(hurried) + calibrate(hurried, plan_search(hurried), Begun())
    assert "no trial begun after 0.0001 s" in text
    assert text.endswith("; this call comes to about 0% of the search")
    assert not Path(settings.output).exists()


@pytest.mark.ray
def test_what_a_search_could_not_choose_by_is_refused_before_anything_starts(
    unvalidated_data: Path, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    for count in (1, 2):
        settings = tune_settings(unvalidated_data, tmp_path)
        settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"count": count})})
        with pytest.raises(UserError) as error:
            plan_search(settings)
        one_line(error, f"{unvalidated_data} has no validation split, which a search selects by")
    settings = tune_settings(toy_data, tmp_path, final={"top": 2, "seeds": 2})
    seeds = {"training.seed": {"distribution": "int", "low": 0, "high": 9}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"parameters": seeds}))
    with pytest.raises(UserError) as error:
        plan_search(settings)
    one_line(error, "training.seed is searched", "tuning.final={top: 1, seeds: 1}")


@pytest.mark.ray
def test_a_dry_run_on_a_cluster_that_others_hold_says_so_instead_of_waiting(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holder:
        pass

    holder = ray.remote(Holder).options(num_cpus=2).remote()
    try:
        ray.get(holder.__ray_ready__.remote())
        settings = tune_settings(toy_data, tmp_path)
        monkeypatch.setattr(forecast, "_START_SECONDS", 2.0)
        with pytest.raises(UserError) as error:
            calibrate(settings, plan_search(settings), Begun())
        one_line(error, "did not start within 2 s", "0 of 2 CPU are free", "wait for the jobs")
    finally:
        ray.kill(holder)


@pytest.mark.ray
def test_a_final_measures_no_limits_again(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    """A finalist is within them, and a latency that is measured again may be over its limit by chance."""
    settings = tune_settings(toy_data, tmp_path, constraints={"latency_ms": 5.0}, final={"top": 2, "seeds": 2})
    plan = plan_search(settings)
    limits = {
        kind: packed_plan(settings, plan, trials=4, rungs=(), kind=kind).pack.limits for kind in ("trial", "final")
    }
    assert limits == {"trial": {"latency_ms": 5.0}, "final": {}}


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_process_that_finishes_its_epochs_in_time_is_not_taken_for_hung(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    """It answers at a decision or after five seconds, here long after the limit of an epoch."""
    settings = tune_settings(toy_data, tmp_path, trials=1, scheduler="none", timeout_s=1.5)
    training = settings.training.model_copy(update={"epochs": 400, "patience": 400})
    settings = settings.model_copy(update={"training": training})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    (trial,) = search(settings, NoTracker()).records
    assert (trial.state, trial.epochs) == ("COMPLETE", 400)
    assert trial.seconds > 1.5


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_two_processes_do_not_overspend_an_epoch_budget(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = tune_settings(
        toy_data, tmp_path, trials=50, epoch_budget=20, scheduler="none", sampler="random", concurrency=2
    )
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    result = search(settings, NoTracker())
    assert sum(record.epochs for record in result.records) == 20
    assert sum(record.state == "COMPLETE" for record in result.records) == 3


@pytest.mark.ray
def test_a_folder_that_holds_another_run_gets_no_study(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "search"
    folder.mkdir(parents=True)
    write_record(folder, {"identity": {"dataset": "another", "model.name": "mult"}, "run_id": "1", "tracker": ""})
    with pytest.raises(UserError, match="holds a search on other data, or another run: choose another name, or move"):
        search(tune_settings(toy_data, tmp_path), NoTracker())
    assert not (folder / "study.db").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_goes_on_in_its_database_and_not_anew_in_another(
    finished: Finished, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    settings, result, _ = finished
    elsewhere = settings.tuning.model_copy(update={"storage": f"sqlite:///{tmp_path / 'other.db'}"})
    with pytest.raises(UserError) as error:
        search(settings.model_copy(update={"tuning": elsewhere}), tracker_of(settings))
    one_line(error, f"the trials of the study in {result.folder} are in this folder, not in {tmp_path / 'other.db'}")
    assert not (tmp_path / "other.db").exists()


@pytest.mark.ray
def test_concurrency_is_computed_from_the_cluster(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    assert plan_search(tune_settings(toy_data, tmp_path, concurrency=None)).concurrency == 2
    assert plan_search(tune_settings(toy_data, tmp_path, concurrency=64)).concurrency == 2


@pytest.mark.ray
def test_the_plan_counts_processes_and_steps_as_the_search_and_its_final_take_them(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=6, fused=8, concurrency=None)
    plan = plan_search(settings)
    assert (
        "6 trials of at most 6 epochs (edu_emotionnet), 2 at a time with 1 CPU each, 3 configurations in one step"
        in (plan.describe(settings))
    )
    settings = tune_settings(toy_data, tmp_path, trials=1, fused=8, concurrency=None, final={"top": 1, "seeds": 5})
    plan = plan_search(settings)
    assert "1 at a time with 1 CPU each, tpe" in plan.describe(settings)
    packed = {
        kind: packed_plan(settings, plan, trials=n, rungs=(), kind=kind) for kind, n in (("trial", 1), ("final", 5))
    }
    assert [packed[kind].processes for kind in ("trial", "final")] == [1, 2]


DRIVER = """
import json, sys
from pathlib import Path
from emolab.cluster import ClusterSettings, connected
from emolab.tracking.runs import open_tracker
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings
settings = TuneSettings.model_validate(json.loads(sys.argv[1]))
with connected(ClusterSettings(address=sys.argv[2])):
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    search(settings, tracker, report=lambda line: print(line, flush=True))
"""


def started_driver(settings: TuneSettings) -> subprocess.Popen[str]:
    """The search in a process of its own, on the cluster of this one; its output can be read line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, settings.model_dump_json(), ray.get_runtime_context().gcs_address],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY / 'platform'}:{REPOSITORY / 'model'}"},
    )


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_driver_loses_nothing_and_a_second_one_is_refused(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    """SIGKILL after two finished trials, in the middle of the third; then the same search again."""
    settings = tune_settings(toy_data, tmp_path, trials=4, scheduler="none")
    settings = settings.model_copy(update={"training": settings.training.model_copy(update=LONG)})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    tracker = tracker_of(settings)
    driver = started_driver(settings)
    assert driver.stdout is not None
    try:
        ended = [driver.stdout.readline() for _ in range(2)]
        assert [line.startswith(f"trial {i} complete after 60 epochs") for i, line in enumerate(ended)] == [True] * 2
        with pytest.raises(UserError, match=f"in use by another process .*{driver.pid}"):
            search(settings, tracker)
        third = wait_for_running(tmp_path / "runs" / "search" / "study.db")
        while not tracker.find("emolab.trial", "2"):  # which it is told by a thread of its own
            time.sleep(0.02)
    finally:
        driver.kill()
        driver.wait()
    before = study_of(tmp_path / "runs" / "search" / "study.db")
    assert [t.state.name for t in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    lines: list[str] = []
    result = search(settings, tracker, report=lines.append)
    assert lines[0] == "resuming: 2 trials are finished, 1 were interrupted and run again"
    after = study_of(tmp_path / "runs" / "search" / "study.db")
    assert [t.state.name for t in after] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [(t.params, t.values, t.intermediate_values) for t in after[:2]] == [
        (t.params, t.values, t.intermediate_values) for t in before[:2]
    ]
    assert after[3].params == third
    assert after[2].user_attrs["reason"] == "interrupted"
    assert len(result.records) == 4
    runs = [tracker.client.get_run(run_id) for run_id in tracker.children(result.run_id)]
    states = [(run.data.tags["emolab.trial"], run.data.tags["emolab.trial_state"], run.info.status) for run in runs]
    assert sorted(states) == [
        ("0", "complete", "FINISHED"),
        ("1", "complete", "FINISHED"),
        ("2", "interrupted", "KILLED"),
        ("3", "complete", "FINISHED"),
        ("4", "complete", "FINISHED"),
    ]


LONG = {"epochs": 60, "patience": 60, "decay_epochs": ()}


def study_of(path: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials as another program reads them."""
    return optuna.load_study(study_name="search", storage=f"sqlite:///{path}").trials


def wait_for_running(path: Path) -> dict[str, Any]:
    """Parameters of the third trial, once the database has them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        trials = study_of(path)
        if len(trials) > 2 and trials[2].params:
            return trials[2].params
        time.sleep(0.05)
    raise AssertionError("the third trial never reached the database")


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_with_two_workers_runs_as_a_training_of_its_own(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=1)
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"count": 2})})
    (tmp_path / "space.yaml").write_text(
        yaml.safe_dump({"parameters": {"model.dropout": {"distribution": "categorical", "choices": [0.0]}}})
    )
    result = search(settings, tracker_of(settings))
    assert result.best.state == "COMPLETE"
    assert result.best.epochs == 6


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_of_two_workers_begins_anew_where_its_process_was_lost(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "distributed_trial", mortal_trial)
    settings = tune_settings(toy_data, tmp_path, trials=1, scheduler="none")
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"count": 2})})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    result = search(settings, NoTracker())
    assert (tmp_path / "runs" / "died").exists()
    (trial,) = study_of(result.folder / "study.db")
    assert (trial.state.name, trial.user_attrs["epochs"]) == ("COMPLETE", 6)
    assert list(trial.intermediate_values) == [1, 2, 3, 4, 5, 6]
    lives = result.folder.glob("ray/trials-*/*/*/ray/epochs.jsonl")
    assert [len(life.read_text().splitlines()) for life in lives] == [6, 6], "the second began at its first epoch"
    (tmp_path / "runs" / "broken").touch()
    with pytest.raises(UserError, match="1 failed: RuntimeError: a cable was pulled"):
        search(settings.model_copy(update={"name": "second"}), NoTracker())


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_robustness_as_a_second_objective_ends_in_a_pareto_front(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=5, objectives=["macro_f1", "robustness"])
    (tmp_path / "space.yaml").write_text(
        yaml.safe_dump(
            {
                "parameters": {
                    "training.learning_rate": {"distribution": "categorical", "choices": [0.01, 0.0001]},
                    "training.modality_dropout": {"distribution": "categorical", "choices": [0.0, 0.5]},
                }
            }
        )
    )
    result = search(settings, tracker_of(settings))
    assert [r.state for r in result.records] == ["COMPLETE"] * 5
    pairs = {r.number: (r.value, r.robustness) for r in result.records}
    for value, area in pairs.values():
        assert value is not None
        assert area is not None
        assert 0.0 < area <= value + 0.1  # what is missing does not help
    beaten = {
        n
        for n, (v, a) in pairs.items()
        if any(w >= v and b >= a and (w, b) != (v, a) for w, b in pairs.values())  # pyright: ignore[reportOptionalOperand]
    }
    assert set(result.study.front()) == set(pairs) - beaten
    assert result.best.number in result.study.front()


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_one_process_repeats_a_search_trial_by_trial(finished: Finished, toy_data: Path, tmp_path: Path) -> None:
    """Draws, curves, decisions and ends: everything but the clock."""

    def trials(name: str, **more: Any) -> list[Any]:
        (tmp_path / name).mkdir()
        result = search(tune_settings(toy_data, tmp_path / name, trials=8, **more), NoTracker())
        return [(r.number, r.state, r.parameters, r.curve, r.reason) for r in result.records]

    known = [(r.number, r.state, r.parameters, r.curve, r.reason) for r in finished[1].records]
    assert trials("a") == known
    assert trials("b", seed=1) != known


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_an_epoch_budget_is_spent_exactly(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=50, epoch_budget=20, scheduler="none", sampler="random")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    result = search(settings, NoTracker())
    assert [r.epochs for r in sorted(result.records, key=lambda r: r.number)] == [6, 6, 6, 2]
    assert result.records[-1].reason == "the epoch budget was spent after epoch 2"
    assert search(settings, NoTracker()).records == result.records


@pytest.fixture
def another_ray() -> Iterator[None]:
    """A process that Ray takes for that of another Ray on this machine, as it looks at their command lines."""
    arguments = ["raylet", "-c", "import time; time.sleep(600)", "--gcs-address=127.0.0.1:1"]
    with subprocess.Popen(arguments, executable=sys.executable) as process:
        while "127.0.0.1:1" not in find_gcs_addresses():
            time.sleep(0.05)
        yield
        process.kill()


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_trials_of_two_workers_keep_an_epoch_budget_and_give_back_what_they_held(
    ray_cluster: None, another_ray: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=3, epoch_budget=8, scheduler="none", sampler="random")
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"count": 2})})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    result = search(settings, NoTracker())
    ended = [(r.epochs, r.state, r.reason) for r in sorted(result.records, key=lambda r: r.number)]
    assert ended == [(6, "COMPLETE", ""), (2, "PRUNED", "the epoch budget was spent after epoch 2")]
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 2.0, "the next trial would wait for ever"
    assert search(settings, NoTracker()).records == result.records


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_the_final_is_won_by_the_mean_over_seeds_and_runs_once(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=5, final={"top": 2, "seeds": 3})
    tracker = tracker_of(settings)
    result = search(settings, tracker)
    first, second = result.finalists
    assert first.mean >= second.mean
    assert result.best == first.record
    assert {first.record.number, second.record.number} == {r.number for r in result.study.ranking()[:2]}
    assert len(first.values) == len(second.values) == 3
    assert first.half_width == pytest.approx(4.302653 * np.std(first.values, ddof=1) / 3**0.5, abs=1e-6)
    finals = tracker.find("emolab.kind", "final", parent=result.run_id)
    seeds = [tracker.client.get_run(run_id).data.params["training.seed"] for run_id in finals]
    assert sorted(seeds) == ["1", "1", "2", "2", "3", "3"]
    again = search(settings, tracker)
    assert again.finalists == result.finalists
    assert len(tracker.find("emolab.kind", "final", parent=result.run_id)) == 6


@pytest.mark.slow
@pytest.mark.ray
def test_a_model_over_a_limit_is_not_trained(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=4, sampler="grid", constraints={"parameters": 5000})
    space = {"parameters": {"model.d_model": {"distribution": "categorical", "choices": [4, 8, 32, 64]}}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    result = search(settings, NoTracker())
    by_width = {r.parameters["model.d_model"]: r for r in result.records}
    assert sorted(by_width) == [4, 8, 32, 64]
    for width in (32, 64):
        assert by_width[width].state == "PRUNED"
        assert by_width[width].epochs == 0
        assert by_width[width].reason == "over the limit: parameters"
    assert result.best.parameters["model.d_model"] in (4, 8)
    trials = study_of(result.folder / "study.db")
    assert all((t.constraints["parameters"] > 0) == (t.params["model.d_model"] > 8) for t in trials)


@pytest.mark.slow
@pytest.mark.ray
def test_a_limit_that_no_model_keeps_is_named_with_the_smallest_that_was_seen(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=2, sampler="grid", constraints={"parameters": 10})
    space = {"parameters": {"model.d_model": {"distribution": "categorical", "choices": [4, 8]}}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    with pytest.raises(UserError) as error:
        search(settings, NoTracker())
    sizes = [10 + t.constraints["parameters"] for t in study_of(tmp_path / "runs" / "search" / "study.db")]
    one_line(
        error,
        f"none of the 2 trials completed (2 pruned over the limit tuning.constraints.parameters=10, the smallest "
        f"had {min(sizes):g})",
        "raise tuning.constraints.parameters",
    )
    assert min(sizes) < max(sizes)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_process_costs_a_trial_its_epochs_and_nothing_else(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=4, scheduler="none", sampler="random")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    monkeypatch.setattr(processes, "TrialPack", MortalPack)
    result = search(settings, NoTracker())
    by_number = {r.number: r for r in result.records}
    assert [by_number[n].state for n in range(4)] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert by_number[2].reason == "the trial's process died, 3 times"
    assert list(by_number[1].curve) == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_process_that_was_killed_for_its_memory_is_one_that_was_lost(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's memory monitor has an error of its own, which is no error of an actor."""
    settings = tune_settings(toy_data, tmp_path, trials=2, scheduler="none", sampler="random")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    get, answers = ray.get, []

    def killed_once(call: Any) -> Any:
        answers.append(call)
        if len(answers) == 2:
            raise OutOfMemoryError("the node ran low on memory")
        return get(call)

    monkeypatch.setattr(processes.ray, "get", killed_once)
    records = search(settings, NoTracker()).records
    assert [(r.number, r.state, r.epochs) for r in sorted(records, key=lambda r: r.number)] == [
        (0, "COMPLETE", 6),
        (1, "COMPLETE", 6),
    ]
    # A trial that takes long answers more than once, so that processes are counted and not answers.
    actors = [answer.task_id().actor_id() for answer in answers]
    assert actors[0] == actors[1], "loaded and lost"
    assert len(actors) >= 5
    assert set(actors[2:]) == {actors[2]} != {actors[0]}, "loaded again, and both trials"


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.ray
def test_a_process_that_never_ends_reading_is_given_up_with_the_reason(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=2)
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"max_failures": 1})})
    monkeypatch.setattr(processes, "TrialPack", StuckPack)
    monkeypatch.setattr(processes, "_LOAD_SECONDS", 2.0)
    with pytest.raises(UserError) as error:
        search(settings, NoTracker())
    one_line(error, f"timeout: no answer within 2 s while it read {toy_data}, 2 times")
    with pytest.raises(UserError) as error:
        calibrate(settings, plan_search(settings), Begun())
    one_line(error, f"the process that times the trials did not read {toy_data} within 2 s")


class WaitingProcesses(processes.Processes):
    """Finds that those which have no room in the cluster have waited for hours."""

    def wait(self) -> list[processes.Process]:
        for process in self:
            process.since -= 0.0 if process.running else 10_000.0
        return super().wait()


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_waits_for_a_cluster_that_others_hold_however_long_that_takes(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holder:
        pass

    monkeypatch.setattr(packed, "Processes", WaitingProcesses)
    monkeypatch.setattr(packed, "_SILENCE_SECONDS", 3.0)
    settings = tune_settings(toy_data, tmp_path, trials=1)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    holder = ray.remote(Holder).options(num_cpus=2).remote()
    ray.get(holder.__ray_ready__.remote())
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        ray.kill(holder)  # once it has been said what is waited for

    try:
        assert [record.state for record in search(settings, NoTracker(), report=report).records] == ["COMPLETE"]
        assert lines[0] == "0 of 1 ended, processes start (0 of 2 CPU are free)"
    finally:
        ray.kill(holder)


class ImpatientProcesses(processes.Processes):
    """Finds that a process has been at trial 0 for a long time."""

    def wait(self) -> list[processes.Process]:
        for process in self:
            if process.group and process.group[0].number == 0:
                process.since -= 1000.0
        return super().wait()


@pytest.mark.slow
@pytest.mark.ray
def test_a_process_that_hangs_is_seen_while_others_answer(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tune_settings(
        toy_data, tmp_path, trials=6, scheduler="none", sampler="random", concurrency=2, timeout_s=500.0
    )
    settings = settings.model_copy(update={"workers": settings.workers.model_copy(update={"max_failures": 0})})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    monkeypatch.setattr(processes, "TrialPack", DrowsyPack)
    monkeypatch.setattr(packed, "Processes", ImpatientProcesses)
    monkeypatch.setattr(processes, "_POLL_SECONDS", 20.0)  # nothing but an answer wakes the driver
    trials = {t.number: t for t in study_of(search(settings, NoTracker()).folder / "study.db")}
    assert trials[0].user_attrs["reason"] == "timeout: no epoch within 500 s, 1 times"
    ended, began = trials[0].datetime_complete, trials[5].datetime_start
    assert ended is not None
    assert began is not None
    assert ended < began


def population_settings(data: Path, folder: Path, **tuning: object) -> TuneSettings:
    """Four members, which take turns on the cluster."""
    return tune_settings(
        data, folder, **{"trials": 4, "scheduler": "pbt", "sampler": "random", "concurrency": None} | tuning
    )


@pytest.mark.ray
def test_limits_that_a_search_would_not_keep_are_refused(
    ray_cluster: None, toy_data: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    def refused(settings: TuneSettings, *parts: str) -> None:
        with pytest.raises(UserError) as error:
            plan_search(settings)
        one_line(error, *parts)

    population = population_settings(toy_data, tmp_path)
    two_workers = tune_settings(toy_data, tmp_path, timeout_s=5.0)
    two_workers = two_workers.model_copy(update={"workers": two_workers.workers.model_copy(update={"count": 2})})
    refused(two_workers, "tuning.timeout_s", "workers.count=1")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    for key, value in {"epoch_budget": 10, "timeout_s": 5.0, "concurrency": 1}.items():
        refused(population_settings(toy_data, tmp_path, **{key: value}), "pbt", f"leave out tuning.{key}")
    limited = population_settings(toy_data, tmp_path, constraints={"parameters": 1})
    refused(limited, "pbt", "leave out tuning.constraints")
    assert plan_search(population).concurrency == 2


@pytest.mark.ray
def test_the_plan_says_what_a_population_does(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = population_settings(toy_data, tmp_path, grace_epochs=2)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    line = plan_search(settings).describe(settings)
    assert "a population that begins with draws of random over training.kl_weight; " in line
    assert "pbt compares it after every 2 epochs: the weakest go on from the weights of the strongest" in line
    assert "\n" not in line


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_a_population_goes_on_from_its_best_and_the_study_holds_every_member(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    """Half of the members learn nothing at their rates: what they end with, they have from the others."""
    settings = population_settings(toy_data, tmp_path, grace_epochs=1)
    rates = {"distribution": "categorical", "choices": [1e-9, 0.01]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"parameters": {"training.learning_rate": rates}}))
    result = search(settings, NoTracker())
    assert [r.state for r in result.records] == ["COMPLETE"] * 4
    assert [r.epochs for r in result.records] == [6] * 4  # all are compared at the same epoch: none goes back or ahead
    trials = study_of(result.folder / "study.db")
    began = {t.number: t.params["training.learning_rate"] for t in trials}
    schedules = {t.number: t.user_attrs["schedule"] for t in trials}
    assert all(schedules[number][0]["parameters"]["training.learning_rate"] == rate for number, rate in began.items())
    weak = [number for number, rate in began.items() if rate == 1e-9]
    assert 0 < len(weak) < 4
    taken = [
        entry["descends_from"] for number in weak for entry in schedules[number] if entry["descends_from"] != number
    ]
    assert taken and began[taken[0]] == 0.01
    for record in result.records:  # told are the parameters of the epoch whose score is told
        own = [point["validation_macro_f1"] for point in result.study.curves(record.number)]
        assert record.value == max(own)
        until = [entry for entry in schedules[record.number] if entry["epoch"] <= own.index(record.value) + 1]
        assert record.parameters == until[-1]["parameters"]


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.ray
def test_a_population_repeats_its_schedules(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    """Partners, shifts and what is drawn anew from a range, whoever else draws from the global generators."""
    rates = {"distribution": "float", "low": 1e-5, "high": 0.03, "log": True}

    def schedules(name: str) -> list[Any]:
        (tmp_path / name).mkdir()
        random.seed(name)
        np.random.seed(len(name))
        settings = population_settings(toy_data, tmp_path / name, grace_epochs=1)
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"epochs": 3})})
        (tmp_path / name / "space.yaml").write_text(yaml.safe_dump({"parameters": {"training.learning_rate": rates}}))
        result = search(settings, NoTracker())
        return [t.user_attrs["schedule"] for t in study_of(result.folder / "study.db")]

    first = schedules("a")
    assert any(entry["descends_from"] != number for number, entries in enumerate(first) for entry in entries)
    assert schedules("another") == first


@pytest.mark.slow
@pytest.mark.ray
def test_a_population_goes_on_where_the_member_that_all_wait_for_ends_early(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    """The last of four to be compared after two epochs stops there, since it has learned nothing."""
    settings = population_settings(toy_data, tmp_path, grace_epochs=2, seed=5)
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"patience": 1})})
    rates = {"distribution": "categorical", "choices": [1e-9, 0.01]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"parameters": {"training.learning_rate": rates}}))
    result = search(settings, NoTracker())
    began = [t.params["training.learning_rate"] for t in study_of(result.folder / "study.db")]
    assert began == [0.01, 0.01, 0.01, 1e-9]
    assert [(r.number, r.state, r.epochs) for r in sorted(result.records, key=lambda r: r.number)] == [
        (0, "COMPLETE", 4), (1, "COMPLETE", 4), (2, "COMPLETE", 4), (3, "COMPLETE", 2),
    ]  # fmt: skip
