"""The driver of packed trials: long-lived processes that are never without work, decided trial by trial.

Optuna draws and judges in this process; Ray holds the processes that train. With one process the order of draws,
reports and decisions is fixed, so the search is reproducible trial by trial.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emolab.cluster import free
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.tuning.grouping import in_one_step, shape
from emolab.tuning.halving import Halving
from emolab.tuning.pack import Answer, PackSettings
from emolab.tuning.pausing import paused_trial
from emolab.tuning.processes import LostProcessError, Process, Processes
from emolab.tuning.recorder import TRACKED, TrialRecorder
from emolab.tuning.spoken import Spoken
from emolab.tuning.study import Study
from emolab.tuning.trials import OVER, SPENT, Draw, State

_SILENCE_SECONDS = 60.0
"""After so long without a line, the search says where it stands."""


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """How packed trials are run."""

    pack: PackSettings
    processes: int
    resources: Mapping[str, float]
    """Of each process, by Ray's names."""
    trials: int
    """In the study when the search is over."""
    epoch_budget: int | None = None
    rungs: Sequence[int] = ()
    """Epochs after which it is decided whether a trial goes on."""
    halving: int | None = None
    """Trials pause at the rungs, and one in so many goes on from each; otherwise the study is asked at once."""
    fused: int = 1
    """Configurations trained in one step by a process, at most."""
    retries: int = 2
    """How often a trial is begun anew after its process was lost."""
    timeout_s: float | None = None
    kind: str = "trial"
    """What a trial is called in what people read."""


@dataclass
class _Trial:
    """A trial that has been drawn and has not ended."""

    draw: Draw
    started: float
    curve: list[dict[str, float]] = field(default_factory=list)
    """Metrics of its epochs."""
    granted: int = 0
    """The epoch to which it may train now: those up to there are taken from the budget."""
    value: float | None = None
    """Of the weights it would keep after the last one."""
    losses: int = 0


class PackedTrials:
    """One run of the driver."""

    def __init__(
        self,
        plan: PackedPlan,
        study: Study,
        recorder: TrialRecorder,
        report: Callable[[str], None],
        *,
        deadline: float = math.inf,
    ) -> None:
        """
        Args:
            deadline: by the monotonic clock; no trial starts after it.
        """
        self._plan, self._study, self._recorder, self._deadline = plan, study, recorder, deadline
        self._report = Spoken(report, silence_s=_SILENCE_SECONDS)
        self._running: dict[int, _Trial] = {}
        self._again: deque[list[Draw]] = deque()
        self._told: deque[int] = deque()
        self._drawn: Draw | None = None
        self._processes = Processes(plan.pack, plan.resources, timeout_s=plan.timeout_s, retries=plan.retries)
        self._fused = plan.fused
        self._base = TrainSettings.model_validate(plan.pack.base)
        self._halving = None
        if plan.halving is not None and plan.rungs:
            self._halving = Halving(plan.rungs, factor=plan.halving, trials=plan.trials)

    def run(self) -> None:
        """Run trials until the study holds all of them.

        Raises:
            UserError: the data are of no use, the study cannot be written, or every process was lost for good.
        """
        self._resume_paused()
        try:
            if self._running or self._may_start():
                self._work()
            self._study.flush()
            self._acknowledge()
        finally:
            self._processes.end()

    def _work(self) -> None:
        self._processes.start(min(self._plan.processes, self._all() - self._study.finished()))
        answered: list[Process] = []
        while self._decide(answered):
            self._acknowledge()  # while the processes work
            answered = self._processes.wait()
            self._report.break_silence(self._standing)

    def _resume_paused(self) -> None:
        """Take up the trials that an earlier call left at a rung."""
        if self._halving is None:
            return
        for record in self._study.records():
            self._halving.count_ended(record.epochs, failed=record.state == "FAIL")
        paused = self._study.resume_paused()
        if paused:
            self._report(f"{len(paused)} trials go on from where they paused")
        for draw, curve, value in paused:
            self._running[draw.number] = _Trial(draw=draw, started=time.perf_counter(), curve=curve, value=value)
            self._halving.pause(draw.number, len(curve), value)
            self._recorder.resumed(draw.number, draw.parameters, curve)
        self._end_hopeless()

    def _decide(self, answered: Sequence[Process]) -> bool:
        """Take the answers of these processes and give out work; whether there is anything to wait for."""
        with self._study.deciding():
            for process in answered:
                self._take(process)
            for process, reason in self._processes.hung():
                self._lost(process, reason)
            return self._occupy()

    def _occupy(self) -> bool:
        """Give every idle process a group of trials; whether there is anything to wait for."""
        for process in self._processes.idle():
            if group := self._next_group():
                self._advance(process, group)
        return bool(self._running) or bool(self._again) or self._may_start()

    def _may_start(self) -> bool:
        there = self._study.finished() + len(self._running)
        return there < self._plan.trials and self._epochs_left() > 0 and not self._late()

    def _late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _all(self) -> int:
        """Trials in the study when the search is over: more than planned where more had begun."""
        return max(self._plan.trials, self._study.finished() + len(self._running))

    def _epochs_left(self) -> int:
        """Of the budget, when all trials have trained what was granted to them."""
        if self._plan.epoch_budget is None:
            return 2**31
        taken = sum(max(len(trial.curve), trial.granted) for trial in self._running.values())
        return self._plan.epoch_budget - self._study.epochs() - taken

    def _spent(self) -> bool:
        """Whether nothing of the budget is left, nor can come back from a trial that ends early."""
        return self._epochs_left() <= 0 and not any(trial.granted for trial in self._running.values())

    def _next_group(self) -> list[Draw]:
        """Trials to run: those that begin anew, else new draws that share their shapes, else a paused one."""
        while self._again:
            if group := self._affordable(self._again.popleft()):
                return group
        if self._drawn is not None and self._late():
            del self._running[self._drawn.number]  # the next call begins with it
            self._drawn = None
        if self._drawn is not None and self._spent():
            number, self._drawn = self._drawn.number, None
            self._end_spent(number)
        group = []
        unended = self._all() - self._study.finished()
        share = in_one_step(self._fused, trials=unended, processes=self._plan.processes)
        most = min(share, self._epochs_left())
        while len(group) < most and (self._drawn is not None or self._may_start()):
            draw, self._drawn = self._drawn or self._draw(), None
            if group and shape(draw.parameters) != shape(group[0].parameters):
                self._drawn = draw  # the next group begins with it
                break
            group.append(draw)
        return group or self._paused()

    def _paused(self) -> list[Draw]:
        """The trial that goes on from its rung, where that is decided."""
        number = self._halving.go_on(self._unstarted()) if self._halving is not None else None
        if number is None:
            return []
        self._study.go_on(number)
        return [self._running[number].draw]

    def _unstarted(self) -> int:
        return self._plan.trials - self._study.finished() - len(self._running) if self._may_start() else 0

    def _draw(self) -> Draw:
        draw = self._study.ask()
        self._running[draw.number] = _Trial(draw=draw, started=time.perf_counter())
        self._recorder.began(draw.number, draw.parameters)
        if self._halving is not None:
            self._halving.begin(draw.number)
        return draw

    def _advance(self, process: Process, group: list[Draw]) -> None:
        """Have a process train trials that can afford an epoch each, to the next rung or as far as the budget goes."""
        trials = [self._running[draw.number] for draw in group]
        epoch = max(len(trial.curve) for trial in trials)
        rung = next((rung for rung in self._plan.rungs if rung > epoch), self._base.training.epochs)
        until = min(max(rung, epoch + 1), epoch + self._epochs_left() // len(group))
        for trial in trials:
            trial.granted = until
        process.advance(group, until, told=epoch)

    def _affordable(self, group: list[Draw]) -> list[Draw]:
        """Of these trials as many as the budget has an epoch for; the others end."""
        most = max(0, self._epochs_left())
        for draw in group[most:]:
            self._end_spent(draw.number)
        return group[:most]

    def _take(self, process: Process) -> None:
        try:
            answers = self._processes.answer(process)
        except LostProcessError as loss:
            self._lost(process, str(loss))
            return
        at_rung = [draw.number for draw in process.group if self._hear(draw.number, answers[draw.number])]
        waiting = self._pass(at_rung)
        group = [draw for draw in process.group if draw.number in self._running and draw.number not in waiting]
        for draw in group:
            self._running[draw.number].granted = 0  # to be granted anew, with what the others have left by now
        if any(answers[draw.number].crowded for draw in group):
            self._part(group)
        elif group := self._affordable(group):
            self._advance(process, group)

    def _part(self, group: list[Draw]) -> None:
        """Begin trials anew, half of them in a step, for whose step the memory was too small; later ones likewise."""
        half = (len(group) + 1) // 2
        self._fused = min(self._fused, half)
        self._again += [part for part in (group[:half], group[half:]) if part]
        self._report(f"{len(group)} configurations in one step do not fit the memory: from here at most {half}")

    def _hear(self, number: int, answer: Answer) -> bool:
        """Tell the study what became of a trial; whether it has come to a rung."""
        trial = self._running[number]
        new = [report for report in answer.reports if report.epoch > len(trial.curve)]
        for report in new:
            trial.curve.append(_curve_point(report))
            trial.value = report.kept_macro_f1
            if trial.value is not None:
                self._study.report(number, report.epoch, trial.value)
        self._recorder.epochs(number, trial.curve[len(trial.curve) - len(new) :])
        self._study.constrain(number, answer.excess)
        over = [name for name, value in answer.excess.items() if value > 0]
        if answer.failure:
            self._end(number, "FAIL", reason=answer.failure)
        elif over:
            self._end(number, "PRUNED", reason=f"{OVER}: {', '.join(over)}")
        elif answer.reports and answer.reports[-1].finished:
            self._end(number, "COMPLETE", values=_values(answer.reports[-1], answer))
        else:
            return bool(new) and len(trial.curve) in self._plan.rungs  # one begun anew passes its old rungs unasked
        return False

    def _pass(self, numbers: list[int]) -> list[int]:
        """Decide about trials of one process that have come to a rung; those that wait there."""
        if self._halving is None:
            for number in self._study.stopped(numbers):
                self._end(number, "PRUNED", reason=f"pruned after epoch {len(self._running[number].curve)}")
            return []
        for number in numbers:
            trial = self._running[number]
            trial.granted = 0
            self._halving.pause(number, len(trial.curve), trial.value or 0.0)
            self._study.pause(number, trial.curve)
            self._end_hopeless()
        return numbers

    def _end_hopeless(self) -> None:
        """End the paused trials that can never go on."""
        assert self._halving is not None
        for number in self._halving.hopeless():
            self._end(number, "PRUNED", reason=f"pruned after epoch {len(self._running[number].curve)}")
        if self._spent():
            for number in self._halving.paused():
                self._end_spent(number)

    def _end_spent(self, number: int) -> None:
        self._end(number, "PRUNED", reason=f"{SPENT} after epoch {len(self._running[number].curve)}")

    def _end(self, number: int, state: State, *, reason: str = "", values: Sequence[float] = ()) -> None:
        trial = self._running.pop(number)
        if self._halving is not None:
            self._halving.end(number)
        self._study.tell(
            number,
            state,
            values,
            reason=reason,
            epochs=len(trial.curve),
            seconds=time.perf_counter() - trial.started,
            curves=trial.curve,
        )
        self._told.append(number)

    def _acknowledge(self) -> None:
        """Report the trials whose end the database holds by now."""
        while self._told and self._study.durable(self._told[0]):
            record = self._study.record(self._told.popleft())
            self._recorder.ended(record)
            if self._halving is not None and self._plan.pack.study is not None:
                paused_trial(
                    Path(self._plan.pack.study), record.number, record.parameters, self._base, self._plan.rungs
                ).discard()
            state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(record.state, "failed")
            outcome = (
                record.reason
                if record.state == "FAIL" or record.value is None
                else (f"validation macro-F1 {record.value:.4f}")
            )
            done = self._study.finished() - len(self._told)
            name = f"{self._plan.kind} {record.number}"
            self._report(f"{name} {state} after {record.epochs} epochs: {outcome} ({done} of {self._all()})")

    def _standing(self) -> str:
        at_work = sorted(draw.number for draw in self._processes.at_work())
        waiting = len(self._running.keys() - set(at_work))
        paused = f", {waiting} waiting" if waiting else ""
        best = self._study.best()
        found = "" if best is None or best.value is None else f"; best so far {best.value:.4f} ({best.number})"
        trains = f"{self._plan.kind} {', '.join(map(str, at_work))} training" if at_work else "processes start"
        if not any(process.loaded for process in self._processes):
            trains += f" ({free(self._plan.resources)})"
        return f"{self._study.finished()} of {self._all()} ended, {trains}{paused}{found}"

    def _lost(self, process: Process, reason: str) -> None:
        """Begin the trials of a lost process anew, in another one; give up those that were lost too often."""
        for draw in process.group:
            trial = self._running[draw.number]
            trial.losses, trial.granted = trial.losses + 1, 0
            if trial.losses > self._plan.retries:
                self._end(draw.number, "FAIL", reason=f"{reason}, {trial.losses} times")
            else:  # apart, so that one of them cannot bring down the others again
                self._again.append([draw])
        self._processes.replace(process, reason)


def _curve_point(report: EpochReport) -> dict[str, float]:
    metrics = report.metrics()
    return {key: metrics[key] for key in ("epoch", *TRACKED) if key in metrics}


def _values(last: EpochReport, answer: Answer) -> list[float]:
    score = last.kept_macro_f1 if last.kept_macro_f1 is not None else 0.0
    return [score] if answer.robustness is None else [score, answer.robustness]
