"""Tells MLflow what an outbox holds.

What arrives twice is there once: a run is looked for by its local id before it is begun again, an epoch of a metric
that the tracker holds is not sent again, and everything else replaces what is there by the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from emolab.tracking.outbox import LOCAL, Entry, Outbox
from emolab.tracking.reasons import reason_of

LOCAL_ID_TAG = "emolab.local_id"
PARENT_TAG = "mlflow.parentRunId"
_PER_REQUEST = 100  # MLflow takes at most this many parameters or tags in one request
_METRICS_PER_REQUEST = 1000
_MENDABLE = (401, 403, 408, 429)  # refusals that credentials or patience change


class Sender:
    """Sends entries in order. Not for several threads at a time."""

    def __init__(self, client: MlflowClient, *, stopping: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            stopping: asked between entries whether to leave the rest for later.
        """
        self._client, self._stopping = client, stopping
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}
        self._held: dict[tuple[str, str], set[int]] = {}
        self._doubtful = False

    def send(self, outbox: Outbox, *, again: bool = False) -> int:
        """Send everything, and forget here what has arrived.

        Args:
            again: whether a process before this one may have sent some of it.

        Returns:
            How many entries have arrived.

        Raises:
            Exception: whatever the client makes of a tracker in trouble.
        """
        if again:
            self._held.clear()
        before = outbox.count()
        try:
            self._send_entries(outbox, again=again or self._doubtful)
        except Exception:
            self._doubtful = True  # an answer may have been lost
            raise
        return before - outbox.count()

    def _send_entries(self, outbox: Outbox, *, again: bool) -> None:
        while not self._stopping() and (entries := outbox.waiting()):
            for batch in _batches(entries):
                try:
                    self._send(outbox, batch, again=again)
                except MlflowException as error:
                    if not is_refusal(error):
                        raise
                    outbox.refused(batch, reason_of(error))
                else:
                    outbox.received(batch)
                if self._stopping():
                    return

    def _send(self, outbox: Outbox, batch: Sequence[Entry], *, again: bool) -> None:
        """Entries of one run: some of metrics, or a single one of another kind."""
        entry = batch[0]
        if entry.kind == "begin":
            again = again or entry.content.get("again", False)
            self._runs[entry.run] = self._begin(outbox, entry, again=again)
            outbox.name_run(entry.run, self._runs[entry.run])
            return
        run_id = self.remote(outbox, entry.run)
        content = entry.content
        match entry.kind:
            case "metrics":
                self._metrics(run_id, batch, again=again)
            case "parameters":
                known = self._client.get_run(run_id).data.params
                new = [Param(name, value) for name, value in content.items() if name not in known]
                for start in range(0, len(new), _PER_REQUEST):
                    self._client.log_batch(run_id, params=new[start : start + _PER_REQUEST])
            case "tags":
                self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in content.items()])
            case "file":
                self._file(run_id, outbox.file(entry), content["folder"])
            case "reopen":
                self._client.update_run(run_id, status="RUNNING")
            case "finish":
                self._client.set_terminated(run_id, content["status"], content["time"])

    def remote(self, outbox: Outbox, run: str) -> str:
        """The tracker's id of a run.

        Raises:
            MlflowException: the tracker does not know it.
        """
        if not run.startswith(LOCAL):
            return run
        if run not in self._runs:
            self._runs[run] = outbox.remote(run) or find_local(self._client, self.experiment(outbox.about()[1]), run)
        return self._runs[run]

    def _begin(self, outbox: Outbox, entry: Entry, *, again: bool) -> str:
        experiment = self.experiment(outbox.about()[1])
        if again:
            try:
                return find_local(self._client, experiment, entry.run)  # its answer was lost
            except MlflowException as error:
                if not is_refusal(error):
                    raise
        tags = dict(entry.content["tags"]) | {LOCAL_ID_TAG: entry.run}
        if PARENT_TAG in tags:
            tags[PARENT_TAG] = self.remote(outbox, tags[PARENT_TAG])
        run = self._client.create_run(
            experiment, run_name=entry.content["name"], tags=tags, start_time=entry.content["time"]
        )
        return run.info.run_id

    def _metrics(self, run_id: str, batch: Sequence[Entry], *, again: bool) -> None:
        points = {
            (name, entry.content["step"]): Metric(name, value, entry.content["time"], entry.content["step"])
            for entry in reversed(batch)  # the first of equal ones stays
            for name, value in entry.content["values"].items()
        }
        if again or any(entry.content["resumed"] for entry in batch):
            for name in {name for name, _ in points}:
                for step in self._steps(run_id, name):
                    points.pop((name, step), None)
        new = list(points.values())
        for start in range(0, len(new), _METRICS_PER_REQUEST):
            self._client.log_batch(run_id, metrics=new[start : start + _METRICS_PER_REQUEST])

    def _steps(self, run_id: str, name: str) -> set[int]:
        """Which steps of a metric the tracker has held since this process, or its turn with an outbox, began."""
        if (run_id, name) not in self._held:
            history = self._client.get_metric_history(run_id, name)
            self._held[run_id, name] = {point.step for point in history}
        return self._held[run_id, name]

    def _file(self, run_id: str, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder)
        elif path.exists():
            self._client.log_artifact(run_id, str(path), folder)

    def experiment(self, name: str) -> str:
        """Id of an experiment, which is made where it is missing."""
        if name not in self._experiments:
            self._experiments[name] = experiment_id(self._client, name)
        return self._experiments[name]


def _batches(entries: Sequence[Entry]) -> Iterable[Sequence[Entry]]:
    """What is sent together, in order: all metrics of a run at once, where its first ones stand."""
    batches: dict[object, list[Entry]] = {}
    for entry in entries:
        batches.setdefault(entry.run if entry.kind == "metrics" else entry.number, []).append(entry)
    return batches.values()


def experiment_id(client: MlflowClient, name: str, location: str | None = None) -> str:
    """Id of an experiment, which is made where it is missing."""
    known = known_experiment(client, name)
    if known is not None:
        return known
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        known = known_experiment(client, name)  # another process was faster
        if known is None:
            raise
        return known


def known_experiment(client: MlflowClient, name: str) -> str | None:
    """Id of an experiment; None where it is missing."""
    found = client.get_experiment_by_name(name)
    return None if found is None else found.experiment_id


def find_local(client: MlflowClient, experiment: str, local: str) -> str:
    """The tracker's id of a run that was begun under a local one.

    Raises:
        MlflowException: there is none.
    """
    found = client.search_runs([experiment], f"tags.`{LOCAL_ID_TAG}` = '{local}'", max_results=1)
    if not found:
        raise MlflowException(f"the tracker has no run {local}", error_code=RESOURCE_DOES_NOT_EXIST)
    return found[0].info.run_id


def is_refusal(error: MlflowException) -> bool:
    """Whether the tracker understood and said no, rather than failed."""
    status = error.get_http_status_code()
    return 400 <= status < 500 and status not in _MENDABLE
