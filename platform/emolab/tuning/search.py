"""A search from configuration to the best parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from emolab.configuration import to_yaml
from emolab.databases import place_of
from emolab.locks import holding
from emolab.names import UserError
from emolab.redaction import redacted
from emolab.sessions.manifest import Manifest, write_atomically
from emolab.tracking.beginning import CONFIGURATION, RECORD, folder_run, own_record, read_record, write_record
from emolab.tracking.tracker import Run, Tracker, ending
from emolab.training.recipe import TrainSettings
from emolab.training.train import flatten
from emolab.tuning.finals import Finalist, enqueue_finalists, final_seeds, final_space, ranked
from emolab.tuning.holding import holding_study
from emolab.tuning.methods import check_members, make_pruner, make_sampler
from emolab.tuning.outcome import left_of, mean_over_seeds, none_completed
from emolab.tuning.plan import SearchPlan, experiment, methods, plan_search
from emolab.tuning.points import enqueue_points
from emolab.tuning.running import run_trials
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import configured
from emolab.tuning.study import Study
from emolab.tuning.trials import TrialRecord

_ANOTHER_RUN = "a search on other data, or another run"
STORAGE = "storage"
"""Key of a search's record: the database that holds its trials; null: the one in its folder."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A finished search."""

    folder: Path
    run_id: str
    manifest: Manifest
    records: list[TrialRecord]
    best: TrialRecord
    """The trial whose parameters were chosen: the best one, or the winner of the final."""
    finalists: list[Finalist]
    """Best first; empty where no final was asked for."""
    left: str
    """What the search is where it ended without all of its trials, for people; else empty."""
    computed: bool
    """Whether this call added to what was there."""
    rungs: list[int]
    """Epochs after which trials could be stopped."""
    fused: int
    """Configurations that shared a step, at most."""
    settings: TrainSettings
    """The base configuration with the best parameters, and the workers to train it with."""
    study: Study


def search(settings: TuneSettings, tracker: Tracker, *, report: Callable[[str], None] = lambda _: None) -> SearchResult:
    """Run, or go on with, the search that the settings name, until the study holds all its trials.

    Ray must be connected. Finished trials are kept; trials that a killed search left running are run again with
    the same parameters.

    Raises:
        UserError: unusable space, data or cluster; another process holds the study; no trial completed.
    """
    plan = plan_search(settings)
    with holding_search(plan):
        result = search_in(plan, settings, tracker, report=report)
        if result.computed:
            tracker.resume(result.run_id).finish()
        return result


@contextmanager
def holding_search(plan: SearchPlan) -> Iterator[None]:
    """Hold a search's folder and study for the length of the block.

    Raises:
        UserError: another process holds one of them.
    """
    with holding(plan.folder, what="study"), holding_study(plan.database, plan.folder.name):
        yield


def search_in(
    plan: SearchPlan, settings: TuneSettings, tracker: Tracker, *, report: Callable[[str], None]
) -> SearchResult:
    """A search that this process holds; what follows it can be done before another process may go on.

    Raises:
        UserError: as ``search``.
    """
    check_folder(plan.folder, plan.storage, plan.manifest)
    study = _open(settings, plan)
    if settings.tuning.stopping == "pbt":
        check_members(study.finished(), plan.trials)
    drawn_otherwise = study.draw_with(methods(settings), trials=plan.trials, epochs=settings.tuning.epoch_budget)
    if drawn_otherwise:
        report(drawn_otherwise)
    final = _open_final(settings, plan, study)
    missing = _missing(settings, plan, study, final)
    run = _parent_run(settings, plan, tracker, computes=missing)
    _note_place(plan)
    with ending(run):
        requeued = study.requeue_interrupted(paused_at=plan.rungs if settings.tuning.stopping == "halving" else ())
        enqueue_points(settings.tuning, plan.space, settings.base(), study)
        done = study.finished()
        if requeued or done:
            report(f"resuming: {done} trials are finished, {requeued} were interrupted and run again")
        run_trials(settings, plan, study, tracker, run.run_id, report, trials=plan.trials, rungs=plan.rungs)
        if study.best() is None:
            raise UserError(none_completed(study, settings.tuning.constraints.limits()))
        finalists = [] if final is None else _final(settings, plan, study, final, tracker, run, report)
        return _result(settings, plan, study, run, finalists, computed=missing)


def _open(settings: TuneSettings, plan: SearchPlan) -> Study:
    tuning = settings.tuning
    pruner = make_pruner(
        tuning.stopping, grace=tuning.grace_epochs, factor=tuning.reduction_factor, epochs=settings.training.epochs
    )
    study = Study(plan.database, plan.folder.name, space=plan.space, objectives=tuning.objectives, pruner=pruner)
    study.claim(flatten(experiment(settings, plan.space, plan.manifest)))
    study.use_sampler(
        make_sampler(
            tuning.sampler,
            seed=tuning.seed,
            space=plan.space,
            startup=tuning.startup_trials,
            pruning=bool(plan.rungs),
            earlier=study.history(),
        )
    )
    return study


def final_name(study: str) -> str:
    """The study that holds the trainings of a search's final."""
    return f"{study}-final"


def _open_final(settings: TuneSettings, plan: SearchPlan, study: Study) -> Study | None:
    """The study of the search's final, where one is wanted."""
    if not settings.tuning.final.wanted:
        return None
    space = final_space(plan.space)
    final = Study(
        plan.database,
        final_name(plan.folder.name),
        space=space,
        objectives=settings.tuning.objectives,
        sampler=make_sampler("random", seed=0, space=space),
    )
    final.claim({"final_of": study.name})
    return final


def _missing(settings: TuneSettings, plan: SearchPlan, study: Study, final: Study | None) -> bool:
    """Whether there is anything to train."""
    wanted = settings.tuning.final
    return (
        study.finished() < plan.trials
        or study.unended() > 0
        or (final is not None and final.finished() < wanted.top * wanted.seeds)
    )


def _final(
    settings: TuneSettings,
    plan: SearchPlan,
    study: Study,
    final: Study,
    tracker: Tracker,
    run: Run,
    report: Callable[[str], None],
) -> list[Finalist]:
    final.requeue_interrupted()
    candidates = enqueue_finalists(settings, study, final)
    missing = final.waiting()
    if missing:
        seeds = len(final_seeds(settings))
        report(f"final: {missing} trainings are left of {len(candidates)} configurations with {seeds} seeds each")
    trials = final.finished() + missing
    run_trials(settings, plan, final, tracker, run.run_id, report, trials=trials, kind="final")
    finalists = ranked(candidates, final, settings)
    for finalist in finalists:
        report(f"finalist trial {finalist.record.number}: {mean_over_seeds(finalist)}")
    return finalists


def _parent_run(settings: TuneSettings, plan: SearchPlan, tracker: Tracker, *, computes: bool) -> Run:
    def describe(run: Run) -> None:
        run.log_text(to_yaml(settings), CONFIGURATION)
        run.log_text(Path(settings.tuning.space).read_text(encoding="utf-8"), "search_space.yaml")
        later = {"trials", "time_budget_s"}  # which another call may have otherwise
        tuning = settings.tuning.model_dump(mode="json", exclude=later) | {"scheduler": settings.tuning.stopping}
        trials = flatten(settings.base().identity()) | dict.fromkeys(plan.space.parameters, "searched")
        run.log_parameters(
            redacted(trials | {"data": settings.data} | {f"tuning.{key}": value for key, value in tuning.items()})
        )

    return folder_run(
        tracker,
        plan.folder,
        _identity(plan.manifest),
        holds=_ANOTHER_RUN,
        describe=describe,
        tags={"emolab.dataset": plan.manifest.digest, "emolab.kind": "search"},
        computes=computes,
    )


def check_folder(folder: Path, storage: str | None, manifest: Manifest | None) -> None:
    """Refuse a folder that is another run's, or that has its trials in another database.

    Args:
        manifest: None where the data are still to be made.

    Raises:
        UserError: naming the folder, and where its trials are.
    """
    known = read_record(folder) if manifest is None else own_record(folder, _identity(manifest), holds=_ANOTHER_RUN)
    place = _place(storage)
    if known is None or known.get(STORAGE, place) == place:
        return
    before, given = known[STORAGE], place or "its own folder"
    again = "leave out tuning.storage" if before is None else f"set tuning.storage to {before}"
    raise UserError(
        f"the trials of the study in {folder} are in {before or 'this folder'}, not in {given}: {again}, choose "
        f"another name, or, if they were moved, remove {folder / RECORD}"
    )


def _note_place(plan: SearchPlan) -> None:
    """Remember where the trials are: in another database the search would begin anew."""
    known, place = read_record(plan.folder) or {}, _place(plan.storage)
    if STORAGE not in known:
        write_record(plan.folder, known | {STORAGE: place})


def _place(storage: str | None) -> str | None:
    return None if storage is None else place_of(storage)


def _identity(manifest: Manifest) -> dict[str, str]:
    return {"dataset": manifest.digest}


def _result(
    settings: TuneSettings, plan: SearchPlan, study: Study, run: Run, finalists: list[Finalist], *, computed: bool
) -> SearchResult:
    best = finalists[0].record if finalists else study.best()
    assert best is not None
    workers = settings.workers.model_copy(update={"count": plan.final_workers})
    chosen = configured(settings.base(), best.parameters).model_copy(update={"workers": workers})
    best_file = plan.folder / "best.yaml"
    content = chosen.model_dump(mode="json", include={"model", "training"})
    write_atomically(best_file, yaml.safe_dump(content, sort_keys=False).encode())
    left = left_of(study, trials=plan.trials, epochs=settings.tuning.epoch_budget)
    if computed:
        run.log_file(best_file)
        run.set_tags({"emolab.search": left or "over"})
    return SearchResult(
        folder=plan.folder,
        run_id=run.run_id,
        manifest=plan.manifest,
        records=study.records(),
        best=best,
        finalists=finalists,
        left=left,
        computed=computed,
        rungs=plan.rungs,
        fused=plan.in_one_step,
        settings=chosen,
        study=study,
    )
