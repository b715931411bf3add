"""The page of a robustness sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from emolab.reports.figures import STYLE, svg
from emolab.reports.page import Section, TableData, page

if TYPE_CHECKING:
    from emolab.studies.bootstrap import Metric
    from emolab.studies.robustness_results import Group, RobustnessResults

_SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
COMPARED_RATE = 0.6
"""The rate at which the paper claims an accuracy of 0.85 (section V.E)."""


def robustness_page(results: RobustnessResults) -> bytes:
    """One self-contained HTML file."""
    reference = results.manifest.splits[results.split].reference_scores
    lines = [
        f"{len(results.cells)} cells on the {results.split} split of {results.manifest.corpus} "
        f"({len(results.groups[0].tallies[0].session_ids)} sessions), data set {results.manifest.digest[:16]}, "
        f"sweep run {results.run_id}.",
        "Bands are 95 % session-clustered bootstrap intervals; training seeds and corruption seeds are averaged over.",
    ]
    if "ceiling_accuracy" in reference:
        lines.append(
            f"Exact filter on clean sessions: accuracy {reference['ceiling_accuracy']:.4f}. "
            "The data are simulated: nothing here is to be set beside published scores."
        )
    sections = [Section(title="Summary", table=_summary(results))]
    if results.main_curve() is not None:
        sections.append(Section(title="Score against the rate", figure=_curves(results)))
        sections += _comparison(results)
        sections.append(Section(title="Calibration against the rate", figure=_calibration(results)))
        sections.append(Section(title="Macro-F1 by corruption and level", figure=_heat_map(results)))
    if any(group.agreement for group in results.groups):
        sections.append(
            Section(
                title="Confidence against true quality",
                text="Spearman correlation of a modality's weight with its true quality, over the clean steps at which "
                "it was observed; 1 would be a weight that orders steps as the simulator's quality does.",
                table=_agreement(results),
            )
        )
    sections.append(Section(title="Runs", table=_runs(results)))
    return page(f"Robustness {results.name}", lines, sections)


def _summary(results: RobustnessResults) -> TableData:
    summaries = [results.summary(group) for group in results.groups]
    keys = list(dict.fromkeys(key for summary in summaries for key in summary))
    rows = []
    for group, summary in zip(results.groups, summaries, strict=True):
        condition = results.worst_condition(group)
        rows.append(
            [
                group.label,
                len(group.run_ids),
                group.engine,
                *(summary.get(key) for key in keys),
                f"{condition[0]} ({condition[1]:.3f})" if condition else None,
                results.worst_speaker(group)[0],
            ]
        )
    heads = [key.replace("macro_f1", "macro-F1").replace("_", " ") for key in keys]
    return TableData(columns=["model", "models", "engine", *heads, "worst condition", "worst speaker"], rows=rows)


def _curves(results: RobustnessResults) -> bytes:
    main = results.main_curve()
    assert main is not None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        metrics: tuple[Metric, Metric] = ("accuracy", "macro_f1")
        left, right = figure.subplots(1, 2)
        for axes, metric in zip((left, right), metrics, strict=True):
            for number, group in enumerate(results.groups):
                points = results.scores(group, main[1], metric)
                _band(axes, list(main[1]), [(p.value, p.low, p.high) for p in points], group, number)
            axes.set(xlabel=f"rate of {main[0][0]}", ylabel=_SCORES[metric])
        right.legend(frameon=False, fontsize=8)
        return svg(figure)


def _band(axes: Axes, x: list[float], points: list[tuple[float, float, float]], group: Group, number: int) -> None:
    value, low, high = zip(*points, strict=True)
    axes.plot(x, value, _line(group), color=f"C{number}", label=group.label, marker="o", markersize=3)
    axes.fill_between(x, low, high, color=f"C{number}", alpha=0.12, linewidth=0)


def _line(group: Group) -> str:
    return "-" if group.trained_clean else "--"


def _comparison(results: RobustnessResults) -> list[Section]:
    """Empty where nothing can be compared: no reference, nobody trained as it was, or another rate."""
    rows = [
        [c.other, c.difference.value, c.difference.low, c.difference.high, c.difference.p, c.adjusted_p]
        for c in results.compared(COMPARED_RATE)
    ]
    text = (
        f"Difference in accuracy between models trained in the same way; positive favours {results.reference}. "
        "Paired bootstrap over sessions, Holm's correction over the others."
    )
    title = f"{results.reference} against the others at rate {COMPARED_RATE}"
    table = TableData(columns=["other", "difference", "low", "high", "p", "p (Holm)"], rows=rows)
    return [Section(title=title, text=text, table=table)] if rows else []


def _calibration(results: RobustnessResults) -> bytes:
    main = results.main_curve()
    assert main is not None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, group in enumerate(results.groups):
            style = _line(group)
            rates = list(main[1])
            left.plot(rates, [group.calibration(c) for c in main[1].values()], style, color=f"C{number}")
            right.plot(rates, [group.brier(c) for c in main[1].values()], style, color=f"C{number}", label=group.label)
        left.set(xlabel="rate", ylabel="expected calibration error")
        right.set(xlabel="rate", ylabel="Brier score")
        right.legend(frameon=False, fontsize=8)
        return svg(figure)


def _heat_map(results: RobustnessResults) -> bytes:
    curves = results.curves()
    widest = max(len(levels) for levels in curves.values())
    tables = []
    for group in results.groups:
        table = np.full((len(curves), widest), np.nan)
        for row, levels in enumerate(curves.values()):
            table[row, : len(levels)] = [*results.points(group, levels).values()]
        tables.append(table)
    with rc_context(STYLE), rc_context({"axes.grid": False}):
        height = 1.0 + 0.32 * len(curves)
        figure = Figure(figsize=(9.5, height * len(tables)), layout="constrained")
        low, high = min(np.nanmin(t) for t in tables), max(np.nanmax(t) for t in tables)
        colours = ScalarMappable(Normalize(low, high), "viridis")
        grid = figure.subplots(len(tables), 1, squeeze=False).ravel()
        for axes, group, table in zip(grid, results.groups, tables, strict=True):
            axes.imshow(table, aspect="auto", norm=colours.norm, cmap=colours.cmap)
            axes.set_yticks(range(len(curves)), [f"{k[0]}: {'+'.join(k[1])}" for k in curves], fontsize=7)
            axes.set_xticks(range(widest), ["clean", *(f"level {i}" for i in range(1, widest))], fontsize=7)
            axes.set_title(group.label, fontsize=9, loc="left")
            for (y, x), value in np.ndenumerate(table):
                if np.isfinite(value):
                    ink = "white" if value < (low + high) / 2 else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
        figure.colorbar(colours, ax=list(grid), label="macro-F1", shrink=0.6)
        return svg(figure)


def _agreement(results: RobustnessResults) -> TableData:
    modalities = list(results.manifest.dimensions)
    rows = [[g.label, *(g.agreement.get(name) for name in modalities)] for g in results.groups if g.agreement]
    return TableData(columns=["model", *modalities], rows=rows)


def _runs(results: RobustnessResults) -> TableData:
    rows = [[group.label, run_id] for group in results.groups for run_id in group.run_ids]
    return TableData(columns=["model", "training run"], rows=rows)
