"""jobs/robustness.py as a whole: models under a suite of corruptions, tracked, resumable, with a page of results."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from emolab import sealed
from emolab.cluster import connected
from emolab.configuration import to_yaml
from emolab.locks import holding
from emolab.names import UserError, contained
from emolab.registry.lookup import KeptModel, kept_model, model_folders, training_data
from emolab.reports.robustness import robustness_files
from emolab.robustness.cells import Cell
from emolab.robustness.metrics import expected_calibration_error
from emolab.robustness.suites import expand, load_suite, lowered
from emolab.robustness.sweep import missing_units, read_agreements, read_sweep, run_sweep
from emolab.robustness.sweep_plan import SweepPlan, plan_sweep
from emolab.robustness.tally import Tally
from emolab.scores import accuracy, macro_f1
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.selection import SplitLoader, load_selection_split
from emolab.studies.files import leave
from emolab.studies.robustness_results import CELLS_FILE, MODELS_FILE, RobustnessResults, counted_models, grouped
from emolab.studies.robustness_settings import RobustnessSettings
from emolab.studies.test_split import open_for_sweep
from emolab.tracking.beginning import CONFIGURATION, folder_run
from emolab.tracking.runs import MLflowTracker, existing_tracker, open_tracker
from emolab.tracking.tracker import Run, ending
from emolab.training.recipe import fingerprint


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    plan: SweepPlan
    models: tuple[KeptModel, ...]
    folder: Path
    manifest: Manifest
    lowered: str
    """What to say of rates that the data cannot have."""


def robustness(
    settings: RobustnessSettings, *, dry_run: bool, report: Callable[[str], None]
) -> RobustnessResults | None:
    """Sweep the models over the suite; the same call again computes only what is missing.

    Raises:
        UserError: anything the user can mend, before any computation where it can be known.
    """
    prepared = _prepare(settings)
    settings = settings.model_copy(update={"data": settings.data or str(prepared.plan.data)})
    plan, units = prepared.plan, prepared.folder / "units"
    sessions = prepared.manifest.splits[plan.split].sessions
    report(
        f"{counted_models(len(plan.models))}, {len(plan.cells)} cells, {sessions} {plan.split} sessions of "
        f"{settings.data}{_strange(prepared)}: {len(plan.units)} units of work in {prepared.folder}"
    )
    if prepared.lowered:
        report(prepared.lowered)
    if dry_run:
        return None
    with connected(settings.cluster), holding(prepared.folder, what="sweep"):
        tracker = _tracker(settings)
        missing = missing_units(plan, units, report=report)
        run = _run(settings, prepared, tracker, computes=bool(missing))
        run.log_json({model.run_id: model.digest for model in prepared.models}, MODELS_FILE)
        with ending(run):
            opening = partial(_open_split, prepared, run, tracker)
            run_sweep(plan, units, report=report, actors=settings.actors, opening=opening, missing=missing)
            results = RobustnessResults(
                name=prepared.folder.name,
                run_id=run.run_id,
                manifest=prepared.manifest,
                split=settings.split,
                cells=plan.cells,
                reference=settings.reference,
                groups=grouped(prepared.models, read_sweep(plan, units), read_agreements(plan, units)),
            )
            _conclude(results, prepared.folder, run, tracker, report)
    return results


def _prepare(settings: RobustnessSettings) -> _Prepared:
    """Everything that can be checked without computing; nothing is written but models that must be fetched."""
    if not settings.tracking.enabled:
        raise UserError("a robustness sweep is recorded in MLflow: set tracking.enabled=true")
    if not settings.models:
        raise UserError("no model was given: --model with a run's folder, runs:/ID, or models:/name@alias")
    output = Path(settings.output)
    given = Path(settings.data).resolve() if settings.data is not None else None
    if given is not None:
        read_manifest(given)  # refused before a model is fetched
    suite = load_suite(settings.suite)
    if suite.purpose == "validation" and settings.split == "test":
        raise UserError(f"suite {suite.name!r} is for choosing, not for reporting: add --split validation")
    tracker = cache(lambda: existing_tracker(**settings.tracking.model_dump(), output=output))
    found = [f.resolve() for uri in settings.models for f in model_folders(uri, tracker, output / "fetched-models")]
    models = {model.digest: model for model in map(kept_model, found)}  # named twice is still one model
    data = given or training_data([*models.values()], tracker)
    manifest = read_manifest(data)
    cells = expand(suite, list(manifest.dimensions))
    plan = plan_sweep(
        [model.folder for model in models.values()],
        data,
        settings.split,
        cells,
        bfloat16=settings.bfloat16,
        gpus=settings.gpus,
    )
    if manifest.splits[settings.split].sessions < 2:
        raise UserError(f"{data} has one session in its {settings.split} split: a sweep needs two or more")
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(settings.suite).stem)[:60]
    name = settings.name or f"robustness-{stem}-{_identity(plan)}"
    return _Prepared(
        plan=plan,
        models=tuple(models.values()),
        folder=contained(output, name, what="sweep name"),
        manifest=manifest,
        lowered=lowered(suite, cells),
    )


def _strange(prepared: _Prepared) -> str:
    """What to say where the sessions are not of the data that the models were trained on; they may be others."""
    others = [model for model in prepared.models if not prepared.manifest.digest.startswith(model.settings["data"])]
    return f", which is not what {len(others)} of them were trained on" if others else ""


def _identity(plan: SweepPlan) -> str:
    return fingerprint({"units": sorted(unit.file for unit in plan.units)})


def _tracker(settings: RobustnessSettings) -> MLflowTracker:
    tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
    assert isinstance(tracker, MLflowTracker)  # tracking is enabled
    return tracker


def _open_split(prepared: _Prepared, run: Run, tracker: MLflowTracker) -> SplitLoader:
    """What reads the sessions; that the test split is opened is recorded before its first shard is read."""
    if prepared.plan.split == "test":
        return open_for_sweep(prepared.manifest, run_id=run.run_id, tracker=tracker)
    return load_selection_split


def _run(settings: RobustnessSettings, prepared: _Prepared, tracker: MLflowTracker, *, computes: bool) -> Run:
    def describe(run: Run) -> None:
        run.log_text(to_yaml(settings), CONFIGURATION)
        run.log_json([cell.id for cell in prepared.plan.cells], "cells.json")

    run = folder_run(
        tracker,
        prepared.folder,
        {"sweep": _identity(prepared.plan)},
        holds="a sweep of other models, cells or data, or by other code",
        describe=describe,
        tags={
            "emolab.kind": "robustness",
            "emolab.dataset": prepared.manifest.digest,
            "emolab.models": " ".join(model.run_id for model in prepared.models)[:5000],
        },
        computes=computes,
    )
    settled = tracker.settle(run.run_id)  # an opening of the test split is told under the tracker's own id
    return run if settled in (None, run.run_id) else tracker.resume(settled)


def _conclude(
    results: RobustnessResults, folder: Path, run: Run, tracker: MLflowTracker, report: Callable[[str], None]
) -> None:
    leave(robustness_files(results) | {CELLS_FILE: sealed.to_parquet(cell_table(results))}, folder, run)
    for group in results.groups:
        scores = {f"{key}.{group.slug}": value for key, value in results.summary(group).items() if np.isfinite(value)}
        run.log_metrics(scores, step=0)
    run.finish()
    for line in results.lines():
        report(line)
    report(
        f"report  {folder / 'report.html'}\ntables  {folder / 'tables'}\ncells   {folder / CELLS_FILE}\n"
        f"run     {run.run_id}\nlook    {tracker.instructions()}"
    )


def cell_table(results: RobustnessResults) -> pa.Table:
    """One row per model and cell: scores over all sessions, with the run that trained the model."""
    rows = []
    for group in results.groups:
        for run_id, tally in zip(group.run_ids, group.tallies, strict=True):
            for index, cell in enumerate(results.cells):
                rows.append(_row(group.label, run_id, tally, index, cell))
    return pa.Table.from_pylist(rows)


def _row(label: str, run_id: str, tally: Tally, index: int, cell: Cell) -> dict[str, object]:
    counts: NDArray[np.int64] = tally.confusion[index].sum(axis=0)
    steps = max(1, int(counts.sum()))
    return {
        "model": label,
        "run_id": run_id,
        "cell": cell.id,
        "corruption": cell.corruption,
        "level": cell.level,
        "modalities": "-".join(cell.modalities),
        "seed": cell.seed,
        "engine": tally.engine,
        "accuracy": float(accuracy(counts)),
        "macro_f1": float(macro_f1(counts)),
        "calibration_error": expected_calibration_error(tally.calibration[index].sum(axis=0)),
        "brier": float(tally.squared_error[index].sum() / steps),
    }
