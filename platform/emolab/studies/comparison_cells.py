"""The cells of a comparison, one Ray task each: trained all, then measured all on validation, then tested all.

A cell is one model with one seed. Every step can be repeated: a trained cell is found finished, a measured and a
tested one is left alone, so a comparison that was killed goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from emolab.cluster import user_error
from emolab.names import UserError
from emolab.studies.comparison_settings import Cell, TheorySettings
from emolab.studies.test_split import checkpoint_digest, score_on_test_split
from emolab.studies.theory import record_theory
from emolab.tracking.beginning import read_record
from emolab.tracking.runs import MLflowTracker, shared_tracker
from emolab.training.loop import NonFiniteLossError
from emolab.training.train import TrainedModel, train


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How the training of a cell ended."""

    run_id: str
    """Empty where training could not even begin."""
    seconds: float
    """Time this call spent on it; next to nothing for a cell that was trained before."""
    resumed: bool
    """Whether it was found finished."""
    training_seconds: float = 0.0
    """Time that all its epochs took, in whichever call."""
    epochs: int = 0
    macro_f1: float | None = None
    """On validation, of the kept weights."""
    checkpoint: str = ""
    """Digest of the kept weights."""
    failure: str = ""
    diverged: bool = False
    """The failure is a non-finite loss: the cell's result, not an accident."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how the tasks run."""

    tracker_uri: str
    experiment: str
    output: str
    """Folder of the results."""
    parent: str
    """Run id of the comparison."""
    concurrency: int
    gpus: float
    """Of each training task."""

    @contextmanager
    def tracker(self) -> Iterator[MLflowTracker]:
        """The tracker, for a task; what it records has arrived when the task ends."""
        tracker = shared_tracker(uri=self.tracker_uri, experiment=self.experiment, output=Path(self.output))
        assert isinstance(tracker, MLflowTracker)
        try:
            yield tracker
        finally:
            tracker.close()


def train_cells(cells: Sequence[Cell], place: Place, *, report: Callable[[str], None]) -> list[Trained]:
    """Train every cell, or find it trained; a cell that fails is part of the result."""
    remaining = Remaining(cells, place.concurrency)
    task = ray.remote(_train_cell).options(num_cpus=1, num_gpus=place.gpus)
    results: dict[int, Trained] = {}
    for index, outcome in _in_parallel(task, [(cell, place) for cell in cells], place.concurrency):
        if isinstance(outcome, Exception):
            outcome = Trained(run_id=_known_run(cells[index]), seconds=0.0, resumed=False, failure=str(outcome))
        results[index] = outcome
        remaining.note(cells[index], outcome)
        report(f"cell {len(results)} of {len(cells)}  {cells[index]}: {_describe(outcome)}{remaining}")
    return [results[index] for index in range(len(cells))]


def measure_cells(
    cells: Sequence[Cell],
    trained: Sequence[Trained],
    place: Place,
    settings: TheorySettings,
    *,
    report: Callable[[str], None],
) -> int:
    """Measure the paper's lemma and theorem on every trained cell where they are not measured yet; returns how many.

    Raises:
        UserError: a measurement could not be made or recorded.
    """
    if not settings.sessions:
        return 0
    tasks = [(cell, t, place, settings) for cell, t in zip(cells, trained, strict=True) if not t.failure]
    measured = 0
    answers = _in_parallel(ray.remote(_measure_cell).options(num_cpus=1), tasks, place.concurrency)
    for done, (index, outcome) in enumerate(answers, start=1):
        if isinstance(outcome, Exception):
            raise UserError(f"measuring {tasks[index][0]} failed: {outcome}; run the same command again")
        measured += outcome
        if outcome and done < len(tasks) and done % max(1, len(tasks) // 10) == 0:  # it can take as long as training
            report(f"Lemma 1 and Theorem 1: {done} of {len(tasks)} models")
    if measured:
        report(f"Lemma 1 and Theorem 1 measured on {measured} of {len(tasks)} models")
    return measured


def score_cells(
    cells: Sequence[Cell], trained: Sequence[Trained], place: Place, *, report: Callable[[str], None]
) -> int:
    """Open the test split once for every trained cell that has no test result yet; returns how often it was opened.

    Raises:
        UserError: a result could not be computed or recorded.
    """
    frozen = [outcome.checkpoint for outcome in trained if not outcome.failure]
    tasks = [(cell, t, place, frozen) for cell, t in zip(cells, trained, strict=True) if not t.failure]
    opened = 0
    for index, outcome in _in_parallel(ray.remote(_score_cell).options(num_cpus=1), tasks, place.concurrency):
        if isinstance(outcome, Exception):
            raise UserError(f"testing {tasks[index][0]} failed: {outcome}; run the same command again")
        opened += outcome
    known = f"; {len(tasks) - opened} had their results" if opened < len(tasks) else ""
    report(f"all models are frozen, test split opened for {opened} of {len(tasks)}{known}")
    return opened


_DYING_SECONDS = 60.0
"""A process that Ray has given up, or whose driver was killed, may hold its cell for so long."""


def _train_cell(cell: Cell, place: Place) -> Trained:
    torch.set_num_threads(1)
    started = time.perf_counter()
    resumed = _is_trained(cell)
    tags = {"emolab.kind": "cell", "emolab.model": cell.model, "emolab.seed": str(cell.seed)}
    try:
        with place.tracker() as tracker:
            trained = train(cell.settings, tracker=tracker, parent=place.parent, tags=tags, patience=_DYING_SECONDS)
        digest = checkpoint_digest(trained.folder / "model")
    except (UserError, OSError) as error:
        return Trained(
            run_id=_known_run(cell), seconds=time.perf_counter() - started, resumed=False,
            failure=_said(error), diverged=isinstance(error, NonFiniteLossError),
        )  # fmt: skip
    return Trained(
        run_id=trained.run_id,
        seconds=time.perf_counter() - started,
        resumed=resumed,
        training_seconds=_training_seconds(trained),
        epochs=trained.progress.epoch,
        macro_f1=trained.progress.reports[-1].get("kept_macro_f1"),
        checkpoint=digest,
    )


def _measure_cell(cell: Cell, trained: Trained, place: Place, settings: TheorySettings) -> bool:
    torch.set_num_threads(1)
    data = Path(cell.settings.data)
    with place.tracker() as tracker:
        return record_theory(cell.folder, data, settings, run_id=trained.run_id, tracker=tracker) is not None


def _score_cell(cell: Cell, trained: Trained, place: Place, frozen: list[str]) -> bool:
    torch.set_num_threads(1)
    with place.tracker() as tracker:
        return score_on_test_split(
            cell.folder,
            Path(cell.settings.data),
            run_id=trained.run_id,
            tracker=tracker,
            opened_by=place.parent,
            frozen=frozen,
            training_seconds=trained.training_seconds,
        )


def _in_parallel(task: Any, calls: Sequence[tuple[Any, ...]], concurrency: int) -> Iterator[tuple[int, Any]]:
    """(position, result) of every call as it ends, ``concurrency`` at a time. A user's mistake, a lost process and
    what the system refuses, such as a full disk, come as exceptions in place of the result; anything else is raised.
    """
    waiting = list(enumerate(calls))[::-1]
    running: dict[ray.ObjectRef, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < concurrency:
                index, arguments = waiting.pop()
                running[task.remote(*arguments)] = index
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(ready)
            yield index, _result(ready)
    finally:
        for reference in running:  # a shared cluster would go on with them
            ray.cancel(reference)


def _result(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = user_error(error)
        if isinstance(cause, UserError):
            return cause
        if isinstance(error.cause, OSError):
            return UserError(_said(error.cause))
        raise
    except RayError as error:  # a lost process comes as more than one class: a lost node has its own
        return UserError(f"its process was lost ({type(error).__name__})")


def _said(error: UserError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _known_run(cell: Cell) -> str:
    """Run id of a cell that failed, as ``train`` wrote it down before its first epoch."""
    try:
        record = read_record(cell.folder)
    except UserError:  # what is damaged is said by the failure itself
        return ""
    return record["run_id"] if record else ""


def _training_seconds(trained: TrainedModel) -> float:
    sessions = trained.manifest.splits["train"].sessions
    rates = [report["sessions_per_second"] for report in trained.progress.reports]
    return sum(sessions / rate for rate in rates if rate)


def _is_trained(cell: Cell) -> bool:
    return (cell.folder / "model").exists()


def _describe(outcome: Trained) -> str:
    if outcome.failure:
        return f"failed: {outcome.failure}"
    score = "" if outcome.macro_f1 is None else f", validation macro-F1 {outcome.macro_f1:.4f}"
    effort = "trained before" if outcome.resumed else f"{outcome.seconds:.0f} s"
    return f"{outcome.epochs} epochs{score}, {effort}"


class Remaining:
    """Estimate of the time left, from what the same model took with another seed, else from the mean.

    A cell that was trained by an earlier call takes no time worth counting.
    """

    def __init__(self, cells: Sequence[Cell], concurrency: int) -> None:
        self._left = [cell for cell in cells if not _is_trained(cell)]
        self._concurrency = concurrency
        self._seconds: dict[str, list[float]] = {}

    def note(self, cell: Cell, outcome: Trained) -> None:
        if cell in self._left:
            self._left.remove(cell)
        if not outcome.resumed and not outcome.failure:
            self._seconds.setdefault(cell.model, []).append(outcome.seconds)

    def seconds(self) -> float | None:
        """None where nothing is known or nothing is left."""
        means: Mapping[str, float] = {model: sum(taken) / len(taken) for model, taken in self._seconds.items()}
        if not means or not self._left:
            return None
        overall = sum(means.values()) / len(means)
        return sum(means.get(cell.model, overall) for cell in self._left) / min(self._concurrency, len(self._left))

    def __str__(self) -> str:
        seconds = self.seconds()
        if seconds is None:
            return ""
        return f"; about {seconds:.0f} s left" if seconds < 90 else f"; about {seconds / 60:.0f} min left"
