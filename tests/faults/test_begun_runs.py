"""A process may die at the instant at which the tracker has begun its run and nobody has written down which one it is.

The same command again goes on with that run: there is one, not an empty one beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tests.faults import victims as jobs
from tests.faults.killing import Trigger, Victims
from tests.ports import free_port
from tests.tracking.tracking_server import mlflow_server

from emolab.sessions.manifest import FILE_NAME
from emolab.tracking.sending import experiment_id

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.ray]

NOTE = {"preparation": FILE_NAME}
"""The file that a job is about to write when its run is begun and not noted. A preparation notes nothing: the run is
found by the data set's digest, which is set as a tag when everything is recorded."""
AREAS = {"training": "training", "search": "tuning", "sweep": "sweeps", "comparison": "tuning", "preparation": ""}


@pytest.fixture
def begin(victims: Victims, toy_data: Path) -> Callable[..., list[Any]]:
    """A process that begins the run of a job's folder and dies where it is told, or does not: what it has said."""

    def start(job: str, output: Path, uri: str, *, at: str = "") -> list[Any]:
        arguments = (job, str(toy_data), str(output), uri, at)
        ended = victims.run(jobs.beginning, *arguments, trigger=Trigger(folder=str(output)))
        assert not ended.error and ended.killed == bool(at), ended
        return ended.said

    return start


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a tracker in a file: making one takes longer than all that is written into it here."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracker') / 'mlflow.db'}"


def experiment(uri: str, output: Path) -> Path:
    """An output folder with an experiment of its own, which bears the folder's name and keeps its files there."""
    experiment_id(MlflowClient(uri), output.name, (output / "artifacts").as_uri())
    return output


def runs_of(uri: str, output: Path) -> dict[str, Any]:
    """What an experiment holds of each of its runs: tags, parameters, files and metrics."""
    client, found = MlflowClient(uri), {}
    for run in client.search_runs([experiment_id(client, output.name)]):
        tags = {name: value for name, value in run.data.tags.items() if name.startswith("emolab.")}
        tags.pop("emolab.local_id", None)
        files = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        found[run.info.run_id] = (tags, run.data.params, files, run.data.metrics)
    return found


@pytest.mark.parametrize("job", AREAS)
def test_a_run_that_was_begun_and_not_noted_is_gone_on_with(
    job: str, begin: Callable[..., list[Any]], database: str, tmp_path: Path, record_faults: Callable[..., None]
) -> None:
    """SIGKILL when the tracker has begun the run, and again when its id is about to be noted."""
    clean, killed = (experiment(database, tmp_path / f"{job}-{name}") for name in ("clean", "killed"))
    begin(job, clean, database)
    [expected] = runs_of(database, clean).values()
    for instant in ("answered", NOTE.get(job, ".run.json")):
        begin(job, killed, database, at=instant)
    [begun] = runs_of(database, killed)
    for _ in range(2):  # the second time it is noted
        assert begin(job, killed, database) == [begun]
    assert runs_of(database, killed) == {begun: expected}
    record_faults(AREAS[job] or job, "SIGKILL before a begun run is noted", tried=2, survived=2, kills=2)


def test_a_run_that_was_begun_on_a_server_and_not_noted_is_gone_on_with(
    begin: Callable[..., list[Any]], tmp_path: Path, record_faults: Callable[..., None]
) -> None:
    """Also where the server was dead, so that its beginning waits in the outbox of a process that is dead, too."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    begin("training", tmp_path / "waiting", uri, at=".run.json")
    assert list((tmp_path / "waiting" / "outbox").glob("*.sqlite"))
    with mlflow_server(tmp_path / "server", port):
        for output, instants in ((tmp_path / "waiting", ()), (tmp_path / "killed", ("answered", ".run.json"))):
            for instant in instants:
                begin("training", output, uri, at=instant)
            [first], [second] = (begin("training", output, uri) for _ in range(2))
            assert first == second
            [(_, parameters, files, _)] = runs_of(uri, output).values()
            assert parameters["workers"] == "1" and files == {"config.yaml", "dataset.json"}
    record_faults("training", "SIGKILL before a begun run is noted", tried=3, survived=3, kills=3)
