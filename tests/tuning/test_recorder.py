"""The tracker is told everything once, whenever it can be reached, and the search does not wait for it."""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tests.ports import free_port
from tests.tracking.tracking_server import mlflow_server

from emolab.tracking.provenance import CLEAN, COMMIT
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tracking.tracker import Run, Tracker
from emolab.tuning.recorder import TrialRecorder
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import METRIC, OVER

SPACE = SearchSpace.model_validate(
    {"parameters": {"model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5}}}
)

CODE = (COMMIT, CLEAN)


class Interrupted(Tracker):
    """A tracker that takes so many metrics and then fails for ever."""

    def __init__(self, tracker: Tracker, metrics: int) -> None:
        self.uri, self.tracker, self.left = tracker.uri, tracker, metrics

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
    ) -> Run:
        run = self.tracker.start(name, parent=parent, tags=tags, key=key)
        log, outer = run.log_metrics, self

        def log_metrics(metrics: Mapping[str, float], *, step: int) -> None:
            if not outer.left:
                raise ConnectionError("the tracker is gone")
            outer.left -= 1
            log(metrics, step=step)

        run.log_metrics = log_metrics
        return run

    def resume(self, run_id: str, *, parent: str | None = None) -> Run:
        return self.tracker.resume(run_id, parent=parent)

    def find(self, tag: str, value: str, *, parent: str | None = None) -> Any:
        return self.tracker.find(tag, value, parent=parent)

    def instructions(self) -> str:
        return ""


def run_trials(study: Study, recorder: TrialRecorder, count: int) -> None:
    """Trials of two epochs."""
    for _ in range(count):
        draw = study.ask()
        recorder.began(draw.number, draw.parameters)
        curves = [{"epoch": float(epoch), METRIC: 0.1 * epoch} for epoch in (1, 2)]
        for point in curves:
            recorder.epochs(draw.number, [point])
        study.tell(draw.number, "COMPLETE", [0.2], epochs=2, curves=curves)
        recorder.ended(study.record(draw.number))


def assert_complete(tracker: MLflowTracker, parent: str, count: int) -> None:
    runs = [tracker.client.get_run(run_id) for run_id in tracker.children(parent)]
    assert sorted(run.data.tags["emolab.trial"] for run in runs) == [str(number) for number in range(count)]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["emolab.trial_state"] == "complete"
        assert set(run.data.params) == {"model.dropout"}
        history = tracker.client.get_metric_history(run.info.run_id, METRIC)
        assert sorted((metric.step, metric.value) for metric in history) == [(1, 0.1), (2, 0.2)]


@pytest.mark.fault
def test_what_a_failing_tracker_missed_is_written_once_by_the_next_call(tmp_path: Path) -> None:
    """It fails after three metrics, in the middle of the second of three trials."""
    tracker = open_tracker(enabled=True, uri=None, experiment="e", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    parent = tracker.start("search").run_id
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    broken = TrialRecorder(Interrupted(tracker, 3), parent)
    run_trials(study, broken, 3)
    broken.close()
    assert broken.trouble == "the tracker is gone"
    study.flush()
    for _ in range(2):  # the second time there is nothing left to write
        again = TrialRecorder(tracker, parent)
        again.catch_up(Study(tmp_path / "study.db", "s", space=SPACE))
        again.close()
        assert again.trouble == ""
        assert_complete(tracker, parent, 3)


@pytest.mark.fault
def test_what_an_interrupted_search_leaves_open_is_closed_and_completed_where_its_trial_had_ended(
    tmp_path: Path,
) -> None:
    """Of two trials one had ended in the study, of which the tracker was not told any more."""
    tracker = open_tracker(enabled=True, uri=None, experiment="e", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    parent = tracker.start("search").run_id
    study = Study(tmp_path / "study.db", "s", space=SPACE)

    def states() -> dict[str, tuple[str, str]]:
        runs = [tracker.client.get_run(run_id) for run_id in tracker.children(parent)]
        return {r.data.tags["emolab.trial"]: (r.info.status, r.data.tags["emolab.trial_state"]) for r in runs}

    recorder = TrialRecorder(tracker, parent)
    for draw in (study.ask(), study.ask()):
        recorder.began(draw.number, draw.parameters)
    study.tell(0, "COMPLETE", [0.2], epochs=1, curves=[{"epoch": 1.0, METRIC: 0.2}])
    study.flush()
    recorder.close()
    assert states() == {"0": ("KILLED", "interrupted"), "1": ("KILLED", "interrupted")}
    for _ in range(2):
        again = TrialRecorder(tracker, parent)
        again.catch_up(Study(tmp_path / "study.db", "s", space=SPACE))
        again.close()
        assert states() == {"0": ("FINISHED", "complete"), "1": ("KILLED", "interrupted")}


@pytest.mark.fault
@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_trial_that_goes_on_has_every_epoch_although_its_process_died_before_it_told_them(
    tmp_path: Path, known: int
) -> None:
    tracker = open_tracker(enabled=True, uri=None, experiment="e", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    parent = tracker.start("search").run_id
    curve = [{"epoch": float(epoch), METRIC: 0.1 * epoch} for epoch in (1, 2, 3)]
    first = TrialRecorder(tracker, parent)
    first.began(0, {"model.dropout": 0.1})
    first.epochs(0, curve[:known])
    first.close()
    second = TrialRecorder(tracker, parent)
    second.resumed(0, {"model.dropout": 0.1}, curve[:2])
    second.epochs(0, curve[2:])
    second.close()
    assert second.trouble == ""
    (run_id,) = tracker.children(parent)
    history = tracker.client.get_metric_history(run_id, METRIC)
    assert sorted((point.step, point.value) for point in history) == [(int(p["epoch"]), p[METRIC]) for p in curve]


@pytest.mark.parametrize("server", [False, True], ids=["file", "server"])
def test_a_trial_that_goes_on_names_the_code_of_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: bool
) -> None:
    with mlflow_server(tmp_path / "server", free_port()) if server else nullcontext() as uri:
        tracker = open_tracker(enabled=True, uri=uri, experiment="e", output=tmp_path)
        assert isinstance(tracker, MLflowTracker)
        parent = tracker.start("search").run_id
        for commit, clean in (("a", "true"), ("b", "false"), ("a", "true")):
            version = dict(zip(CODE, (commit, clean), strict=True))
            monkeypatch.setattr("emolab.tuning.recorder.code_version", lambda now=version: now)
            call = TrialRecorder(tracker, parent)
            call.resumed(0, {"model.dropout": 0.1}, [])  # the first one finds no run and begins it
            call.close()
            assert call.trouble == ""
        (run_id,) = tracker.children(parent)
        assert tuple(tracker.tags(run_id)[name] for name in CODE) == ("a b", "false")
        tracker.close()


def test_a_stopped_trial_says_what_stopped_it_and_what_its_model_measured(tmp_path: Path) -> None:
    tracker = open_tracker(enabled=True, uri=None, experiment="e", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    parent = tracker.start("search").run_id
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    recorder = TrialRecorder(tracker, parent, limits={"parameters": 5000.0})
    draw = study.ask()
    recorder.began(draw.number, draw.parameters)
    study.constrain(draw.number, {"parameters": 3240.0})
    study.tell(draw.number, "PRUNED", reason=f"{OVER}: parameters")
    recorder.ended(study.record(draw.number))
    recorder.close()
    assert recorder.trouble == ""
    (run_id,) = tracker.children(parent)
    run = tracker.client.get_run(run_id)
    assert run.data.tags["emolab.trial_state"] == "pruned"
    assert run.data.tags["emolab.stopped_by"] == "limit on parameters"
    assert run.data.metrics == {"model_parameters": 8240.0}


@pytest.mark.fault
def test_a_slow_tracker_does_not_hold_up_the_search(tmp_path: Path) -> None:
    tracker = open_tracker(enabled=True, uri=None, experiment="e", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    parent = tracker.start("search").run_id

    searched = threading.Event()

    class Slow(Interrupted):
        def start(self, *arguments: Any, **options: Any) -> Run:
            assert searched.wait(30), "the search waits for the tracker"
            return super().start(*arguments, **options)

    study = Study(tmp_path / "study.db", "s", space=SPACE)
    recorder = TrialRecorder(Slow(tracker, 100), parent)
    run_trials(study, recorder, 4)
    searched.set()
    recorder.close()
    assert recorder.trouble == ""
    assert_complete(tracker, parent, 4)
