"""MLflow as the tracker; the only module that knows MLflow's tracking interface."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from emolab.commands import tool_command
from emolab.databases import sqlite_url
from emolab.names import UserError, checked_name
from emolab.redaction import redact, redacted
from emolab.tracking.addresses import store_file, tracker_address
from emolab.tracking.outbox import LOCAL
from emolab.tracking.reasons import reason_of
from emolab.tracking.sending import LOCAL_ID_TAG, PARENT_TAG, experiment_id, is_refusal, known_experiment
from emolab.tracking.sqlite_store import make_store
from emolab.tracking.tracker import MissingRunError, NoTracker, Run, Status, Tracker

_BATCH = 100  # MLflow accepts at most this many parameters or tags in one request
EMBEDDED = "mlflow.db"
"""In an output folder: the tracker that is used where none is configured."""
_PAGE = 1000
"""Runs, or experiments, that one answer holds."""


class MLflowRun(Run):
    """A run behind MLflow's client, without the process-wide "active run" of its fluent interface."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id
        self._recorded: set[tuple[str, int]] = set()

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        now = int(time.time() * 1000)
        new = {name: value for name, value in metrics.items() if (name, step) not in self._recorded}
        self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in new.items()])
        self._recorded |= {(name, step) for name in new}

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        known = self._client.get_run(self.run_id).data.params
        given = redacted(dict(parameters))
        new = [Param(name, redact(str(value))[:6000]) for name, value in given.items() if name not in known]
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + _BATCH])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in redacted(dict(tags)).items()])

    def log_file(self, path: Path, *, folder: str | None = None) -> None:
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        self._client.log_text(self.run_id, redact(text), name)

    def reopen(self) -> None:
        self._client.update_run(self.run_id, status="RUNNING")

    def finish(self, status: Status = "FINISHED") -> None:
        self._client.set_terminated(self.run_id, status)

    def remember_recorded(self) -> None:
        """Learn what an earlier process logged, so that an epoch which ran twice is recorded once."""
        for name in self._client.get_run(self.run_id).data.metrics:
            self._recorded |= {(name, metric.step) for metric in self._client.get_metric_history(self.run_id, name)}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a tracker holds of one run, for reports."""

    run_id: str
    name: str
    ended: float | None
    """When the run was last finished, in seconds since 1970; None while it runs."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    """The newest value of every metric."""


class MLflowTracker(Tracker):
    """An experiment on an MLflow server or in an SQLite file. It is made when its first run begins: who only reads, or
    shows what would be done, leaves no empty one behind."""

    _id: str | None

    def __init__(self, uri: str, experiment: str, *, artifacts: Path | None = None) -> None:
        """Open the store; an SQLite file is made where there is none.

        Raises:
            UserError: the tracker cannot be reached.
        """
        self.uri = uri
        self._name, self._id = experiment, None
        self._location = artifacts.resolve().as_uri() if artifacts is not None else None
        try:
            if uri.startswith("sqlite:"):
                make_store(uri, artifacts)
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._experiment()
        except (MlflowException, SQLAlchemyError) as error:
            raise UserError(f"the tracker {uri} cannot be used: {reason_of(error)}") from None

    def _experiment(self) -> str | None:
        """Its id; None while no run has begun in it."""
        if self._id is None:
            self._id = known_experiment(self._client, self._name)
        return self._id

    @property
    def client(self) -> MlflowClient:
        """For the registry, which lives behind the same connection."""
        return self._client

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
    ) -> Run:
        all_tags = dict(tags or {}) | ({PARENT_TAG: parent} if parent else {})
        if key is not None:
            all_tags[LOCAL_ID_TAG] = LOCAL + key
            if begun := self.find(LOCAL_ID_TAG, LOCAL + key):
                return self.resume(begun[-1])
        checked_name(name, what="run name")
        if self._id is None:
            self._id = experiment_id(self._client, self._name, self._location)
        run = self._client.create_run(self._id, run_name=name, tags=redacted(all_tags))
        return MLflowRun(self._client, run.info.run_id)

    def resume(self, run_id: str, *, parent: str | None = None) -> Run:
        if not self._takes_more(run_id):
            raise MissingRunError(
                f"the tracker {self.uri} has no run {run_id} any more: restore it there, or choose another name"
            )
        run = MLflowRun(self._client, run_id)
        run.remember_recorded()
        if parent is not None:
            run.set_tags({PARENT_TAG: parent})
        return run

    def _takes_more(self, run_id: str) -> bool:
        """Whether the tracker has a run, and not only until it is purged."""
        try:
            return self._client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE
        except MlflowException as error:
            if not is_refusal(error):
                raise
            return False

    def find(self, tag: str, value: str, *, parent: str | None = None) -> Sequence[str]:
        conditions = [f"tags.`{tag}` = '{checked_name(value, what='tag value')}'"]
        if parent:
            conditions.append(f"tags.`{PARENT_TAG}` = '{checked_name(parent, what='run id')}'")
        return self._search(" and ".join(conditions), "attributes.start_time DESC")

    def find_anywhere(self, tag: str, value: str) -> Sequence[str]:
        """Ids of the runs of all experiments that carry a tag, newest first."""
        experiments: list[str] = []
        token: str | None = None
        while True:
            page = self._client.search_experiments(max_results=_PAGE, page_token=token)
            experiments += [experiment.experiment_id for experiment in page]
            token = page.token
            if not token:
                break
        condition = f"tags.`{tag}` = '{checked_name(value, what='tag value')}'"
        return self._search(condition, "attributes.start_time DESC", experiments)

    def children(self, run_id: str) -> list[str]:
        """Ids of the runs below a run, in the order in which they began."""
        parent = f"tags.`{PARENT_TAG}` = '{checked_name(run_id, what='run id')}'"
        return self._search(parent, "attributes.start_time ASC")

    def _search(self, condition: str, order: str, experiments: Sequence[str] | None = None) -> list[str]:
        """Ids of all runs that meet a condition.

        Args:
            experiments: their ids; None: the tracker's own.
        """
        own = self._experiment() if experiments is None else None
        among = list(experiments or ()) if own is None else [own]
        if not among:
            return []
        found: list[str] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                among, condition, ViewType.ACTIVE_ONLY, _PAGE, order_by=[order], page_token=token
            )
            found += [run.info.run_id for run in page]
            token = page.token
            if not token:
                return [*dict.fromkeys(found)]  # a run that begins meanwhile shifts the others: one may come twice

    def read(self, run_id: str) -> RunRecord:
        """A recorded run.

        Raises:
            UserError: the tracker has no such run.
        """
        try:
            run = self._client.get_run(checked_name(run_id, what="run id"))
        except MlflowException as error:
            if not is_refusal(error):
                raise
            raise UserError(f"the tracker {self.uri} has no run {run_id}") from None
        ended = None if run.info.status == "RUNNING" else run.info.end_time  # one that was reopened keeps its old end
        return RunRecord(
            run_id=run_id,
            name=run.info.run_name or run_id,
            ended=ended / 1000 if ended is not None else None,
            tags=dict(run.data.tags),
            metrics=dict(run.data.metrics),
        )

    def tags(self, run_id: str) -> Mapping[str, str]:
        return self.read(run_id).tags

    def artifact(self, run_id: str, name: str) -> bytes:
        """Content of a file that a run has stored.

        Raises:
            UserError: the run has no such file, or it cannot be fetched.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self._client.download_artifacts(run_id, name, folder)).read_bytes()
            except (MlflowException, OSError) as error:
                if isinstance(error, MlflowException) and self.uri.startswith("http") and not is_refusal(error):
                    raise
                raise UserError(f"run {run_id} in the tracker {self.uri} has no file {name}") from None

    def instructions(self) -> str:
        if self.uri.startswith("http"):
            return self.uri
        return tool_command("mlflow", "ui", "--backend-store-uri", self.uri)


def open_tracker(*, enabled: bool, uri: str | None, experiment: str, output: Path) -> Tracker:
    """The tracker of a job: the configured one, else MLFLOW_TRACKING_URI, else SQLite in the output folder.

    A file of SQLite is as near as an outbox would be and is written directly; everything else through an outbox.

    Raises:
        UserError: the tracker refuses. One that cannot be reached now is no error.
    """
    if not enabled:
        return NoTracker()
    configured = tracker_address(uri)
    if configured and configured.startswith("sqlite:"):
        return MLflowTracker(configured, experiment)
    if configured:
        from emolab.tracking.buffered import BufferedTracker  # it is built on this module

        return BufferedTracker(configured, experiment, output=output)
    output.mkdir(parents=True, exist_ok=True)
    return MLflowTracker(sqlite_url(output / EMBEDDED), experiment, artifacts=output / "mlflow-artifacts")


def tracker_file(*, uri: str | None, output: Path) -> Path | None:
    """The file in which the tracker of a job keeps its runs, which may not be there yet; None where it is no file.

    Raises:
        UserError: the address cannot be one of a tracker.
    """
    configured = tracker_address(uri)
    return store_file(configured) if configured else output / EMBEDDED


def existing_tracker(
    *, enabled: bool, uri: str | None, experiment: str, output: Path, option: str = "--output"
) -> MLflowTracker:
    """The tracker of a job that works on what others recorded: where there is none yet, none is made.

    Args:
        option: that gives the job the output folder of those others, for the refusal.

    Raises:
        UserError: tracking is disabled, nothing was recorded, or the tracker cannot be reached.
    """
    if not enabled:
        raise UserError("this job works on tracked runs: set tracking.enabled=true")
    file = tracker_file(uri=uri, output=output)
    if file is not None and not file.exists():
        raise UserError(f"there is no tracker at {file}, nothing is recorded there: set {option} or tracking.uri")
    tracker = open_tracker(enabled=True, uri=uri, experiment=experiment, output=output)
    assert isinstance(tracker, MLflowTracker)
    return tracker


def shared_tracker(*, uri: str, experiment: str, output: Path) -> Tracker:
    """The tracker that the job has opened, for another process of it; empty address: tracking is disabled.

    Args:
        output: folder of the results, on storage that the workers share.

    Raises:
        UserError: the tracker's file is not there, as on a machine that does not share it: none is made.
    """
    file = store_file(uri) if uri else None
    if file is not None and not file.exists():
        raise UserError(
            f"the tracker {file} does not exist on node {platform.node()}: put it on storage that all nodes share, or "
            "set tracking.uri to a server"
        )
    return open_tracker(enabled=bool(uri), uri=uri, experiment=experiment, output=output)
