"""What the platform asks of a tracker, and the twin that records nothing."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from emolab.names import UserError

Status = Literal["FINISHED", "FAILED", "KILLED"]


class MissingRunError(UserError):
    """The tracker does not hold a run, or not any more: it or the tracker's whole store was deleted."""


class Run(ABC):
    """One tracked run. Contract, checked for every implementation by one suite of tests:

    - logging the same metric of the same step twice leaves it recorded once;
    - ``finish`` may be called again after a run was resumed;
    - values are flat JSON; nested parameters are flattened with dots by the caller.
    """

    run_id: str

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the metrics of one step."""

    @abstractmethod
    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Record what the run was given; later calls may add names, not change values."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""

    @abstractmethod
    def log_file(self, path: Path, *, folder: str | None = None) -> None:
        """Store a file, or all files of a folder, as artifacts."""

    @abstractmethod
    def log_text(self, text: str, name: str) -> None:
        """Store a text as the artifact ``name``."""

    @abstractmethod
    def reopen(self) -> None:
        """Say of a run that was closed, or whose process was killed, that it is running again."""

    @abstractmethod
    def finish(self, status: Status = "FINISHED") -> None:
        """Close the run."""

    def log_json(self, value: Any, name: str) -> None:
        """Store JSON as the artifact ``name``."""
        self.log_text(json.dumps(value, indent=1, allow_nan=False), name)


@contextmanager
def ending(run: Run) -> Iterator[None]:
    """Close a run where the block does not come to its end: FAILED by an error, KILLED by an interruption.

    The next call of the same takes the run up again.
    """
    try:
        yield
    except Exception:
        run.finish("FAILED")
        raise
    except BaseException:
        run.finish("KILLED")
        raise


class Tracker(ABC):
    """Where runs are recorded."""

    uri: str

    @abstractmethod
    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
    ) -> Run:
        """Begin a run.

        Args:
            parent: a run id.
            key: where a run of this experiment was begun under it before, that run is taken up again.
        """

    @abstractmethod
    def resume(self, run_id: str, *, parent: str | None = None) -> Run:
        """Go on with a run that was begun before, here or in another process.

        Args:
            parent: the run below which it stands from here on; None: as it is.

        Raises:
            MissingRunError: the tracker says at once that it has no such run.
        """

    @abstractmethod
    def find(self, tag: str, value: str, *, parent: str | None = None) -> Sequence[str]:
        """Ids of the runs of this experiment that carry a tag, newest first."""

    def tags(self, run_id: str) -> Mapping[str, str]:
        """What a run is tagged with, where runs are kept."""
        return {}

    def settle(self, run_id: str) -> str | None:
        """Wait until the tracker has everything that was written.

        Returns:
            The tracker's own id of the run; None where the tracker cannot be reached.
        """
        return run_id

    def close(self) -> int:
        """Write no more.

        Returns:
            How many records the tracker has not received; they are kept and sent by a later job.
        """
        return 0

    @abstractmethod
    def instructions(self) -> str:
        """The command with which a person looks at the runs."""


class NoRun(Run):
    """Records nothing."""

    run_id = "untracked"

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None: ...

    def log_parameters(self, parameters: Mapping[str, Any]) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_file(self, path: Path, *, folder: str | None = None) -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def reopen(self) -> None: ...

    def finish(self, status: Status = "FINISHED") -> None: ...


class NoTracker(Tracker):
    """For runs that nobody wants to keep."""

    uri = ""

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, key: str | None = None
    ) -> Run:
        return NoRun()

    def resume(self, run_id: str, *, parent: str | None = None) -> Run:
        return NoRun()

    def find(self, tag: str, value: str, *, parent: str | None = None) -> Sequence[str]:
        return []

    def instructions(self) -> str:
        return "tracking is disabled"
