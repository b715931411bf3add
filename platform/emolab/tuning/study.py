"""The Optuna study: what was tried and how it ended; the truth from which a search resumes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from emolab.databases import sqlite_url
from emolab.tuning.claims import check_claim, check_methods, claim, draw_with
from emolab.tuning.importances import Importances, importances_of
from emolab.tuning.space import SearchSpace
from emolab.tuning.storage import WriteBehindStorage
from emolab.tuning.trials import (
    CURVES,
    EPOCHS,
    INTERRUPTED,
    PAUSED,
    REACHED,
    REASON,
    SCHEDULE,
    SECONDS,
    Draw,
    Objective,
    State,
    TrialRecord,
    counts,
    labels_of,
    record_of,
    value_of,
)

_GIVEN = "fixed_params"
"""System attribute of Optuna's: the values that a trial was enqueued with."""
_NAMES: dict[Objective, str] = {
    "macro_f1": "validation macro-F1",
    "robustness": "area under the missing-rate curve on validation",
}


class Study:
    """A study on disk, and the questions a search asks of it."""

    def __init__(
        self,
        database: Path | str,
        name: str,
        *,
        space: SearchSpace,
        objectives: Sequence[Objective] = ("macro_f1",),
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
    ) -> None:
        """Open or create a study.

        Args:
            database: an SQLite file, or the URL of a database as SQLAlchemy writes it.

        Raises:
            UserError: the database cannot be opened.
        """
        if isinstance(database, Path):
            database.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite_url(database)
        self.name, self.objectives, self._space = name, tuple(objectives), space
        self.url = database
        directions = [optuna.study.StudyDirection.MAXIMIZE] * len(objectives)
        self._storage = WriteBehindStorage(self.url, name, directions)
        self._study = optuna.load_study(
            study_name=name, storage=self._storage, sampler=sampler, pruner=pruner or NopPruner()
        )
        if not self._study.metric_names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study.set_metric_names([_NAMES[objective] for objective in objectives])
        self._running: dict[int, optuna.Trial] = {}
        self._paused: set[int] = set()

    def claim(self, made_with: Mapping[str, Any]) -> None:
        """Say what the trials of this study share, as ``claims.claim`` does."""
        claim(self._study, made_with)

    def draw_with(self, methods: Mapping[str, Any], *, trials: int, epochs: int | None = None) -> str:
        """Say what draws and stops the trials from here on, as ``claims.draw_with`` does.

        Args:
            trials: that the study shall hold.
            epochs: that they may take; None: as many as they need.
        """
        return draw_with(self._study, methods, finished=self.finished(), full=self._full(trials, epochs))

    def check(
        self,
        made_with: Mapping[str, Any],
        methods: Mapping[str, Any],
        *,
        trials: int,
        epochs: int | None = None,
        unknown: Collection[str] = (),
    ) -> None:
        """Refuse what ``claim`` and ``draw_with`` would, and write nothing.

        Args:
            unknown: names of ``made_with`` that cannot be said yet.
        """
        check_claim(self._study, made_with, unknown=unknown)
        check_methods(self._study, methods, finished=self.finished(), full=self._full(trials, epochs))

    def _full(self, trials: int, epochs: int | None) -> bool:
        """Whether the study holds all that it shall."""
        return self.finished() >= trials or (epochs is not None and self.epochs() >= epochs)

    def use_sampler(self, sampler: BaseSampler) -> None:
        """Draw with another sampler from here on."""
        self._study.sampler = sampler

    def requeue_interrupted(self, *, paused_at: Collection[int] = ()) -> int:
        """End trials that a killed search left running and queue their parameters again; returns how many.

        A trial that was being drawn when the search died has no parameters; another is drawn in its place.

        Args:
            paused_at: trials that have paused at these epochs are left as they are, for ``resume_paused``.
        """
        running = [t for t in self.history() if t.state == TrialState.RUNNING]
        interrupted = [t for t in running if t.user_attrs.get(PAUSED) not in paused_at]
        for trial in interrupted:
            with self._storage.together():
                identity = trial._trial_id  # pyright: ignore[reportPrivateUsage]
                self._storage.set_trial_user_attr(identity, REASON, INTERRUPTED)
                self._study.tell(trial.number, state=TrialState.FAIL)
                labels = labels_of(trial)
                values = trial.system_attrs.get(_GIVEN, {}) | trial.params
                if values or labels:
                    self._study.enqueue_trial(values, user_attrs=labels)
        self._storage.flush()
        return len(interrupted)

    def enqueue(self, parameters: Mapping[str, Any], labels: Mapping[str, Any], *, again: bool = False) -> None:
        """Have a configuration tried; one with the same labels that waits, runs or has ended is not queued again.

        Args:
            again: one that failed or was stopped is.
        """
        ended_badly = (TrialState.FAIL, TrialState.PRUNED) if again else ()
        known = [
            t.user_attrs
            for t in self.history()
            if t.user_attrs.get(REASON) != INTERRUPTED and t.state not in ended_badly
        ]
        if not any(all(attributes.get(key) == value for key, value in labels.items()) for attributes in known):
            self._study.enqueue_trial(dict(parameters), user_attrs=dict(labels))

    def ask(self) -> Draw:
        """The next configuration: one that waits in the queue, else a draw from the space."""
        with self._storage.together(), self._storage.seen_as_pruned(self._paused):
            trial = self._study.ask()
            self._running[trial.number] = trial
            return Draw(number=trial.number, parameters=self._space.draw(trial))

    def report(self, number: int, epoch: int, value: float) -> None:
        """The value of a running trial after an epoch; Optuna takes these for a single objective only."""
        trial = self._running[number]
        if len(self.objectives) == 1 and epoch not in self._frozen(number).intermediate_values:
            trial.report(value, epoch)

    def pause(self, number: int, curves: Sequence[Mapping[str, float]]) -> None:
        """A running trial waits for its turn; samplers learn from it as from one that was pruned where it stands.

        Args:
            curves: metrics of its epochs so far.
        """
        trial = self._running[number]
        with self._storage.together():
            trial.set_user_attr(CURVES, [dict(point) for point in curves])
            trial.set_user_attr(PAUSED, len(curves))
        self._paused.add(number)

    def go_on(self, number: int) -> None:
        """A paused trial runs again."""
        self._paused.discard(number)

    def resume_paused(self) -> list[tuple[Draw, list[dict[str, float]], float]]:
        """Trials that an earlier search left paused, or running after a pause: with the metrics of their epochs up
        to the last pause, and their value there."""
        waiting = [t for t in self.history() if t.state == TrialState.RUNNING and PAUSED in t.user_attrs]
        for trial in waiting:
            identity = trial._trial_id  # pyright: ignore[reportPrivateUsage]
            self._running[trial.number] = optuna.Trial(self._study, identity)
            self._paused.add(trial.number)
        return [
            (
                Draw(number=trial.number, parameters=dict(trial.params)),
                trial.user_attrs[CURVES][: trial.user_attrs[PAUSED]],
                trial.intermediate_values[trial.user_attrs[PAUSED]],
            )
            for trial in waiting
        ]

    def should_prune(self, number: int) -> bool:
        """Whether the pruner wants the trial to end at its last reported epoch."""
        with self._rivals():
            return len(self.objectives) == 1 and self._running[number].should_prune()

    def stopped(self, numbers: Sequence[int]) -> list[int]:
        """Those of these trials that the pruner wants to end at their last reported epoch, which is the same for all:
        each is judged by all the others, whatever their order."""
        if len(self.objectives) > 1:
            return []
        if len(numbers) == 1:  # as mostly; the pruner is asked once
            return [number for number in numbers if self.should_prune(number)]
        before = {number: self._frozen(number) for number in numbers}
        with self._rivals():
            for trial in before.values():  # the pruner counts as rivals those that it was asked about at this epoch
                self._study.pruner.prune(self._study, trial)
            return [number for number, trial in before.items() if self._stopped_among_others(trial)]

    def _rivals(self) -> AbstractContextManager[None]:
        """In the block a trial is not compared with those that a killed search left: they are run again, and would
        count twice."""
        return self._storage.hiding(
            [trial.number for trial in self.history() if trial.user_attrs.get(REASON) == INTERRUPTED]
        )

    def _stopped_among_others(self, before: FrozenTrial) -> bool:
        with self._storage.seen_as_it_was(before):
            return self._study.pruner.prune(self._study, before)

    def constrain(self, number: int, excess: Mapping[str, float]) -> None:
        """Limits and by how much the trial exceeds them; above zero is infeasible. Of the samplers TPE learns it."""
        for name, value in excess.items():
            if name not in self._running[number].constraints:
                self._running[number].set_constraint(name, value)

    def tell(
        self,
        number: int,
        state: State,
        values: Sequence[float] = (),
        *,
        reason: str = "",
        epochs: int = 0,
        seconds: float = 0.0,
        curves: Sequence[Mapping[str, float]] = (),
        schedule: Sequence[Mapping[str, Any]] = (),
        reached: int | None = None,
    ) -> None:
        """End a running trial: COMPLETE with its values, PRUNED with the last one reported, or FAIL with a reason.

        Args:
            schedule: where it changed its parameters.
            reached: the epoch that its value is of, where it did.
        """
        trial = self._running.pop(number)
        self._paused.discard(number)
        with self._storage.together():
            trial.set_user_attr(EPOCHS, epochs)
            trial.set_user_attr(SECONDS, round(seconds, 3))
            if curves:
                trial.set_user_attr(CURVES, [dict(point) for point in curves])
            if schedule:
                trial.set_user_attr(SCHEDULE, [dict(entry) for entry in schedule])
            if reached is not None:
                trial.set_user_attr(REACHED, reached)
            if reason:
                trial.set_user_attr(REASON, reason)
            self._study.tell(trial, list(values) if state == "COMPLETE" else None, state=TrialState[state])

    def deciding(self) -> AbstractContextManager[None]:
        """In the block nothing is written to the database: the processes of a search wait for what is decided there,
        and it is written while they train."""
        return self._storage.together()

    def durable(self, number: int) -> bool:
        """Whether the database holds all that is known of a trial."""
        return self._storage.durable(number)

    def flush(self) -> None:
        """Wait until the database holds everything."""
        self._storage.flush()

    def finished(self) -> int:
        """Trials that count towards the budget: all that ended for a reason of their own."""
        return sum(counts(trial) for trial in self.history())

    def epochs(self) -> int:
        """Epochs that those trials trained."""
        return sum(int(trial.user_attrs.get(EPOCHS, 0)) for trial in self.history() if counts(trial))

    def paused_epochs(self) -> int:
        """Epochs of the trials that wait at a rung, in this search or when an earlier one was left."""
        running = [trial for trial in self.history() if trial.state == TrialState.RUNNING]
        return sum(int(trial.user_attrs.get(PAUSED, 0)) for trial in running)

    def excess(self) -> dict[str, list[float]]:
        """Limit -> by how much each trial that was held to it exceeds it; negative where it stays below."""
        found: dict[str, list[float]] = {}
        for trial in self.history():
            for name, value in trial.constraints.items():
                found.setdefault(name, []).append(value)
        return found

    def unended(self) -> int:
        """Trials that are queued, run, or were left by a search that was killed."""
        return sum(not trial.state.is_finished() for trial in self.history())

    def waiting(self) -> int:
        """Trials that are queued."""
        return sum(trial.state == TrialState.WAITING for trial in self.history())

    def records(self) -> list[TrialRecord]:
        """Every trial that counts, best first, then pruned, then failed."""
        trials = [trial for trial in self.history() if counts(trial)]
        order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 1, TrialState.FAIL: 2}
        trials.sort(key=lambda trial: (order[trial.state], -(value_of(trial) or 0.0), trial.number))
        return [record_of(trial) for trial in trials]

    def order_of_end(self) -> list[int]:
        """Numbers of the trials that count, in the order in which they ended."""
        ended = [(t.datetime_complete, t.number) for t in self.history() if counts(t) and t.datetime_complete]
        return [number for _, number in sorted(ended)]

    def record(self, number: int) -> TrialRecord:
        """One trial."""
        return record_of(self._frozen(number))

    def curves(self, number: int) -> list[dict[str, float]]:
        """Metrics of every epoch of a trial."""
        return self._frozen(number).user_attrs.get(CURVES, [])

    def best(self) -> TrialRecord | None:
        """The completed trial with the best final value, with several objectives the best mean of them; None where
        none completed."""
        return next(iter(self.ranking()), None)

    def ranking(self) -> list[TrialRecord]:
        """The completed trials, best first."""
        complete = [record for record in self.records() if record.state == "COMPLETE" and record.value is not None]
        return sorted(complete, key=lambda record: (-record.mean_objective, record.number))

    def front(self) -> list[int]:
        """Numbers of the trials that no other trial beats in every objective."""
        return sorted(trial.number for trial in self._study.best_trials)

    def importances(self) -> Importances:
        """Which parameters told good trials from bad ones, as ``importances_of`` compares them."""
        return importances_of(self.history(), objectives=len(self.objectives))

    def history(self) -> Sequence[FrozenTrial]:
        """The trials in the order in which they were asked for."""
        return self._study.get_trials(deepcopy=False)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.history()[number]
