"""jobs/compare.py as a whole: models x seeds trained, all frozen, each tested once, tabled and drawn.

The test split is opened when every cell has ended: trained, or diverged, which no later call could change. While a
cell has failed for another reason (a lost process, a full disk) it stays closed, and the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from emolab.cluster import connected, room
from emolab.commands import job_command
from emolab.configuration import to_yaml
from emolab.locks import holding
from emolab.names import UserError, contained
from emolab.reports.comparison import comparison_files, standings_table
from emolab.sessions.manifest import Manifest, manifest_text, read_manifest
from emolab.sessions.visibility import check_visible
from emolab.studies.comparison_analysis import Analysis, analyse
from emolab.studies.comparison_cells import Place, Trained, measure_cells, score_cells, train_cells
from emolab.studies.comparison_results import RECORD, read_comparison
from emolab.studies.comparison_search import check_searches, tuned_by_search
from emolab.studies.comparison_settings import Cell, CompareSettings
from emolab.studies.dataset import dataset, will_be_made
from emolab.studies.files import leave
from emolab.studies.report_settings import ReportSettings
from emolab.studies.test_split import FILE_NAME as TESTED
from emolab.studies.test_split import openings
from emolab.tracking.beginning import CONFIGURATION, folder_run
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.tracking.tracker import Run, ending
from emolab.training.data import load_training_data
from emolab.training.recipe import check_labels, check_selection, fingerprint


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """A comparison that has been checked and can start."""

    folder: Path
    manifest: Manifest
    cells: tuple[Cell, ...]
    concurrency: int

    def describe(self, settings: CompareSettings) -> str:
        """The plan for people."""
        training = settings.training
        lines = [
            f"{len(self.cells)} cells: {', '.join(settings.models)}; seeds {', '.join(map(str, settings.seeds))}",
            f"{settings.data} ({self.manifest.splits['train'].sessions} training sessions), at most {training.epochs} "
            f"epochs, {self.concurrency} at a time; compared with {settings.reference}; folder {self.folder}",
        ]
        if settings.search.trials:
            lines.append(f"each model first searched with {settings.search.trials} trials over {settings.search.space}")
        caveat = self.manifest.provenance.get("caveat")
        return "\n".join([*lines, f"caveat of the data: {caveat}"] if caveat else lines)


def compare(settings: CompareSettings, *, dry_run: bool, report: Callable[[str], None]) -> Analysis | None:
    """Run, or go on with, a comparison; write its page and tables, also as artifacts of its run.

    Raises:
        UserError: unusable data or cluster; cells that failed, after all that could be done without them is done.
    """
    if not will_be_made(settings.data, settings.prepare):
        read_manifest(Path(settings.data))  # refused before Ray starts
    with connected(settings.cluster):
        if dataset(settings.data, settings.prepare, report=report, dry_run=dry_run) is None:
            return None
        plan = plan_comparison(settings)
        report(plan.describe(settings))
        if dry_run:
            return None
        load_training_data(Path(settings.data))  # damaged data is refused here, once, not by every cell
        with holding(plan.folder, what="comparison"):
            return _run(settings, plan, report)


def plan_comparison(settings: CompareSettings) -> ComparisonPlan:
    """Check a comparison against its data and the cluster, without starting anything.

    Raises:
        UserError: the first thing that does not fit.
    """
    manifest = read_manifest(Path(settings.data))
    if not manifest.splits["test"].sessions:
        raise UserError(f"{settings.data} has no test split: there is nothing to compare models on")
    check_labels(manifest, "test", data=settings.data, remedy="there is nothing to compare models on")
    check_selection(settings.training, manifest, data=settings.data)
    if settings.search.trials:
        if not manifest.splits["validation"].sessions:
            raise UserError(f"{settings.data} has no validation split to choose settings by: set search.trials=0")
        check_labels(manifest, "validation", data=settings.data, remedy="set search.trials=0")
    needs = {"CPU": 1.0} | ({"GPU": settings.gpus} if settings.gpus else {})
    fits = room(needs, purpose="a cell of the comparison")
    check_visible(Path(settings.data))
    name = settings.name or f"comparison-{fingerprint(settings.identity() | {'data': manifest.digest})}"
    folder = contained(Path(settings.output), name, what="name of the comparison")
    if settings.search.trials:
        check_searches(settings, folder)
    cells = _cells(settings, folder)
    return ComparisonPlan(
        folder=folder,
        manifest=manifest,
        cells=tuple(cells),
        concurrency=min(settings.concurrency or fits, fits, len(cells)),
    )


def _cells(settings: CompareSettings, folder: Path) -> list[Cell]:
    return [settings.cell(model, seed, folder) for seed in settings.seeds for model in settings.models]


def _run(settings: CompareSettings, plan: ComparisonPlan, report: Callable[[str], None]) -> Analysis:
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    assert isinstance(tracker, MLflowTracker)  # the settings refuse a comparison without tracking
    run = _parent_run(settings, plan, tracker)
    place = Place(
        tracker_uri=tracker.uri,
        experiment=settings.tracking.experiment,
        output=str(Path(settings.output).resolve()),
        parent=run.run_id,
        concurrency=plan.concurrency,
        gpus=settings.gpus,
    )
    with ending(run):
        if settings.search.trials:
            settings = tuned_by_search(settings, plan.folder, tracker, run, report=report)
            plan = replace(plan, cells=tuple(_cells(settings, plan.folder)))
        run.log_text(to_yaml(settings), CONFIGURATION)  # models and seeds may be added
        trained = train_cells(plan.cells, place, report=report)
        _refuse_undecided(plan.cells, trained)
        run.log_json([outcome.checkpoint for outcome in trained if not outcome.failure], "frozen.json")
        measure_cells(plan.cells, trained, place, settings.theory, report=report)
        score_cells(plan.cells, trained, place, report=report)
        analysis = _conclude(settings, plan, trained, tracker, run, report)
    failed = [f"{cell}: {t.failure}" for cell, t in zip(plan.cells, trained, strict=True) if t.failure]
    if failed:
        raise UserError(f"{len(failed)} of {len(trained)} cells diverged ({failed[0]}); the others are reported")
    return analysis


def _refuse_undecided(cells: Sequence[Cell], trained: Sequence[Trained]) -> None:
    open_ends = [(cell, t) for cell, t in zip(cells, trained, strict=True) if t.failure and not t.diverged]
    if open_ends:
        cell, first = open_ends[0]
        raise UserError(
            f"{len(open_ends)} of {len(cells)} cells could not be trained ({cell}: {first.failure}); "
            "the test split stays closed: mend this and run the same command again"
        )
    if all(outcome.failure for outcome in trained):
        raise UserError(f"every cell diverged ({cells[0]}: {trained[0].failure}); the test split stays closed")


def _conclude(
    settings: CompareSettings,
    plan: ComparisonPlan,
    trained: Sequence[Trained],
    tracker: MLflowTracker,
    run: Run,
    report: Callable[[str], None],
) -> Analysis:
    """Write down what belongs to the comparison, then build the report from the tracker alone."""
    cells = [
        {"model": cell.model, "seed": cell.seed, "run_id": t.run_id, "failure": t.failure}
        for cell, t in zip(plan.cells, trained, strict=True)
    ]
    record = {"reference": settings.reference, "cells": cells, "openings": openings(tracker, plan.manifest.digest)}
    run.log_json(record, RECORD)
    run.set_tags({"emolab.failed_cells": str(sum(bool(t.failure) for t in trained))})
    analysis = analyse(read_comparison(tracker, run.run_id))
    leave(comparison_files(analysis), plan.folder, run)
    run.finish()
    Console(width=None if Console().is_terminal else 120).print(standings_table(analysis))
    rebuilt = ReportSettings(run=run.run_id, runs=settings.output, tracking=settings.tracking)
    report(
        f"{analysis.ranking_sentence()}\n"
        f"report  {plan.folder / 'report.html'}\n"
        f"tables  {plan.folder / 'tables'}\n"
        f"again   {job_command('report', rebuilt)}\n"
        f"runs    {tracker.instructions()}"
    )
    return analysis


def _parent_run(settings: CompareSettings, plan: ComparisonPlan, tracker: MLflowTracker) -> Run:
    return folder_run(
        tracker,
        plan.folder,
        settings.identity() | {"data": plan.manifest.digest},
        holds="a comparison with other settings or data",
        describe=lambda run: run.log_text(manifest_text(plan.manifest), "dataset.json"),
        tags={"emolab.dataset": plan.manifest.digest, "emolab.kind": "comparison"},
        computes=not all((cell.folder / TESTED).exists() for cell in plan.cells),
    )
