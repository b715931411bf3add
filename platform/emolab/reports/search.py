"""The page of a search: what was tried, what it brought, and where each number comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from emolab.reports.figures import training_curves
from emolab.reports.page import Section, Styled, TableData, page
from emolab.tuning.outcome import read_with_care, stopped_by
from emolab.tuning.points import beside_base

if TYPE_CHECKING:
    from emolab.training.train import TrainedModel
    from emolab.tuning.search import SearchResult
    from emolab.tuning.settings import TuneSettings


def search_page(
    result: SearchResult, winner: TrainedModel, figures: Mapping[str, bytes], settings: TuneSettings
) -> bytes:
    """One self-contained HTML file.

    Args:
        figures: of ``search_figures``.
        settings: of the search.
    """
    reference = result.manifest.splits["validation"].reference_scores
    chosen = "the winner of the final" if result.finalists else "the best that completed"
    lines = [
        f"Chosen: trial {result.best.number}, {chosen}. Validation macro-F1: {result.best.value:.4f} in the search; "
        f"trained again, {winner.progress.best_macro_f1:.4f} at epoch {winner.progress.best_epoch}.",
        " ".join([*beside_base(result.records, result.best), *trained_again(settings, result, winner)]),
        f"Class prior: accuracy {result.manifest.class_prior:.4f}, macro-F1 {result.manifest.class_prior_macro_f1:.4f}."
        + (
            f" Exact filter: accuracy {reference['ceiling_accuracy']:.4f}, "
            f"macro-F1 {reference['ceiling_macro_f1']:.4f}."
            if "ceiling_accuracy" in reference
            else ""
        ),
        f"Search run {result.run_id}, final run {winner.run_id}, data set {result.manifest.digest[:16]}. "
        "All scores are on validation; the test split was not opened.",
        *([f"The search is {result.left}."] if result.left else []),
    ]
    sections = [Section(title="Trials", table=_table(result, settings.tuning.constraints.limits()))]
    sections += _failures(result)
    if result.finalists:
        sections.append(_final(result))
    sections += [Section(title=title, figure=figures[name]) for name, title in _TITLES.items() if name in figures]
    sections.append(_importances(result, figures))
    sections.append(Section(title="Training the best configuration", figure=training_curves(winner.progress.reports)))
    return page(f"Search {result.folder.name}", lines, sections)


def trained_again(settings: TuneSettings, result: SearchResult, winner: TrainedModel) -> list[str]:
    """Which of the two models is kept, and why the chosen trial and the training again differ; one sentence each."""
    before, now = result.best.value or 0.0, winner.progress.best_macro_f1
    difference = round(now - before, 4)
    name = settings.register_as if settings.tracking.enabled else None
    registered = f", and goes to the registry as {name}," if name else ""
    compared = f"{abs(difference):.4f} {'above' if difference > 0 else 'below'}" if difference else "as good as"
    kept = f"Kept{registered} is the model that was trained again, {compared} its trial; no trial's weights are kept."
    return [kept, *([_why(settings, result, winner)] if difference else [])]


def _why(settings: TuneSettings, result: SearchResult, winner: TrainedModel) -> str:
    """What was different when the configuration of a trial was trained again."""
    then = settings.workers.count
    now = max((int(report.get("workers") or 1) for report in winner.progress.reports), default=then)
    if result.best.state == "PRUNED":
        return (
            f"They differ because its trial was stopped after {result.best.epochs} epochs; the final trained it whole."
        )
    if settings.tuning.stopping == "pbt":
        return (
            "They differ because a member of the population changed its parameters on the way, and the training again "
            "had those of its best epoch from the first one on."
        )
    if now != then:
        return (
            f"They differ because {_workers(now)} draw{'s' * (now == 1)} other dropout masks than {_workers(then)} "
            "(batches, loss and scores do not depend on their number), and the best of "
            f"{len(result.records)} trials owes part of its score to the masks it met. "
            f"tuning.final_workers={then}, set before the first call, trains it as its trial was."
        )
    if result.fused > 1:
        return "They differ because a trial that shares its steps with others (tuning.fused) draws other dropout masks."
    return "Configuration, seed and number of workers are the same: they differ by rounding on other hardware."


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


_TITLES = {
    "history": "How the search went",
    "front": "Macro-F1 against robustness, both on validation",
    "budget": "Where the epochs went",
    "slices": "Parameter against score",
    "parallel": "All trials, parameter by parameter",
}
"""Figure -> heading, in the order of the page."""


def _importances(result: SearchResult, figures: Mapping[str, bytes]) -> Section:
    """Which parameters mattered, or why that cannot be told."""
    title = "Importance of the parameters"
    if "importances" not in figures:
        return Section(title=title, text=result.study.importances().reason)
    text = (
        "How far the values of the best quarter of the trials lie from those of all trials, parameter by parameter; "
        "the differences add up to 1. A long bar says that good trials had other values of it than the rest, not how "
        "much of the score it explains. Where chance moves the scores as much as the parameters do, it can also put "
        "the wrong one first."
    )
    return Section(title=title, text=text, figure=figures["importances"])


def _final(result: SearchResult) -> Section:
    seeds = len(result.finalists[0].values)  # the winner completed all
    each = f"{seeds} seeds" if seeds > 1 else "a seed"
    half_width = " The half-width is that of the 95 % interval of the mean over seeds (Student's t)." * (seeds > 1)
    return Section(
        title="The final",
        text=f"The best trials, each trained with {each} that the search did not use; the best mean on validation "
        f"wins.{half_width} {read_with_care(result.finalists)}",
        table=TableData(
            columns=[
                "trial",
                "in the search",
                "epochs there",
                "mean",
                *(["half-width"] if seeds > 1 else []),
                *(f"run {i + 1}" for i in range(seeds)),
                "failed",
            ],
            rows=[
                [
                    f.record.number,
                    f.record.value,
                    f.record.epochs,
                    f.mean if f.values else math.nan,
                    *([f.half_width] if seeds > 1 else []),
                    *f.values,
                    *[None] * (seeds - len(f.values)),
                    f.failures or None,
                ]
                for f in result.finalists
            ],
        ),
    )


def _failures(result: SearchResult) -> list[Section]:
    """A table of its own: beside the parameters a reason has no room."""
    rows = [[r.number, r.epochs, Styled(r.reason or "unknown")] for r in result.records if r.state == "FAIL"]
    table = TableData(columns=["trial", "epochs", "why it failed"], rows=rows)
    return [Section(title="Failed trials", table=table)] if rows else []


def _table(result: SearchResult, limits: Mapping[str, float]) -> TableData:
    keys = list(dict.fromkeys(key for record in result.records for key in record.parameters))
    both = any(record.robustness is not None for record in result.records)
    return TableData(
        columns=[
            "trial",
            "state",
            "validation macro-F1",
            *(["robustness"] if both else []),
            "epochs",
            "stopped by",
            *(f"{name} (at most {limit:.6g})" for name, limit in limits.items()),
            *keys,
        ],
        rows=[
            [
                r.number,
                r.state.lower(),
                r.value,
                *([r.robustness] if both else []),
                r.epochs,
                stopped_by(r),
                *(r.measured(limits).get(name) for name in limits),
                *(r.parameters.get(k) for k in keys),
            ]
            for r in result.records
        ],
    )
