"""One contract for every tracker."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.ports import free_port
from tests.tracking.tracking_server import mlflow_server

from emolab.names import UserError
from emolab.tracking import beginning, runs
from emolab.tracking.addresses import tracker_address
from emolab.tracking.beginning import CODE, RECORD, folder_run
from emolab.tracking.provenance import CLEAN, COMMIT, code_version
from emolab.tracking.runs import MLflowTracker, open_tracker, shared_tracker
from emolab.tracking.tracker import NoTracker, Status, Tracker


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module", params=["file", "server", "none"])
def tracker(request: pytest.FixtureRequest, output: Path) -> Iterator[Tracker]:
    with mlflow_server(output / "server", free_port()) if request.param == "server" else nullcontext() as uri:
        tracker = open_tracker(enabled=request.param != "none", uri=uri, experiment="tests", output=output)
        yield tracker
        assert tracker.close() == 0


def test_a_run_takes_everything_it_is_given(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start("parent", tags=code_version())
    child = tracker.start("child", parent=run.run_id)
    child.log_parameters({"a": 1, "b": "x" * 7000})
    child.log_parameters({"a": 1, "c": None})
    child.log_metrics({"score": 0.5}, step=1)
    child.log_metrics({"score": 0.6}, step=2)
    child.log_metrics({"score": 0.6}, step=2)
    (tmp_path / "f.txt").write_text("hello")
    child.log_file(tmp_path / "f.txt")
    child.log_file(tmp_path, folder="all")
    child.log_json({"x": [1, 2]}, "x.json")
    child.set_tags({"state": "done"})
    child.finish()
    child.finish("FAILED")
    run.finish()
    if isinstance(tracker, MLflowTracker):
        stored = tracker.client.get_run(child.run_id)
        assert stored.data.tags["mlflow.parentRunId"] == run.run_id
        assert [m.value for m in tracker.client.get_metric_history(child.run_id, "score")] == [0.5, 0.6]
        assert {a.path for a in tracker.client.list_artifacts(child.run_id)} == {"f.txt", "all", "x.json"}


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_a_closed_run_can_run_again(tracker: Tracker, status: Status) -> None:
    run = tracker.start("reopened")
    run.finish(status)
    again = tracker.resume(run.run_id)
    for act, expected in ((again.reopen, "RUNNING"), (again.finish, "FINISHED")):
        act()
        if isinstance(tracker, MLflowTracker):
            assert tracker.client.get_run(run.run_id).info.status == expected


def test_a_resumed_run_records_an_epoch_once_however_often_it_ran(tracker: Tracker, output: Path) -> None:
    run = tracker.start("resumed")
    run.log_metrics({"score": 0.1}, step=1)
    again = tracker.resume(run.run_id)
    again.log_metrics({"score": 0.1}, step=1)
    again.log_metrics({"score": 0.2}, step=2)
    if isinstance(tracker, MLflowTracker):
        assert [m.step for m in tracker.client.get_metric_history(run.run_id, "score")] == [1, 2]


def test_runs_are_found_by_tag(tracker: Tracker, output: Path) -> None:
    parent = tracker.start("finder")
    runs = [tracker.start(f"f{i}", parent=parent.run_id, tags={"kind": "trial"}).run_id for i in range(3)]
    if not isinstance(tracker, NoTracker):
        assert set(tracker.find("kind", "trial", parent=parent.run_id)) == set(runs)
        with pytest.raises(UserError):
            tracker.find("kind", "x' or 1=1")
        assert isinstance(tracker, MLflowTracker)
        other = open_tracker(enabled=True, uri=tracker.uri, experiment="other", output=output / "other")
        elsewhere = other.start("elsewhere", tags={"kind": "trial"}).run_id
        other.close()
        assert elsewhere not in tracker.find("kind", "trial")
        assert set(tracker.find_anywhere("kind", "trial")) == {*runs, elsewhere}
        with pytest.raises(UserError):
            tracker.start("../evil")


def test_an_experiment_is_made_by_its_first_run_and_not_by_reading(tracker: Tracker, output: Path) -> None:
    if not isinstance(tracker, MLflowTracker):
        return
    run_id = tracker.start("readable").run_id
    for experiment in ("mistyped", "meant"):
        place = output / experiment
        reader = open_tracker(enabled=True, uri=tracker.uri, experiment=experiment, output=place)
        assert isinstance(reader, MLflowTracker)
        assert reader.read(run_id).name == "readable"
        assert not reader.children(run_id) and not reader.find("kind", "x")
        begun = [reader.start("first", parent=run_id).run_id] if experiment == "meant" else []
        assert reader.children(run_id) == begun
        reader.close()
        made = tracker.client.get_experiment_by_name(experiment)
        assert (made is not None) == bool(begun)


def test_runs_are_found_however_many_answers_they_fill(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PAGE", 2)
    parent = tracker.start("pages")
    begun = [tracker.start(f"p{i}", parent=parent.run_id, tags={"kind": "page"}).run_id for i in range(5)]
    if isinstance(tracker, MLflowTracker):
        stored = tracker.children(parent.run_id)
        assert sorted(stored) == sorted(tracker.find("kind", "page")) == sorted(begun)
        assert [tracker.read(run_id).name for run_id in stored] == [f"p{i}" for i in range(5)]


def test_the_run_of_a_folder_names_the_code_of_every_call_that_computed(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(commit: str, *, clean: str = "true", computes: bool = True) -> str:
        monkeypatch.setattr(beginning, "code_version", lambda: {COMMIT: commit, CLEAN: clean})
        folder = tmp_path / "made-by-several"
        return folder_run(tracker, folder, {}, holds="another", tags={"kind": "made"}, computes=computes).run_id

    def told(run_id: str) -> tuple[str, str] | None:
        if not isinstance(tracker, MLflowTracker):
            return None
        tags = tracker.read(run_id).tags
        return tags[COMMIT], tags[CLEAN]

    known = not isinstance(tracker, NoTracker)
    run_id = call("a")
    assert told(run_id) == (("a", "true") if known else None)
    for commit, values, expected in (
        ("b", {"clean": "false", "computes": False}, ("a", "true")),  # it found everything there
        ("c", {}, ("a c", "true")),
        ("c", {"clean": "unknown"}, ("a c", "unknown")),
        ("b", {"clean": "false"}, ("a c b", "false")),
        ("a", {}, ("a c b", "false")),  # what changed code has computed is still there
    ):
        call(commit, **values)
        assert told(run_id) == (expected if known else None)
    (tmp_path / "made-by-several" / RECORD).unlink()  # as people are told to where it is damaged
    assert call("a") == run_id
    assert told(run_id) == (("a c b", "false") if known else None)
    (tmp_path / "made-by-several" / CODE).write_bytes(b"[nothing")
    call("a")
    assert told(run_id) == (("unknown a", "unknown") if known else None)


def test_the_environment_variable_names_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mine.db'}")
    tracker = open_tracker(enabled=True, uri=None, experiment="x", output=tmp_path / "other")
    assert tracker.uri.endswith("mine.db")
    assert "mine.db" in tracker.instructions()


def test_a_file_of_sqlite_is_the_same_one_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert open_tracker(enabled=True, uri=None, experiment="x", output=tmp_path).uri == f"sqlite:///{tmp_path}/mine.db"
    assert tracker_address("sqlite:///a/../b.db?timeout=9") == f"sqlite:///{tmp_path}/b.db?timeout=9"
    for same in ("sqlite:////else/where.db", "sqlite:///:memory:", "sqlite:///file:x.db?uri=true", "http://host:5000"):
        assert tracker_address(same) == same


def test_a_worker_that_does_not_see_the_trackers_file_makes_none(tmp_path: Path) -> None:
    tracker = open_tracker(enabled=True, uri=None, experiment="x", output=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"here/mlflow.db does not exist on node .*: put it on storage that all nodes"):
        shared_tracker(uri=tracker.uri, experiment="x", output=tmp_path / "here")
    assert not (tmp_path / "here").exists()
