"""Writes every trial to the tracker as a child run, beside the search and not in its way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from emolab.tracking.provenance import CLEAN, COMMIT, code_version, together
from emolab.tracking.tracker import Run, Tracker
from emolab.tuning.outcome import stopped_by
from emolab.tuning.study import Study
from emolab.tuning.trials import METRIC, ROBUSTNESS, TrialRecord

TRACKED = (
    "train_loss",
    "validation_loss",
    "validation_accuracy",
    "validation_macro_f1",
    METRIC,
    ROBUSTNESS,
    "learning_rate",
    "sessions_per_second",
)
"""Metrics of an epoch that are kept."""
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
_RUNNING = "running"
_INTERRUPTED = "interrupted"


class TrialRecorder:
    """One thread that talks to the tracker. What it could not write is written by the next call of the search: the
    study holds everything that the tracker is told."""

    def __init__(
        self, tracker: Tracker, parent: str, *, kind: str = "trial", limits: Mapping[str, float] | None = None
    ) -> None:
        """
        Args:
            parent: id of the run below which the trials are recorded.
            kind: what the trials are, for ``emolab.kind`` and the names of the runs.
            limits: of an acceptable model, by name; what was measured for them is recorded.
        """
        self._tracker, self._parent, self._kind, self._tag = tracker, parent, kind, f"emolab.{kind}"
        self._limits = dict(limits or {})
        self._runs: dict[int, Run] = {}
        self._tasks: queue.SimpleQueue[tuple[int | None, Callable[[], object]] | None] = queue.SimpleQueue()
        self._version: dict[str, str] | None = None
        self.trouble = ""
        """The first thing that could not be written."""
        self._thread = threading.Thread(target=self._work, name="trial-recorder", daemon=True)
        self._thread.start()

    def began(self, number: int, parameters: Mapping[str, Any]) -> None:
        """A trial has been drawn."""
        self._add(number, lambda: self._begin(number, parameters))

    def epochs(self, number: int, metrics: Sequence[Mapping[str, float]]) -> None:
        """A trial has finished some epochs."""
        self._add(number, lambda: self._log(number, metrics))

    def ended(self, record: TrialRecord) -> None:
        """A trial has ended, and the study holds that."""
        self._add(record.number, lambda: self._end(record))

    def catch_up(self, study: Study) -> None:
        """Write what an earlier process has left unwritten, and close what it left open."""
        curves = {record.number: (record, study.curves(record.number)) for record in study.records()}
        self._add(None, lambda: self._complete(curves))

    def resumed(self, number: int, parameters: Mapping[str, Any], curve: Sequence[Mapping[str, float]]) -> None:
        """A trial that an earlier process has begun goes on; after ``catch_up``, which has closed its run.

        Args:
            curve: metrics of its epochs so far, the last of which that process may not have come to tell.
        """
        written = list(curve)  # the trial's own goes on
        self._add(number, lambda: self._resume(number, parameters, written))

    def close(self) -> None:
        """Wait until everything is written. The runs of trials that have not ended are closed as interrupted."""
        self._tasks.put(None)
        self._thread.join()

    def _add(self, number: int | None, task: Callable[[], object]) -> None:
        if self._tracker.uri:
            self._tasks.put((number, task))

    def _work(self) -> None:
        broken: set[int | None] = set()
        while (entry := self._tasks.get()) is not None:
            self._attempt(*entry, broken)
        for number, run in list(self._runs.items()):
            self._attempt(number, partial(_interrupt, run), broken)

    def _attempt(self, number: int | None, task: Callable[[], object], broken: set[int | None]) -> None:
        if number in broken:  # its run stays open, by which the next call knows that something is missing
            return
        try:
            task()
        except Exception as error:  # a tracker in trouble must not cost a trial
            broken.add(number)
            self.trouble = self.trouble or " ".join(str(error).split())[:200]

    def _begin(self, number: int, parameters: Mapping[str, Any]) -> Run:
        tags = {"emolab.kind": self._kind, self._tag: str(number), "emolab.trial_state": _RUNNING}
        run = self._tracker.start(f"{self._kind}-{number:04d}", parent=self._parent, tags=self._code() | tags)
        run.log_parameters(parameters)
        self._runs[number] = run
        return run

    def _code(self) -> dict[str, str]:
        self._version = self._version or code_version()
        return self._version

    def _resume(self, number: int, parameters: Mapping[str, Any], curve: Sequence[Mapping[str, float]]) -> None:
        runs = self._tracker.find(self._tag, str(number), parent=self._parent)
        if runs:
            known = {COMMIT: "unknown", CLEAN: "unknown"} | dict(self._tracker.tags(runs[0]))
            self._runs[number] = run = self._tracker.resume(runs[0])
            run.reopen()
            run.set_tags(together([known, self._code()]) | {"emolab.trial_state": _RUNNING})
        else:
            self._begin(number, parameters)
        self._log(number, curve)

    def _log(self, number: int, metrics: Sequence[Mapping[str, float]]) -> None:
        for point in metrics:
            values = {key: point[key] for key in TRACKED if key in point}
            self._runs[number].log_metrics(values, step=int(point["epoch"]))

    def _end(self, record: TrialRecord) -> None:
        run = self._runs.pop(record.number)
        if record.robustness is not None:
            run.log_metrics({ROBUSTNESS: record.robustness}, step=record.epochs)
        if measured := record.measured(self._limits):
            run.log_metrics({f"model_{name}": value for name, value in measured.items()}, step=record.epochs)
        run.finish("FAILED" if record.state == "FAIL" else "FINISHED")
        # The state comes last: it is how the next call knows that nothing is missing.
        tags = {"emolab.trial_state": _STATES[record.state]}
        reasons = {"FAIL": {"failure": record.reason}, "PRUNED": {"emolab.stopped_by": stopped_by(record)}}
        run.set_tags(tags | reasons.get(record.state, {}))

    def _complete(self, trials: Mapping[int, tuple[TrialRecord, Sequence[Mapping[str, float]]]]) -> None:
        mine = set(self._tracker.find("emolab.kind", self._kind, parent=self._parent))
        left_open, interrupted = (
            mine & set(self._tracker.find("emolab.trial_state", state, parent=self._parent))
            for state in (_RUNNING, _INTERRUPTED)
        )
        for number, (record, curves) in trials.items():
            runs = self._tracker.find(self._tag, str(number), parent=self._parent)
            if runs and runs[0] not in left_open | interrupted:  # one may have ended as its search was interrupted
                continue
            left_open -= set(runs)
            self._runs[number] = self._tracker.resume(runs[0]) if runs else self._begin(number, record.parameters)
            self._log(number, curves)
            self._end(record)
        for identity in left_open:
            _interrupt(self._tracker.resume(identity))


def _interrupt(run: Run) -> None:
    """Close the run of a trial that did not come to its end."""
    run.finish("KILLED")
    run.set_tags({"emolab.trial_state": _INTERRUPTED})
