"""A tracker in trouble: nobody waits for it, and everything arrives once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tests.conftest import REPOSITORY
from tests.ports import free_port
from tests.tracking.tracking_server import gate, mlflow_server

from emolab.__main__ import deliver_outbox
from emolab.names import UserError
from emolab.sessions.shards import sha256 as digest
from emolab.tracking.buffered import BufferedTracker, send_left_behind, without_credentials
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import NoTracker
from emolab.training.recipe import TrainSettings
from emolab.training.train import train

METRICS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    port = free_port()
    with mlflow_server(tmp_path_factory.mktemp("server"), port) as address:
        yield address, port


def histories(client: MlflowClient, run_id: str) -> dict[str, list[int]]:
    """Steps of every metric, as often as the tracker holds them."""
    names = client.get_run(run_id).data.metrics
    return {name: sorted(point.step for point in client.get_metric_history(run_id, name)) for name in names}


def settings_of(data: Path, output: Path, uri: str | None) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "data": str(data),
            "output": str(output),
            "name": "run",
            "model": {"d_model": 8, "layers": 1, "heads": 2},
            "training": {"epochs": 3, "batch_size": 8},
            "tracking": {"uri": uri, "experiment": "faults"},
        }
    )


@pytest.mark.fault
@pytest.mark.ray
def test_a_dead_tracker_costs_a_training_nothing_and_gets_everything_later(
    toy_data: Path, tmp_path: Path, server: tuple[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    clean = train(settings_of(toy_data, tmp_path / "clean", None), tracker=NoTracker())
    dead = f"http://127.0.0.1:{free_port()}"
    settings = settings_of(toy_data, tmp_path / "dead", dead)
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    assert isinstance(tracker, BufferedTracker)
    assert f"the tracker {dead} cannot be reached now" in capfd.readouterr().err
    trained = train(settings, tracker=tracker)
    assert digest(trained.folder / "model" / "model.safetensors") == digest(
        clean.folder / "model" / "model.safetensors"
    )
    assert trained.run_id.startswith("local-")
    with pytest.raises(UserError, match="cannot be reached"):
        tracker.read(trained.run_id)
    assert tracker.settle(trained.run_id) is None
    waiting = tracker.close()
    assert waiting > 5
    told = capfd.readouterr().err
    assert f"has not received {waiting} records" in told
    assert f"deliver {tmp_path / 'dead'} --uri {dead}`" in told  # the address was given to this job alone

    # It comes back: here, under the address that the outbox knows.
    with gate(server[1]) as alive:
        readdress(tmp_path / "dead" / "outbox", alive.address)
        assert deliver_outbox(tmp_path / "dead", alive.address)
        assert f"{waiting} records sent, 0 wait" in capfd.readouterr().out
        assert deliver_outbox(tmp_path / "dead", alive.address)
    assert not list((tmp_path / "dead" / "outbox").iterdir())
    client = MlflowClient(server[0])
    [run] = client.search_runs(
        [client.get_experiment_by_name("faults").experiment_id],  # pyright: ignore[reportOptionalMemberAccess]
        f"tags.`emolab.local_id` = '{trained.run_id}'",
    )
    assert run.info.status == "FINISHED"
    assert histories(client, run.info.run_id)["train_loss"] == [1, 2, 3]
    assert run.data.params["model.d_model"] == "8"
    files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert files == {"config.yaml", "dataset.json", "history.json", "curves.svg", "model"}


def readdress(folder: Path, address: str) -> None:
    """What a tracker that returns under the same address would not need."""
    import sqlite3

    for path in folder.glob("*.sqlite"):
        with sqlite3.connect(path) as database:
            database.execute("UPDATE about SET tracker = ?", (address,))


@pytest.mark.fault
def test_lost_questions_and_answers_leave_every_record_there_once(tmp_path: Path, server: tuple[str, int]) -> None:
    with gate(server[1], seed=3, lose=0.4) as failing:
        tracker = BufferedTracker(failing.address, "lossy", output=tmp_path)
        parent = tracker.start("parent")
        runs = [tracker.start(f"r{i}", parent=parent.run_id, tags={"kind": "x"}) for i in range(3)]
        failing.delay = 0.5
        started = time.monotonic()
        for step in range(METRICS):
            for run in runs:
                run.log_metrics({"a": step / 10, "b": float("nan")}, step=step)
        assert time.monotonic() - started < 30  # nobody waited for the 120 requests, which would take 60 s
        failing.delay = 0.0
        runs[0].log_text("hello", "deep/er/x.txt")
        runs[1].log_parameters({f"p{i}": i for i in range(150)})
        for run in (*runs, parent):
            run.finish()
        deadline = time.monotonic() + 60
        while tracker.settle(parent.run_id) is None and time.monotonic() < deadline:
            pass
        assert tracker.close() == 0
        assert failing.lost_questions > 3 and failing.lost_answers > 3
    client = MlflowClient(server[0])
    experiment = client.get_experiment_by_name("lossy")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name or "" for run in found) == ["parent", "r0", "r1", "r2"]
    by_name = {run.info.run_name: run for run in found}
    for name in ("r0", "r1", "r2"):
        run = by_name[name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == by_name["parent"].info.run_id
        assert histories(client, run.info.run_id) == {"a": list(range(METRICS)), "b": list(range(METRICS))}
    assert len(by_name["r1"].data.params) == 150
    [text] = client.list_artifacts(by_name["r0"].info.run_id, "deep/er")
    assert text.path == "deep/er/x.txt"


WRITER = """
import sys
from pathlib import Path
from emolab.tracking.buffered import BufferedTracker
tracker = BufferedTracker(sys.argv[1], "killed", output=Path(sys.argv[2]))
run = tracker.start("writer")
for step in range(10_000):
    run.log_metrics({"score": step / 10}, step=step)
    print(step, flush=True)
"""


@pytest.mark.fault
@pytest.mark.slow
def test_what_a_killed_process_was_told_is_recorded_arrives_once(tmp_path: Path, server: tuple[str, int]) -> None:
    with gate(server[1], seed=1, lose=0.2) as failing:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, failing.address, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY / 'platform'}:{REPOSITORY / 'model'}"},
        )
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(700)]
        process.kill()
        acknowledged += [int(line) for line in process.stdout.read().split()]
        process.wait()
        while send_left_behind(tmp_path, failing.address).waiting:
            pass
    client = MlflowClient(server[0])
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    held = histories(client, run.info.run_id)["score"]
    assert held[: len(acknowledged)] == acknowledged
    assert len(held) - len(acknowledged) in (0, 1)  # recorded, and killed before it could say so
    assert not list((tmp_path / "outbox").glob("*.sqlite"))


@pytest.mark.fault
def test_a_slow_tracker_is_not_waited_for(tmp_path: Path, server: tuple[str, int]) -> None:
    with gate(server[1]) as slow:
        tracker = BufferedTracker(slow.address, "slow", output=tmp_path)
        slow.delay = 8.0  # shorter than the tracker's client has patience: it is slow and not in trouble
        started = time.monotonic()
        run = tracker.start("r")
        assert run.run_id.startswith("local-")  # it was waited for, but not until it had named the run
        for step in range(100):
            run.log_metrics({"a": 1.0}, step=step)
        assert time.monotonic() - started < 30  # for its name alone: with every record it would be minutes
        started = time.monotonic()
        for number in range(20):
            tracker.start(f"later-{number}")
        assert time.monotonic() - started < 30  # and once, not for every run of a search, which would take 60 s
        slow.delay = 0.0
        assert tracker.read(run.run_id).metrics == {"a": 1.0}
        assert tracker.close() == 0


def test_a_tracker_that_refuses_is_a_users_mistake(tmp_path: Path, server: tuple[str, int]) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        BufferedTracker(f"{server[0]}/nowhere", "x", output=tmp_path)
    tracker = BufferedTracker(server[0], "refusals", output=tmp_path)
    run = tracker.start("r")
    run.set_tags({"x" * 300: "a key longer than the tracker takes"})
    run.log_metrics({"a": 1.0}, step=0)
    assert tracker.read(run.run_id).metrics == {"a": 1.0}  # what is refused holds up nothing behind it
    tracker.close()
    told = send_left_behind(tmp_path, server[0])
    assert "refused: tags of run" in told.describe()


def test_an_outbox_is_for_one_tracker_and_keeps_no_password(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    tracker = BufferedTracker(f"http://ann:secret@{address}", "x", output=tmp_path)
    tracker.start("r").log_text("hello", "x.txt")
    tracker.close()
    told = send_left_behind(tmp_path, "http://127.0.0.1:1")
    assert told.others == (f"http://{address}",)
    assert told.sent == 0
    for path in (tmp_path / "outbox").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()
    assert without_credentials("postgresql://u:p@h:1/db?sslmode=x") == "postgresql://h:1/db"
