"""PostgreSQL behind MLflow and Optuna, on a server of these tests' own: no network but loopback, gone afterwards."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from sqlalchemy import inspect
from tests.tracking.test_trackers import (  # the contract of every tracker, with the fixture below  # noqa: F401
    test_a_resumed_run_records_an_epoch_once_however_often_it_ran,
    test_a_run_takes_everything_it_is_given,
    test_runs_are_found_by_tag,
)
from tests.training.test_loop import settings_for
from tests.tuning.test_study import SPACE

from emolab.configuration import validate
from emolab.names import UserError
from emolab.redaction import MASK
from emolab.registry.aliases import Move, Standing, move, standing
from emolab.registry.versions import register
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.train import train
from emolab.tuning.holding import check_study_not_held, connected_to, holding_study
from emolab.tuning.looking import Begun, look
from emolab.tuning.plan import plan_search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.study import Study

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install --editable '.[postgres]'")
PASSWORD = "a-password-that-is-nowhere-else"
_START_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server."""

    folder: Path
    port: int

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://tester:{password}@127.0.0.1:{self.port}/{database}"


def programs() -> Path:
    """Where Debian's package puts the newest server."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    return found[-1].parent


def somebody() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: the options that start a process as its own user then."""
    if os.geteuid():
        return {}
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("there is no user postgres to run the server as")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    binaries, identity = programs(), somebody()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    secret = folder / "password"
    secret.write_text(PASSWORD)
    if identity:
        for path in (folder, secret):
            os.chown(path, identity["user"], identity["group"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make = ["--pgdata", str(folder / "data"), "--username=tester", f"--pwfile={secret}", "--auth=scram-sha-256"]
    process = None
    try:
        command = [str(binaries / "initdb"), *make, "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, **identity)
        secret.unlink()
        options = ["-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([str(binaries / "postgres"), *options], cwd=folder, stderr=log, **identity)
        wait_for(process, port, folder / "log")
        yield Server(folder=folder, port=port)
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # does not wait for its clients: pools of this process still hold some
            process.wait(timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with psycopg.connect(host="127.0.0.1", port=port, user="tester", password=PASSWORD, dbname="postgres"):
                return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def make_database(server: Server, name: str) -> str:
    import psycopg

    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.url(name)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def tracker(server: Server, output: Path) -> MLflowTracker:
    return MLflowTracker(make_database(server, "tracking"), "tests", artifacts=output / "artifacts")


def test_a_model_is_trained_registered_and_its_alias_moved(
    tracker: MLflowTracker, server: Server, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts that no server takes
    settings = settings_for(toy_data, tmp_path)
    as_a_job_does = open_tracker(enabled=True, uri=tracker.uri, experiment="jobs", output=tmp_path)
    trained = train(settings, tracker=as_a_job_does)
    run_id = as_a_job_does.settle(trained.run_id)
    assert run_id is not None
    assert as_a_job_does.close() == 0
    client = MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
    assert len(client.get_metric_history(run_id, "validation_macro_f1")) == settings.training.epochs
    first = register(trained.folder / "model", "on-postgres", run_id=run_id, tracking_uri=tracker.uri).version
    second = str(client.create_model_version("on-postgres", source=(trained.folder / "model").as_uri()).version)
    move(client, Move(name="on-postgres", run_id="1", champion=first, previous=None, expected=None))
    move(client, Move(name="on-postgres", run_id="2", champion=second, previous=first, expected=first))
    with pytest.raises(UserError, match="nothing was changed"):
        move(client, Move(name="on-postgres", run_id="3", champion=first, previous=None, expected=first))
    assert standing(client, "on-postgres") == Standing(champion=second, previous=first, claims={})
    folders = (tmp_path, server.folder)  # also what PostgreSQL itself has written
    written = b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())
    assert MASK.encode() in written  # run.json says which tracker, without the password
    assert PASSWORD.encode() not in written


def test_a_study_outlives_its_search_and_an_interrupted_trial_runs_again(server: Server) -> None:
    url = make_database(server, "studies")
    study = Study(url, "search", space=SPACE)
    drawn = [study.ask() for _ in range(3)]
    study.report(0, 1, 0.5)
    study.tell(0, "COMPLETE", [0.5], epochs=1, curves=[{"epoch": 1, "train_loss": 0.25}])
    study.tell(1, "FAIL", reason="non-finite loss in epoch 1, step 2")
    study.flush()  # and here its process dies

    resumed = Study(url, "search", space=SPACE)
    assert resumed.requeue_interrupted() == 1
    assert (resumed.finished(), resumed.waiting()) == (2, 1)
    assert resumed.curves(0) == [{"epoch": 1, "train_loss": 0.25}]
    assert resumed.record(1).reason == "non-finite loss in epoch 1, step 2"
    assert resumed.ask().parameters == drawn[2].parameters
    resumed.flush()


def test_a_study_has_one_driver_and_the_second_is_told_who_that_is(server: Server) -> None:
    url = make_database(server, "held")
    with holding_study(url, "search"):
        second = pytest.raises(UserError, match=rf"the study search is in use by .*\(pid {os.getpid()} on ")
        with second, holding_study(url, "search"):
            pass
        with pytest.raises(UserError, match=rf"the study search is in use by .*\(pid {os.getpid()} on "):
            check_study_not_held(url, "search")
        with holding_study(url, "another"):
            pass
        check_study_not_held(make_database(server, "held-elsewhere"), "search")
    check_study_not_held(url, "search")
    with holding_study(url, "search"):
        pass


def test_a_study_is_looked_at_and_no_table_is_made(server: Server, toy_data: Path, tmp_path: Path) -> None:
    url = make_database(server, "looked-at")
    values = settings_for(toy_data, tmp_path).model_dump(mode="json") | {"name": "search", "tuning": {"storage": url}}
    settings = validate(TuneSettings, values)
    assert look(settings, SPACE) == Begun()
    with connected_to(url) as connection:
        assert inspect(connection).get_table_names() == []
    study = Study(url, "search", space=SPACE)
    study.tell(study.ask().number, "FAIL", reason="lost", epochs=3)
    study.flush()
    assert look(settings, SPACE) == Begun(trials=1, epochs=3)
    assert not (tmp_path / "runs").exists()


def test_a_search_is_planned_with_the_database_it_is_given(
    server: Server, toy_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("parameters: {model.dropout: {distribution: float, low: 0.0, high: 0.5}}\n")
    values = settings_for(toy_data, tmp_path).model_dump(mode="json")
    tuning = {"space": str(space), "trials": 2, "storage": server.url("studies")}
    settings = validate(TuneSettings, values | {"tuning": tuning})
    plan = plan_search(settings)
    assert plan.database == server.url("studies")
    assert PASSWORD not in plan.describe(settings)


def test_a_database_that_refuses_is_named_without_the_password(server: Server) -> None:
    with pytest.raises(UserError, match="cannot be opened") as error:
        Study(server.url("studies", password="a-wrong-password"), "search", space=SPACE)
    assert f"tester:{MASK}@127.0.0.1:{server.port}/studies" in str(error.value)
    assert "a-wrong-password" not in str(error.value)
    with pytest.raises(UserError, match="cannot be opened"):
        Study("mysql://tester@127.0.0.1/studies", "search", space=SPACE)  # its driver is not installed
