"""What Optuna is told is what happened."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from emolab.tuning.searcher import FAILURE, FINISHED, StudySearch
from emolab.tuning.study import METRIC, Study

SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "training.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
    "model.dropout": optuna.distributions.FloatDistribution(0.0, 0.5),
}


def open_study(folder: Path) -> Study:
    return Study(folder / "study.db", "s", seed=0, sampler="tpe")


def result(epoch: int, value: float, *, finished: bool = False) -> dict[str, object]:
    return {METRIC: value, "epoch": epoch, FINISHED: finished}


def test_every_way_to_end_is_recorded_as_what_it_was(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    search = StudySearch(study, SPACE)
    for trial in ("finished", "stopped", "nan", "crashed"):
        assert search.suggest(trial) is not None
    search.on_trial_result("finished", result(1, 0.5))
    search.on_trial_complete("finished", result(2, 0.6, finished=True))
    search.on_trial_result("stopped", result(1, 0.2))
    search.on_trial_complete("stopped", result(2, 0.3))
    search.on_trial_complete("nan", {METRIC: float("nan"), "epoch": 1, FAILURE: "non-finite loss at epoch 2, step 1"})
    search.on_trial_complete("crashed", None, error=True)
    search.on_trial_complete("crashed", None, error=True)  # Tune may say it twice
    trials = study.history()
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert trials[0].value == 0.6
    assert trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert trials[1].value == 0.3  # a pruned trial's last value
    assert "non-finite loss at epoch 2, step 1" in trials[2].user_attrs["reason"]
    assert all(t.user_attrs.get("reason") for t in trials[1:])
    assert study.finished() == 4
    best = study.best()
    assert best is not None
    assert best.number == 0


def test_interrupted_trials_are_queued_again_with_their_parameters_and_nothing_is_drawn_twice(tmp_path: Path) -> None:
    search = StudySearch(open_study(tmp_path), SPACE)
    drawn = [search.suggest(f"t{i}") for i in range(5)]
    for i in range(3):
        search.on_trial_complete(f"t{i}", result(1, 0.1 * i, finished=True))
    reopened = open_study(tmp_path)
    assert reopened.requeue_interrupted() == 2
    assert reopened.requeue_interrupted() == 0
    assert reopened.finished() == 3
    search = StudySearch(reopened, SPACE)
    again = [search.suggest(f"r{i}") for i in range(4)]
    assert again[:2] == drawn[3:]
    assert not [point for point in again[2:] if point in drawn]
    for i in range(4):
        search.on_trial_complete(f"r{i}", result(1, 0.5, finished=True))
    assert reopened.finished() == 7
    assert len(reopened.records()) == 7


def test_one_process_draws_the_same_points_for_the_same_seed(tmp_path: Path) -> None:
    points = []
    for name in ("a", "b"):
        search = StudySearch(open_study(tmp_path / name), SPACE)
        mine = []
        for i in range(14):
            mine.append(search.suggest(f"t{i}"))
            search.on_trial_complete(f"t{i}", result(1, mine[-1]["model.dropout"], finished=True))
        points.append(mine)
    assert points[0] == points[1]


def test_importances_need_enough_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert study.importances() == {}
    search = StudySearch(study, SPACE)
    for i in range(20):
        point = search.suggest(f"t{i}")
        assert point is not None
        search.on_trial_complete(f"t{i}", result(1, point["model.dropout"], finished=True))
    importances = study.importances()
    assert importances["model.dropout"] == pytest.approx(max(importances.values()))
