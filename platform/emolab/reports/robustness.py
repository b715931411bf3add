"""The page of a robustness sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from emolab.reports.figures import STYLE, from_zero, svg
from emolab.reports.page import Section, Styled, TableData, page
from emolab.reports.tables import to_csv, to_latex
from emolab.robustness.corruptions.catalog import corruption
from emolab.studies.bootstrap import Metric
from emolab.studies.resampling import FEWEST_CLUSTERS
from emolab.studies.robustness_results import Group, RobustnessResults

_SCORES: Mapping[Metric, str] = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
COMPARED_RATE = 0.6
"""The rate at which the paper claims an accuracy of 0.85 (section V.E)."""


def robustness_files(results: RobustnessResults) -> dict[str, bytes]:
    """File name -> content: report.html, and its tables and the points of all curves as CSV and LaTeX."""
    differences = _differences(results)
    sections = _sections(results, differences)
    files = {"report.html": page(f"Robustness {results.name}", _lines(results), sections)}
    tables = {section.name or section.title: section.table for section in sections if section.table is not None}
    for name, table in (tables | {"Curves": _points(results), "Differences": differences}).items():
        stem = "tables/" + re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        files |= {f"{stem}.csv": to_csv(table), f"{stem}.tex": to_latex(table)}
    return files


def robustness_page(results: RobustnessResults) -> bytes:
    """One self-contained HTML file."""
    return robustness_files(results)["report.html"]


def _lines(results: RobustnessResults) -> list[str]:
    reference = results.manifest.splits[results.split].reference_scores
    lines = [
        f"{len(results.cells)} cells on the {results.split} split of {results.manifest.corpus} "
        f"({len(results.groups[0].tallies[0].session_ids)} sessions), data set {results.manifest.digest[:16]}, "
        f"sweep run {results.run_id}.",
        _BANDS_TEXT if results.has_intervals else _NO_BANDS_TEXT,
        _chance(results),
    ]
    if "ceiling_accuracy" in reference:
        lines.append(
            f"Exact filter on clean sessions: accuracy {reference['ceiling_accuracy']:.4f}. "
            "The data are simulated: nothing here is to be set beside published scores."
        )
    return lines


def _sections(results: RobustnessResults, differences: TableData) -> list[Section]:
    sections = _summaries(results)
    if results.main_curve() is not None:
        sections.append(
            Section(title=f"Score against the {_unit(results)}", text=_which(results), figure=_curves(results))
        )
        sections += _comparison(results, differences)
        sections.append(Section(title=f"Calibration against the {_unit(results)}", figure=_calibration(results)))
        sections.append(_heat_map_section(results))
    if any(group.agreement for group in results.groups):
        sections.append(
            Section(
                title="Confidence against true quality",
                name="Confidence",
                text="Spearman correlation of a modality's weight with its true quality, over the clean steps at which "
                "it was observed; 1 would be a weight that orders steps as the simulator's quality does.",
                table=_agreement(results),
            )
        )
    sections.append(Section(title="Runs", table=_runs(results)))
    return sections


def _chance(results: RobustnessResults) -> str:
    """What the scores are to be read against, and which models have hardly left it."""
    chance = results.chance
    text = (
        f"Always answering training's most frequent class: accuracy {chance['accuracy']:.4f}, macro-F1 "
        f"{chance['macro_f1']:.4f} (dotted in the figures)."
    )
    near = [group.label for group in results.groups if results.near_chance(group)]
    if not near:
        return text
    return (
        f"{text} Within five points of macro-F1 of that on clean sessions: {'; '.join(near)}. Whatever they keep at a "
        "rate says nothing of their robustness."
    )


_BANDS_TEXT = (
    "Bands are 95 % session-clustered bootstrap intervals; training seeds and corruption seeds are averaged over."
)
_NO_BANDS_TEXT = (
    f"Fewer than {FEWEST_CLUSTERS} sessions: nothing is known of other ones, so there are no intervals and no "
    "comparisons. Training seeds and corruption seeds are averaged over."
)
_TOLERATED = "largest_tolerated_rate"
_COLUMNS = {
    "clean_accuracy": "accuracy, clean",
    "clean_macro_f1": "macro-F1, clean",
    "area_under_curve": "area under the curve",
    _TOLERATED: "tolerated rate",
    "effective_robustness": "effective robustness",
    "mean_corruption_error": "corruption error",
    "relative_mean_corruption_error": "relative corruption error",
    "clean_calibration_error": "calibration error",
    "clean_brier": "Brier score",
    "worst_speaker_macro_f1": "its macro-F1",
}
"""Figure of the summary -> what people call it."""
_SUMMARY = ("clean_accuracy", "clean_macro_f1", "area_under_curve", _TOLERATED)
_AGAINST_LATE_FUSION = ("effective_robustness", "mean_corruption_error", "relative_mean_corruption_error")
_ON_CLEAN_SESSIONS = ("clean_calibration_error", "clean_brier")

_RATE_TEXT = (
    "Area: mean macro-F1 over the missing rates, every modality at the same rate. Tolerated rate: the largest of them "
    "up to which at most five points of macro-F1 are lost; a model near chance has no more to lose, and its rate is "
    "marked so. "
)
_SUMMARY_TEXT = (
    "Worst condition: that with the lowest mean macro-F1 over its levels. A model without a defence, that is trained "
    "without missing or noisy modalities, is marked clean."
)
_LATE_FUSION_TEXT = (
    "Effective robustness, where there is a missing-rate curve: what a model keeps beyond late fusion of the same "
    "training, summed over the rates; above 0 is better. Corruption errors: 1 - macro-F1 over that of late fusion, "
    "mean over the conditions; relative: of what a corruption adds to the clean error. Below 1 is better."
)
_SPEAKERS_TEXT = (
    "The macro-F1 of a speaker is the mean over the classes that occur with that speaker, elsewhere it is over all "
    "classes: a speaker who never was bored is not held against a model."
)
_HEAT_MAP_TEXT = (
    "Mean over seeds. The levels of a condition are its rates or severities, from low to high. In every report the "
    "colours run from 0 to 1, so that equal colours are equal scores and a point more or less is hardly seen; the "
    "scores here lie between {low:.2f} and {high:.2f}."
)


def _summaries(results: RobustnessResults) -> list[Section]:
    """The figures of every model, in tables that a page has room for."""
    summaries = [results.summary(group) for group in results.groups]
    pairs = list(zip(results.groups, summaries, strict=True))

    def table(keys: Sequence[str], more: Mapping[str, Callable[[Group], Any]]) -> TableData:
        known = [key for key in keys if any(key in summary for summary in summaries)]
        rows = [[g.label, *(value(g, s, key) for key in known), *(each(g) for each in more.values())] for g, s in pairs]
        return TableData(columns=["model", *(_COLUMNS[key] for key in known), *more], rows=rows)

    def value(group: Group, summary: Mapping[str, float], key: str) -> float | Styled | None:
        if key == _TOLERATED and key in summary and results.near_chance(group):
            return Styled(f"{summary[key]:g} (near chance)", "idle", summary[key])
        return summary.get(key)

    def condition(group: Group) -> Styled | None:
        found = results.worst_condition(group)
        return Styled(f"{found[0]}: {found[1]:.3f}", "ids") if found else None

    first = table(_SUMMARY, {"seeds": lambda group: len(group.run_ids), "worst condition": condition})
    speakers = {
        "worst speaker": lambda group: results.worst_speaker(group)[0],
        _COLUMNS["worst_speaker_macro_f1"]: lambda group: results.worst_speaker(group)[1],
    }
    text = (_RATE_TEXT if results.missing_rate_curve() is not None else "") + _SUMMARY_TEXT
    sections = [Section(title="Summary", text=text, table=first)]
    if any(key in summary for summary in summaries for key in _AGAINST_LATE_FUSION):
        table_against = table(_AGAINST_LATE_FUSION, {})
        sections.append(Section(title="Against late fusion", text=_LATE_FUSION_TEXT, table=table_against))
    sections.append(
        Section(
            title="Calibration and speakers, on clean sessions",
            name="Calibration and speakers",
            text=_SPEAKERS_TEXT,
            table=table(_ON_CLEAN_SESSIONS, speakers),
        )
    )
    return sections


def _curves(results: RobustnessResults) -> bytes:
    main = results.main_curve()
    assert main is not None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.8 + _legend_height(results)), layout="constrained")
        metrics: tuple[Metric, Metric] = ("accuracy", "macro_f1")
        left, right = figure.subplots(1, 2)
        for axes, metric in zip((left, right), metrics, strict=True):
            for number, group in enumerate(results.groups):
                points = results.points(group, main[1], metric)
                axes.plot(*zip(*points.items(), strict=True), **_style(group, number), label=group.label)
                if results.has_intervals:
                    found = results.intervals(group, main[1], metric)
                    low, high = [each.low for each in found], [each.high for each in found]
                    axes.fill_between(list(points), low, high, color=f"C{number}", alpha=0.12, linewidth=0)
            axes.axhline(results.chance[metric], color="0.35", linestyle=":", linewidth=1.2, label="class prior")
            # From 0: on an axis that is cut to the scores, noise of a point looks like a collapse.
            axes.set(xlabel=_rate(results), ylabel=_SCORES[metric])
            from_zero(axes)
        _legend(figure, left)
        return svg(figure)


_LEGEND_COLUMNS = 3


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the panels, where it lies across no curve however many models there are."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8)


def _legend_height(results: RobustnessResults) -> float:
    """Inches that the legend takes."""
    return 0.2 * math.ceil((len(results.groups) + 1) / _LEGEND_COLUMNS)


_MARKERS = "os^Dv"


def _style(group: Group, number: int) -> dict[str, Any]:
    """Of a model's line. There are ten colours: after ten models they come again with another marker."""
    return {
        "color": f"C{number}",
        "linestyle": "-" if group.trained_clean else "--",
        "marker": _MARKERS[number // 10 % len(_MARKERS)],
        "markersize": 3 + number // 10,
    }


def _comparison(results: RobustnessResults, differences: TableData) -> list[Section]:
    """Empty where nothing can be compared: no reference, nobody trained as it was, or another rate."""
    if not differences.rows:
        return []
    text = (
        f"Difference in accuracy between models trained in the same way; positive favours {results.reference}. "
        "Paired bootstrap over sessions, Holm's correction over the others."
    )
    title = f"{results.reference} against the others at {_unit(results)} {COMPARED_RATE}"
    told = [i for i, column in enumerate(differences.columns) if column not in ("reference", "metric", "level")]
    table = TableData(
        columns=[differences.columns[i] for i in told], rows=[[row[i] for i in told] for row in differences.rows]
    )
    return [Section(title=title, text=text, table=table, name="Differences")]


def _differences(results: RobustnessResults) -> TableData:
    """The reference against the others, with what and where; no row where nothing can be compared."""
    rows = [
        [results.reference, c.other, "accuracy", COMPARED_RATE, c.difference.value, c.difference.low, c.difference.high,
         c.difference.p, c.adjusted_p]
        for c in results.compared(COMPARED_RATE)
    ]  # fmt: skip
    columns = ["reference", "other", "metric", "level", "difference", "low", "high", "p", "p (Holm)"]
    return TableData(columns=columns, rows=rows)


def _calibration(results: RobustnessResults) -> bytes:
    main = results.main_curve()
    assert main is not None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.2 + _legend_height(results)), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, measure, name in (
            (left, Group.calibration, "expected calibration error"),
            (right, Group.brier, "Brier score"),
        ):
            for number, group in enumerate(results.groups):
                values = [measure(group, cells) for cells in main[1].values()]
                axes.plot(list(main[1]), values, **_style(group, number), label=group.label)
            axes.set(xlabel=_rate(results), ylabel=name)
            from_zero(axes)
        _legend(figure, left)
        return svg(figure)


def _unit(results: RobustnessResults) -> str:
    """What the levels of the main curve are: rate or severity."""
    main = results.main_curve()
    assert main is not None
    return corruption(main[0][0]).unit


def _rate(results: RobustnessResults) -> str:
    """What the main curve's levels are, for an axis."""
    main = results.main_curve()
    assert main is not None
    return f"{_unit(results)}: {results.condition(main[0])}"


def _which(results: RobustnessResults) -> str:
    """That another curve stands in for the missing rate's."""
    if results.missing_rate_curve() is not None:
        return ""
    return (
        f"The sweep has no curve over the missing rate; drawn is one of its {len(results.curves())} conditions, all of "
        "which are in the map below."
    )


def _heat_map_section(results: RobustnessResults) -> Section:
    curves = results.curves()
    widest = max(len(levels) for levels in curves.values())
    tables = []
    for group in results.groups:
        table = np.full((len(curves), widest), np.nan)
        for row, levels in enumerate(curves.values()):
            table[row, : len(levels)] = [*results.points(group, levels).values()]
        tables.append(table)
    low, high = min(np.nanmin(t) for t in tables), max(np.nanmax(t) for t in tables)
    return Section(
        title="Macro-F1 by condition and level",
        text=_HEAT_MAP_TEXT.format(low=low, high=high),
        figure=heat_map([results.condition(key) for key in curves], [g.label for g in results.groups], tables),
    )


def heat_map(conditions: Sequence[str], models: Sequence[str], tables: Sequence[NDArray[np.float64]]) -> bytes:
    """Scores of every model under every condition; the colours always run from 0 to 1.

    Args:
        tables: one per model, (conditions, levels), the clean score first; NaN where a condition has fewer levels.
    """
    widest = tables[0].shape[1]
    with rc_context(STYLE), rc_context({"axes.grid": False}):
        height = 1.0 + 0.32 * len(conditions)
        figure = Figure(figsize=(9.5, height * len(tables)), layout="constrained")
        colours = ScalarMappable(Normalize(0.0, 1.0), "viridis")
        grid = figure.subplots(len(tables), 1, squeeze=False).ravel()
        for axes, model, table in zip(grid, models, tables, strict=True):
            axes.imshow(table, aspect="auto", norm=colours.norm, cmap=colours.cmap)
            axes.set_yticks(range(len(conditions)), conditions, fontsize=7)
            axes.set_xticks(range(widest), ["clean", *(f"level {i}" for i in range(1, widest))], fontsize=7)
            axes.set_title(model, fontsize=9, loc="left")
            for (y, x), value in np.ndenumerate(table):
                if np.isfinite(value):
                    ink = "white" if value < 0.6 else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
        figure.colorbar(colours, ax=list(grid), label="macro-F1, 0 to 1", shrink=0.6)
        return svg(figure)


def _points(results: RobustnessResults) -> TableData:
    """A row for every model, condition and level, level 0 being the clean sessions; means over the seeds."""
    rows = [
        [group.label, key[0], "-".join(key[1]), level, *(group.score(cells, metric) for metric in _SCORES),
         group.calibration(cells), group.brier(cells), len(group.run_ids), len(cells)]
        for group in results.groups
        for key, levels in results.curves().items()
        for level, cells in levels.items()
    ]  # fmt: skip
    scores = [*_SCORES.values(), _COLUMNS["clean_calibration_error"], _COLUMNS["clean_brier"]]
    seeds = ["training seeds", "corruption seeds"]
    return TableData(columns=["model", "corruption", "modalities", "level", *scores, *seeds], rows=rows)


def _agreement(results: RobustnessResults) -> TableData:
    modalities = list(results.manifest.dimensions)
    rows = [[g.label, *(g.agreement.get(name) for name in modalities)] for g in results.groups if g.agreement]
    return TableData(columns=["model", *modalities], rows=rows)


def _runs(results: RobustnessResults) -> TableData:
    rows = [[group.label, group.engine, run_id] for group in results.groups for run_id in group.run_ids]
    return TableData(columns=["model", "engine", "training run"], rows=rows)
