"""Run a study's trials by the means that fit them: packed into few processes, or with several workers each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from emolab.tracking.tracker import Tracker
from emolab.tuning.outcome import left_of
from emolab.tuning.pack import PackSettings
from emolab.tuning.packed import PackedPlan, PackedTrials
from emolab.tuning.plan import SearchPlan
from emolab.tuning.recorder import TrialRecorder
from emolab.tuning.settings import TuneSettings
from emolab.tuning.study import Study


def run_trials(
    settings: TuneSettings,
    plan: SearchPlan,
    study: Study,
    tracker: Tracker,
    parent: str,
    report: Callable[[str], None],
    *,
    trials: int,
    rungs: Sequence[int] = (),
    kind: str = "trial",
) -> None:
    """Run trials until the study holds ``trials`` of them, the epoch budget is spent or the time is over, and record
    each below the run ``parent``."""
    recorder = TrialRecorder(tracker, parent, kind=kind, limits=settings.tuning.constraints.limits())
    seconds = settings.tuning.time_budget_s if kind == "trial" else None
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    halving = settings.tuning.stopping == "halving" and kind == "trial"
    try:
        recorder.catch_up(study)
        if study.finished() >= trials and not halving:  # of which trials may wait at a rung
            return
        if settings.workers.count > 1:
            from emolab.tuning.workers import run_with_workers

            run_with_workers(
                settings.base(),
                study,
                recorder,
                report,
                folder=plan.folder,
                trials=trials,
                concurrency=plan.at_once(trials),
                rungs=rungs,
                epoch_budget=settings.tuning.epoch_budget if kind == "trial" else None,
                deadline=deadline,
                kind=kind,
            )
        elif settings.tuning.stopping == "pbt" and kind == "trial":
            from emolab.tuning.population import run_population

            run_population(
                settings.base(),
                study,
                plan.space,
                recorder,
                report,
                folder=plan.folder,
                trials=trials,
                resources=plan.resources,
                interval=settings.tuning.grace_epochs,
                retries=settings.workers.max_failures,
                seed=settings.tuning.seed,
            )
        else:
            packed = packed_plan(settings, plan, trials=trials, rungs=rungs, kind=kind)
            PackedTrials(packed, study, recorder, report, deadline=deadline).run()
        if time.monotonic() > deadline and (left := left_of(study, trials=trials, epochs=settings.tuning.epoch_budget)):
            report(f"tuning.time_budget_s={seconds:g} is over; the search is {left}")
    finally:
        recorder.close()
        if recorder.trouble:
            report(f"the tracker did not take everything ({recorder.trouble}); the next call writes the rest")


def packed_plan(
    settings: TuneSettings, plan: SearchPlan, *, trials: int, rungs: Sequence[int], kind: str
) -> PackedPlan:
    """How the trials of a search, or the trainings of its final, are packed."""
    tuning = settings.tuning
    halving = tuning.stopping == "halving" and kind == "trial"
    return PackedPlan(
        pack=PackSettings(
            base=settings.base().model_dump(mode="json"),
            robustness="robustness" in tuning.objectives,
            limits=tuning.constraints.limits() if kind == "trial" else {},  # finalists have met them
            study=str(plan.folder.resolve()) if halving else None,
            rungs=tuple(rungs) if halving else (),
        ),
        processes=plan.at_once(trials),
        resources=plan.resources,
        trials=trials,
        epoch_budget=tuning.epoch_budget if kind == "trial" else None,
        rungs=rungs,
        halving=tuning.reduction_factor if halving else None,
        fused=plan.fused,
        retries=settings.workers.max_failures,
        timeout_s=tuning.timeout_s,
        kind=kind,
    )
