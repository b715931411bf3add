"""What people read of how trials ended and of a final's scores is true of them."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from emolab.tracking.runs import open_tracker
from emolab.tuning.finals import Finalist
from emolab.tuning.outcome import mean_over_seeds, read_with_care, stopped_by
from emolab.tuning.population import DRAWN, NUMBER, ORIGIN, SCORE, PopulationRecorder
from emolab.tuning.recorder import TrialRecorder
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import METRIC, OVER, SPENT, TrialRecord
from emolab.tuning.workers import FINISHED, StudySearcher

SPACE = SearchSpace.model_validate(
    {"parameters": {"model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5}}}
)


def record(state: str = "COMPLETE", reason: str = "") -> TrialRecord:
    return TrialRecord(number=3, state=state, value=0.6, robustness=None, epochs=2, parameters={}, reason=reason)


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("COMPLETE", "", ""),
        ("FAIL", "the loss is NaN", ""),
        ("PRUNED", "pruned after epoch 2", "scheduler"),
        ("PRUNED", f"{SPENT} after epoch 2", "epoch budget"),
        ("PRUNED", f"{OVER}: parameters", "limit on parameters"),
        ("PRUNED", f"{OVER}: parameters, latency_ms", "limit on parameters and latency_ms"),
    ],
)
def test_what_stopped_a_trial_is_said_in_a_word(state: str, reason: str, said: str) -> None:
    assert stopped_by(record(state, reason)) == said


def finalist(*values: float) -> Finalist:
    return Finalist(record=record(), values=values)


def test_one_seed_has_no_interval() -> None:
    assert mean_over_seeds(finalist(0.61)) == "0.6100 with one seed"
    assert mean_over_seeds(finalist(0.5, 0.52, 0.54)) == "0.5200 ± 0.0497 (95 % interval over 3 seeds)"
    assert mean_over_seeds(finalist()) == "no training completed"


def test_it_is_said_that_the_winner_of_a_final_was_chosen_by_its_own_scores() -> None:
    alone = "The interval holds the luck of the seeds, not that of the sessions."
    assert read_with_care([finalist(0.5, 0.6)]) == alone
    for rivals in (2, 4):
        said = read_with_care([finalist(0.5, 0.6)] * rivals)
        assert said.startswith(alone)
        assert f"the best of {rivals}, chosen by these same trainings, and so too narrow and too high" in said
    single = read_with_care([finalist(0.5)] * 3)
    assert "interval" not in single
    assert "the best of 3 is likely too high" in single
    assert "the best of" not in read_with_care([finalist(0.5)])


@pytest.fixture
def recorder(tmp_path: Path) -> Any:
    made = TrialRecorder(open_tracker(enabled=False, uri=None, experiment="e", output=tmp_path), "")
    yield made
    made.close()


def test_a_score_of_nothing_is_a_number_and_the_trainings_of_a_final_are_called_so(
    tmp_path: Path, recorder: TrialRecorder
) -> None:
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    lines: list[str] = []
    searcher = StudySearcher(study, recorder, [], lines.append, kind="final")
    searcher.suggest("a")
    searcher.on_trial_complete("a", {METRIC: 0.0, "epoch": 1, FINISHED: True})
    searcher.suggest("b")
    searcher.on_trial_complete("b", {}, error=True)
    assert lines == [
        "final 0 complete after 1 epochs: validation macro-F1 0.0000",
        "final 1 failed after 0 epochs: the trial's process failed",
    ]


def test_ray_tune_gets_no_trial_once_the_time_is_over(tmp_path: Path, recorder: TrialRecorder) -> None:
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    begun, late = (
        StudySearcher(study, recorder, [], lambda _: None, deadline=time.monotonic() + seconds) for seconds in (600, 0)
    )
    assert isinstance(begun.suggest("a"), dict)
    assert late.suggest("b") == Searcher.FINISHED
    assert study.finished() == 0 and len(study.history()) == 1


def test_an_epoch_whose_report_was_lost_counts_once_it_is_told(
    tmp_path: Path, recorder: TrialRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of the trial was lost as it reported the second and the last epoch; the trial tells all in the end."""
    study, asked = Study(tmp_path / "study.db", "s", space=SPACE), list[int]()
    monkeypatch.setattr(study, "should_prune", lambda number: bool(asked.append(number)))
    searcher = StudySearcher(study, recorder, [2], lambda _: None)
    searcher.suggest("a")

    def tell(*epochs: int) -> dict[str, Any]:
        results = [{METRIC: epoch / 10, "epoch": epoch, FINISHED: epoch == 4} for epoch in epochs]
        assert all(searcher.learn("a", result) for result in results)
        return results[-1]

    last = tell(1, 3)
    assert asked == [0], "at the first epoch after the rung whose own report is missing"
    tell(1, 2, 3, 4)
    searcher.on_trial_complete("a", last)  # results of two ways may overtake each other
    (record,) = study.records()
    assert (record.state, record.epochs, record.value, asked) == ("COMPLETE", 4, 0.4, [0])
    (trial,) = study.history()
    assert trial.intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}


def test_a_member_of_a_population_may_score_nothing(tmp_path: Path, recorder: TrialRecorder) -> None:
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    lines: list[str] = []
    callback = PopulationRecorder(study, recorder, list(SPACE.parameters), lines.append, interval=5, selection="best")
    drawn = study.ask()
    result = {METRIC: 0.0, SCORE: 0.0, "epoch": 1, DRAWN: drawn.parameters, ORIGIN: drawn.number}
    trial: Any = SimpleNamespace(trial_id="a", config={NUMBER: drawn.number}, last_result=result)
    callback.on_trial_start(0, [trial], trial)
    callback.on_trial_result(1, [trial], trial, result)
    callback.on_trial_complete(1, [trial], trial)
    assert lines == ["trial 0 complete after 1 epochs: validation macro-F1 0.0000"]
