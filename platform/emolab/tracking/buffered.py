"""A tracker that can be dead, slow or failing without anybody waiting for it: what is written goes through an outbox.

What is read back waits for what was written before. Where the tracker cannot be reached, reading is refused with one
line; writing never is.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from emolab.commands import tool_command
from emolab.names import UserError, checked_name
from emolab.redaction import redact, redacted
from emolab.tracking.delivery import Delivery
from emolab.tracking.outbox import LOCAL, Outbox, addressees, adopted, new_local_id, now_milliseconds
from emolab.tracking.reasons import reason_of
from emolab.tracking.runs import MLflowTracker, RunRecord
from emolab.tracking.sending import PARENT_TAG, Sender, is_refusal
from emolab.tracking.tracker import Run, Status

Answer = TypeVar("Answer")

FOLDER = "outbox"
_BEGINNING = 3.0
"""Seconds for which the beginning of a run waits for the tracker's name of it."""
_READING = 120.0
_ENDING = 10.0


class BufferedRun(Run):
    """A run whose records go into the outbox."""

    def __init__(self, outbox: Outbox, delivery: Delivery, run_id: str, *, resumed: bool = False) -> None:
        self._outbox, self._delivery, self._resumed = outbox, delivery, resumed
        self.run_id = run_id
        self._recorded: set[tuple[str, int]] = set()

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        new = {name: float(value) for name, value in metrics.items() if (name, step) not in self._recorded}
        self._recorded |= {(name, step) for name in new}
        if new:
            content = {"step": step, "values": new, "time": now_milliseconds(), "resumed": self._resumed}
            self._outbox.add(self.run_id, "metrics", content)
            self._delivery.wake()

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        values = {name: redact(str(value))[:6000] for name, value in redacted(dict(parameters)).items()}
        self._outbox.add(self.run_id, "parameters", values)
        self._delivery.wake()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._outbox.add(self.run_id, "tags", redacted(dict(tags)))
        self._delivery.wake()

    def log_file(self, path: Path, *, folder: str | None = None) -> None:
        self._outbox.add_file(self.run_id, path, folder)
        self._delivery.wake()

    def log_text(self, text: str, name: str) -> None:
        self._outbox.add_text(self.run_id, redact(text), name)
        self._delivery.wake()

    def reopen(self) -> None:
        self._outbox.add(self.run_id, "reopen", {})
        self._delivery.wake()

    def finish(self, status: Status = "FINISHED") -> None:
        self._outbox.add(self.run_id, "finish", {"status": status, "time": now_milliseconds()})
        self._delivery.wake()


class BufferedTracker(MLflowTracker):
    """An experiment on a tracker that is somewhere else."""

    def __init__(self, uri: str, experiment: str, *, output: Path) -> None:
        """Open the outbox; what earlier processes left in the same folder is sent as well.

        Args:
            output: folder of the results, of which the outbox takes a folder.

        Raises:
            UserError: the tracker can be reached and refuses, or the address is none.
        """
        self.uri = uri
        self._name, self._id = experiment, None
        try:
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        except MlflowException as error:
            raise UserError(f"the tracker {without_credentials(uri)} cannot be used: {reason_of(error)}") from None
        self._outbox = Outbox.create(output / FOLDER, tracker=without_credentials(uri), experiment=experiment)
        self._delivery = Delivery(self._client, self._outbox)
        self._closed, self._prompt = False, True
        atexit.register(self.close)
        if not self._delivery.settle(_ENDING):
            reason = self._delivery.wrong or self._delivery.trouble or f"no answer within {_ENDING:.0f} s"
            if self._delivery.wrong:
                self.close()
                raise UserError(f"the tracker {without_credentials(uri)} cannot be used: {reason}")
            self._warn(f"cannot be reached now ({reason}); records wait in {self._outbox.path.parent} until it can")

    @property
    def client(self) -> MlflowClient:
        self._settle()
        return self._client

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
    ) -> Run:
        local = new_local_id() if key is None else LOCAL + key
        all_tags = dict(tags or {}) | ({PARENT_TAG: parent} if parent else {})
        content = {"name": checked_name(name, what="run name"), "tags": redacted(all_tags), "time": now_milliseconds()}
        # With a key, a process before this one may have begun it, and may even have left that in an outbox of its own.
        again = key is not None
        self._outbox.add(checked_name(local, what="run key"), "begin", content | {"again": again})
        self._delivery.wake()
        if self._prompt and not self._delivery.trouble:
            self._prompt = self._delivery.settle(_BEGINNING)  # a search begins many runs: a slow tracker delays one
        return BufferedRun(self._outbox, self._delivery, self._outbox.remote(local) or local, resumed=again)

    def resume(self, run_id: str, *, parent: str | None = None) -> Run:
        # Below another parent only where that one was begun anew, which is not noticed from here.
        return BufferedRun(self._outbox, self._delivery, run_id, resumed=True)

    def settle(self, run_id: str) -> str | None:
        try:
            self._settle()
            return self._delivery.sender.remote(self._outbox, run_id)
        except (UserError, MlflowException):
            return None

    def find(self, tag: str, value: str, *, parent: str | None = None) -> Sequence[str]:
        return self._ask(lambda: MLflowTracker.find(self, tag, value, parent=self._remote(parent) if parent else None))

    def find_anywhere(self, tag: str, value: str) -> Sequence[str]:
        return self._ask(lambda: MLflowTracker.find_anywhere(self, tag, value))

    def children(self, run_id: str) -> list[str]:
        return self._ask(lambda: MLflowTracker.children(self, self._remote(run_id)))

    def read(self, run_id: str) -> RunRecord:
        return self._ask(lambda: MLflowTracker.read(self, self._remote(run_id)))

    def artifact(self, run_id: str, name: str) -> bytes:
        return self._ask(lambda: MLflowTracker.artifact(self, self._remote(run_id), name))

    def instructions(self) -> str:
        return without_credentials(self.uri)

    def close(self) -> int:
        """Send what can be sent in a few seconds; what cannot waits on disk, and a line says where.

        Returns:
            How many records wait.
        """
        if self._closed:
            return 0
        self._closed = True
        atexit.unregister(self.close)
        waiting = self._delivery.close(0.0 if self._delivery.wrong else _ENDING)
        if waiting and not self._delivery.wrong:
            folder, address = self._outbox.path.parent, without_credentials(self.uri)
            # An address with a password is not told: it stands in the environment, where the command finds it.
            named = ["--uri", address] if address == self.uri else []
            deliver = tool_command("emolab", "deliver", str(folder.parent), *named)
            self._warn(
                f"has not received {waiting} records ({self._delivery.trouble or 'too slow'}): they wait in {folder}, "
                f"and the next job with this output, or `{deliver}`, sends them"
            )
        return waiting

    def _settle(self) -> None:
        if not self._delivery.settle(_READING, of_all=True):
            address, reason = without_credentials(self.uri), self._delivery.wrong or self._delivery.trouble
            raise UserError(f"the tracker {address} cannot be reached: {reason or 'it is too slow'}")
        self._prompt = True

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """Read something, when everything that was written has arrived; a failing tracker is asked again."""
        self._settle()
        for pause in (0.1, 0.3, 1.0):
            try:
                return question()
            except MlflowException as error:
                if is_refusal(error):
                    raise
                time.sleep(pause)
        try:
            return question()
        except MlflowException as error:
            raise UserError(f"the tracker {without_credentials(self.uri)} cannot be read: {reason_of(error)}") from None

    def _remote(self, run_id: str) -> str:
        if not run_id.startswith(LOCAL):
            return run_id
        try:
            return self._delivery.sender.remote(self._outbox, checked_name(run_id, what="run id"))
        except MlflowException as error:
            if not is_refusal(error):
                raise
            raise UserError(f"the tracker {without_credentials(self.uri)} has no run {run_id}") from None

    def _warn(self, what: str) -> None:
        sys.stderr.write(f"the tracker {without_credentials(self.uri)} {what}\n")


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """What became of the outboxes of a folder."""

    sent: int
    waiting: int
    refused: tuple[str, ...]
    """One line for each record that the tracker will never take."""
    others: tuple[str, ...]
    """Trackers that other outboxes of the folder are for."""
    trouble: str

    def describe(self) -> str:
        """The outcome in words, and what is to be done about what waits."""
        lines = [f"{self.sent} records sent, {self.waiting} wait" + (f": {self.trouble}" if self.trouble else "")]
        lines += [f"refused: {line}" for line in self.refused]
        if self.waiting and self.trouble in ("HTTP 401", "HTTP 403"):
            lines.append("next    set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, then run this again")
        elif self.waiting:
            lines.append("next    run this again when the tracker answers; until then nothing that waits is lost")
        others = [f"there are records for another tracker, {it}: send them with --uri {it}" for it in self.others]
        return "\n".join(lines + others)


def send_left_behind(output: Path, uri: str) -> Delivered:
    """Send what ended processes left in a folder's outbox; a tracker in trouble is part of the answer."""
    folder, address = output / FOLDER, without_credentials(uri)
    sent, waiting, refused, trouble = 0, 0, [], ""
    with adopted(folder, tracker=address) as left_behind:
        sender = Sender(MlflowClient(tracking_uri=uri))
        for outbox in left_behind:
            try:
                sent += sender.send(outbox, again=True)
            except Exception as error:  # whatever the tracker does, the other outboxes have their turn
                trouble = reason_of(error)
            waiting += outbox.count()
            refused += outbox.refusals()
    others = tuple(sorted(addressees(folder) - {address}))
    return Delivered(sent=sent, waiting=waiting, refused=tuple(refused), others=others, trouble=trouble)


def without_credentials(uri: str) -> str:
    """An address without user name and password."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
