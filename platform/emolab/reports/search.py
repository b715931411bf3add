"""The page of a search: what was tried, what it brought, and where each number comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emolab.reports.figures import STYLE, svg, training_curves
from emolab.reports.page import Section, TableData, page

if TYPE_CHECKING:
    from emolab.training.train import TrainedModel
    from emolab.tuning.search import SearchResult


def search_page(result: SearchResult, winner: TrainedModel) -> bytes:
    """One self-contained HTML file."""
    reference = result.manifest.splits["validation"].reference_scores
    lines = [
        f"Best trial {result.best.number}: validation macro-F1 {result.best.value:.4f}; trained again, "
        f"{winner.progress.best_macro_f1:.4f} at epoch {winner.progress.best_epoch}.",
        f"Class prior: accuracy {result.manifest.class_prior:.4f}."
        + (
            f" Exact filter: accuracy {reference['ceiling_accuracy']:.4f}, "
            f"macro-F1 {reference['ceiling_macro_f1']:.4f}."
            if "ceiling_accuracy" in reference
            else ""
        ),
        f"Search run {result.run_id}, final run {winner.run_id}, data set {result.manifest.digest[:16]}. "
        "All scores are on validation; the test split was not opened.",
    ]
    sections = [
        Section(title="Trials", table=_table(result)),
        Section(title="How the search went", figure=_history(result)),
        Section(title="Parameter against score", figure=_slices(result)),
    ]
    if any(record.robustness is not None for record in result.records):
        sections.insert(1, Section(title="Macro-F1 against robustness, both on validation", figure=_front(result)))
    importances = result.study.importances()
    if importances:
        sections.append(Section(title="Importance of the parameters (PED-ANOVA)", figure=_importances(importances)))
    sections.append(Section(title="Training the best configuration", figure=training_curves(winner.progress.reports)))
    return page(f"Search {result.folder.name}", lines, sections)


def _table(result: SearchResult) -> TableData:
    keys = list(result.best.parameters)
    both = any(record.robustness is not None for record in result.records)
    return TableData(
        columns=[
            "trial",
            "state",
            "validation macro-F1",
            *(["robustness"] if both else []),
            "epochs",
            *keys,
            "failure",
        ],
        rows=[
            [
                r.number,
                r.state.lower(),
                r.value,
                *([r.robustness] if both else []),
                r.epochs,
                *(r.parameters.get(k) for k in keys),
                r.reason if r.state == "FAIL" else "",
            ]
            for r in result.records
        ],
    )


def _history(result: SearchResult) -> bytes:
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.2), layout="constrained")
        axes = figure.subplots()
        for state, colour in (("COMPLETE", "C0"), ("PRUNED", "C7")):
            points = [(r.number, r.value) for r in result.records if r.state == state and r.value is not None]
            if points:
                axes.scatter(*zip(*points, strict=True), color=colour, label=state.lower(), s=22)
        best, line = -1.0, []
        for record in sorted(result.records, key=lambda r: r.number):
            if record.state == "COMPLETE" and record.value is not None:
                best = max(best, record.value)
            if best >= 0:
                line.append((record.number, best))
        axes.step(*zip(*line, strict=True), where="post", color="C1", label="best so far")
        axes.set(xlabel="trial", ylabel="validation macro-F1")
        axes.legend(frameon=False)
        return svg(figure)


def _front(result: SearchResult) -> bytes:
    front = set(result.study.front())
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        points = {r.number: (r.value or 0.0, r.robustness) for r in result.records if r.robustness is not None}
        axes.scatter(*zip(*points.values(), strict=True), color="C7", s=22, label="trials")
        best = sorted(point for number, point in points.items() if number in front)
        axes.plot(*zip(*best, strict=True), color="C1", marker="o", label="Pareto front")
        axes.annotate("chosen", points[result.best.number], xytext=(6, -12), textcoords="offset points")
        axes.set(xlabel="macro-F1", ylabel="area under the missing-rate curve")
        axes.legend(frameon=False)
        return svg(figure)


def _slices(result: SearchResult) -> bytes:
    keys = list(result.best.parameters)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.8 * ((len(keys) + 2) // 3)), layout="constrained")
        grid = figure.subplots((len(keys) + 2) // 3, min(3, len(keys)), squeeze=False).ravel()
        for axes, key in zip(grid, keys, strict=False):
            _slice(axes, result, key)
        for axes in grid[len(keys) :]:
            axes.set_axis_off()
        return svg(figure)


def _slice(axes: Axes, result: SearchResult, key: str) -> None:
    points = [(r.parameters[key], r.value) for r in result.records if r.value is not None and key in r.parameters]
    values = [value for value, _ in points]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    axes.scatter([v if numeric else str(v) for v in values], [score for _, score in points], s=18)
    if numeric and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel="validation macro-F1")


def _importances(importances: dict[str, float]) -> bytes:
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 0.6 + 0.4 * len(importances)), layout="constrained")
        axes = figure.subplots()
        names = list(importances)[::-1]
        axes.barh(names, [importances[name] for name in names])
        axes.set(xlabel="share of explained variation")
        return svg(figure)
