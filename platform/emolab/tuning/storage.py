"""A study in memory whose database is written behind it.

Optuna's relational storage makes one transaction of every parameter, value and attribute: about a hundred
milliseconds for a short trial, all of it while a trial's process waits for its next task. Here every question is
answered from memory, and one thread brings the database up to date, all that has changed in one transaction. What is
in the database is never ahead of memory and never half a draw (all parameters of a trial, or none); what `durable`
says is there survives the death of the process.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from emolab.databases import message_of, sqlite_file
from emolab.names import UserError
from emolab.tuning.study_file import check_study_file, damaged
from emolab.tuning.study_tables import StoredTrial, bring, storable, stored


class WriteBehindStorage(InMemoryStorage):
    """One study. Its database is opened, and read whole, when this object is made."""

    def __init__(self, url: str, name: str, directions: Sequence[StudyDirection]) -> None:
        """Open or create a study.

        Args:
            url: of the database, as SQLAlchemy writes it.

        Raises:
            UserError: the database cannot be opened, or its file is damaged.
        """
        super().__init__()
        self.url = url
        self._gate = threading.RLock()
        self._blocks = 0
        """Blocks of `together` that have not ended: they begin the writing, after work has been given out in them."""
        self._condition = threading.Condition()
        self._changed: set[int] = set()
        self._writing: frozenset[int] = frozenset()
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._seen_as_pruned: frozenset[int] = frozenset()
        self._hidden: frozenset[int] = frozenset()
        self._seen_as_it_was: FrozenTrial | None = None
        self._written: dict[int, StoredTrial] = {}
        file = sqlite_file(url)
        if file is not None:
            check_study_file(file)
        try:
            self._database = RDBStorage(url)
            self._remote = _open_study(self._database, name, directions)
            there = len(self._database.get_study_directions(self._remote))
            if there != len(directions):
                raise UserError(
                    f"the study {name} was made with {there} objective(s), not {len(directions)}: choose another name"
                )
            self._local = super().create_new_study(directions, name)
            for trial in self._database.get_all_trials(self._remote, deepcopy=False):
                self._adopt(trial)
            for key, value in self._database.get_study_system_attrs(self._remote).items():
                super().set_study_system_attr(self._local, key, value)
            for key, value in self._database.get_study_user_attrs(self._remote).items():
                super().set_study_user_attr(self._local, key, value)
        except UserError:
            raise
        except (optuna.exceptions.OptunaError, SQLAlchemyError, OSError, ImportError) as error:
            raise UserError(f"the study's database {url} cannot be opened: {message_of(error)}") from None
        except (ValueError, KeyError) as error:  # what is stored as JSON is none any more
            if file is None:
                raise
            raise UserError(damaged(file, message_of(error))) from None

    def _adopt(self, trial: FrozenTrial) -> None:
        super().create_new_trial(self._local, storable(trial))
        self._written[trial.number] = stored(trial)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What happens in the block reaches the database at once, and nothing of it before the block has ended."""
        with self._gate:
            self._blocks += 1
            try:
                yield
            finally:
                self._blocks -= 1
                if not self._blocks:
                    self._write_behind()

    @contextmanager
    def seen_as_pruned(self, numbers: Collection[int]) -> Iterator[None]:
        """In the block, these trials are shown as PRUNED if they run: a sampler takes a trial that runs for a bad
        one, and one that has paused is what it should learn from."""
        self._seen_as_pruned = frozenset(numbers)
        try:
            yield
        finally:
            self._seen_as_pruned = frozenset()

    @contextmanager
    def hiding(self, numbers: Collection[int]) -> Iterator[None]:
        """In the block, these trials are not among those of the study: a pruner compares a trial with whatever has
        reached its rung."""
        self._hidden = frozenset(numbers)
        try:
            yield
        finally:
            self._hidden = frozenset()

    @contextmanager
    def seen_as_it_was(self, trial: FrozenTrial) -> Iterator[None]:
        """In the block, a trial is shown as it was before: a pruner leaves notes in trials, and counts them all."""
        self._seen_as_it_was = trial
        try:
            yield
        finally:
            self._seen_as_it_was = None

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        seen, hidden, before = self._seen_as_pruned, self._hidden, self._seen_as_it_was
        if not (seen or hidden or before) or states == (TrialState.WAITING,):
            return super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        trials = [t for t in super().get_all_trials(study_id, deepcopy=deepcopy) if t.number not in hidden]
        trials = [_as_pruned(t) if t.number in seen and t.state == TrialState.RUNNING else t for t in trials]
        if before is not None:
            trials = [before if t.number == before.number else t for t in trials]
        return trials if states is None else [trial for trial in trials if trial.state in states]

    def durable(self, number: int) -> bool:
        """Whether the database holds all that is known of a trial."""
        self._complain()
        with self._condition:
            return number not in self._changed and number not in self._writing

    def flush(self) -> None:
        """Wait until the database holds everything.

        Raises:
            UserError: it cannot be written.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._error is not None or not (self._changed or self._writing))
        self._complain()

    # What follows does as the class above does, and remembers which trial changed.

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self._mark(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._mark(trial_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        changed = super().set_trial_state_values(trial_id, state, values)
        self._mark(trial_id)
        return changed

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._mark(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, value)
        self._mark(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        self._mark(trial_id)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_system_attr(study_id, key, value)
        self._database.set_study_system_attr(self._remote, key, value)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, value)
        self._database.set_study_user_attr(self._remote, key, value)

    def _mark(self, trial_id: int) -> None:
        self._complain()
        number = self.get_trial_number_from_id(trial_id)
        with self._condition:
            self._changed.add(number)
        if not self._blocks:
            self._write_behind()

    def _write_behind(self) -> None:
        """See to it that what has changed is being written."""
        with self._condition:
            if self._changed and self._writer is None:
                self._writer = threading.Thread(target=self._write_changed, name="study-writer", daemon=True)
                self._writer.start()

    def _write_changed(self) -> None:
        """The thread: it ends when there is nothing left to write."""
        while True:
            with self._gate, self._condition:
                numbers, self._changed = sorted(self._changed), set()
                self._writing = frozenset(numbers)
                snapshots = [self._snapshot(number) for number in numbers]
            try:
                self._write(snapshots)
            except Exception as error:
                self._error = error
            with self._condition:
                self._writing = frozenset()
                self._condition.notify_all()
                if self._error is not None or not self._changed:
                    self._writer = None
                    return

    def _write(self, snapshots: Sequence[FrozenTrial]) -> None:
        """Bring trials of the database to snapshots of them, in one transaction: a process that is killed leaves no
        half of a change."""
        with self._database.engine.begin() as connection:
            written = {
                trial.number: bring(connection, self._remote, trial, self._written.get(trial.number))
                for trial in snapshots
            }
        self._written |= written

    def _snapshot(self, number: int) -> FrozenTrial:
        """A trial as it is now. A copy: Optuna's own trial objects add reports and attributes to the one they got
        when they were made."""
        trial = copy.copy(self.get_trial(self.get_trial_id_from_study_id_trial_number(self._local, number)))
        for part in ("params", "distributions", "intermediate_values", "user_attrs", "system_attrs"):
            setattr(trial, part, dict(getattr(trial, part)))
        return trial

    def _complain(self) -> None:
        if self._error is not None:
            raise UserError(f"the study's database {self.url} cannot be written: {message_of(self._error)}")


def _open_study(database: RDBStorage, name: str, directions: Sequence[StudyDirection]) -> int:
    try:
        return database.get_study_id_from_name(name)
    except KeyError:
        return database.create_new_study(directions, name)


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    shown = copy.copy(trial)
    shown.state = TrialState.PRUNED
    return shown
