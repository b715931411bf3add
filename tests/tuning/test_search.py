"""A search on a real cluster, with a real study and a real tracker."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from emolab.names import UserError
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tuning.search import SearchResult, TuneSettings, plan_search, search

SPACE = {
    "parameters": {
        "training.learning_rate": {"distribution": "categorical", "choices": [0.01, 0.003, 1.0e30]},
        "training.kl_weight": {"distribution": "float", "low": 0.001, "high": 1.0, "log": True},
    }
}


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
def test_the_same_call_runs_nothing_again_and_a_larger_budget_only_the_rest(finished: Finished) -> None:
    settings, result, _ = finished
    again = search(settings, tracker_of(settings))
    assert again.records == result.records
    assert again.run_id == result.run_id
    more = settings.model_copy(update={"tuning": settings.tuning.model_copy(update={"trials": 10})})
    extended = search(more, tracker_of(settings))
    assert len(extended.records) == 10
    assert [r for r in extended.records if r.number < 8] == [r for r in result.records if r.number < 8]


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
def test_concurrency_is_computed_from_the_cluster(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    assert plan_search(tune_settings(toy_data, tmp_path, concurrency=None)).concurrency == 2
    assert plan_search(tune_settings(toy_data, tmp_path, concurrency=64)).concurrency == 2


def _hold(folder: Path, ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    folder.mkdir(parents=True)
    with FileLock(folder / "study.lock"):
        (folder / "holder.json").write_text(json.dumps({"pid": 4242, "host": "elsewhere"}))
        ready.set()
        done.wait(60)


@pytest.mark.ray
def test_a_second_driver_is_refused_and_told_who_holds_the_study(
    ray_cluster: None, toy_data: Path, tmp_path: Path
) -> None:
    settings = tune_settings(toy_data, tmp_path)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "runs" / "search", ready, done))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match=r"in use by another process .*4242"):
            search(settings, tracker_of(settings))
    finally:
        done.set()
        holder.join()


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
