"""Figures of a search: how it went, what it cost, and which parameters mattered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from emolab.reports.figures import STYLE, count_in_whole_numbers, svg

if TYPE_CHECKING:
    from emolab.tuning.importances import Importances
    from emolab.tuning.search import SearchResult
    from emolab.tuning.trials import TrialRecord

_SCORE = "validation macro-F1"
_SHADES = LinearSegmentedColormap.from_list("score", ["#8fb0d8", "#08306b"])
"""From the worst score to the best; its light end is still seen on white."""
_STATES = (("COMPLETE", "C0"), ("PRUNED", "C7"))


def search_figures(result: SearchResult) -> dict[str, bytes]:
    """Name -> SVG of every figure that the search gives rise to, in the order in which they are shown."""
    figures = {"history": history(result.records, result.study.order_of_end())}
    if any(record.robustness is not None for record in result.records):
        figures["front"] = front(result)
    figures["budget"] = budget(result.records, result.rungs)
    figures["slices"] = slices(result.records)
    if len(_keys(result.records)) > 1:
        figures["parallel"] = parallel(result.records, chosen=result.best.number)
    found = result.study.importances()
    if found.shares:
        figures["importances"] = importances(found)
    return figures


def history(records: Sequence[TrialRecord], order_of_end: Sequence[int]) -> bytes:
    """The score of every trial and the best so far: by trial, and by the epochs of all that had ended by then.

    Args:
        order_of_end: the trials' numbers, the first to end first.
    """
    by_number = {record.number: record for record in sorted(records, key=lambda record: record.number)}
    ended = [by_number[number] for number in order_of_end if number in by_number]
    paid = dict(zip([r.number for r in ended], np.cumsum([r.epochs for r in ended]).tolist(), strict=True))
    panels = ((list(by_number.values()), {number: number for number in by_number}), (ended, paid))
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.2), layout="constrained")
        by_trial, by_epoch = figure.subplots(1, 2, sharey=True)
        for axes, (ordered, place) in zip((by_trial, by_epoch), panels, strict=True):
            for state, colour in _STATES:
                points = [(place[r.number], r.value) for r in ordered if r.state == state and r.value is not None]
                if points:
                    axes.scatter(*zip(*points, strict=True), color=colour, label=state.lower(), s=22)
            line = [(place[number], best) for number, best in best_so_far(ordered)]
            if line:
                axes.step(*zip(*line, strict=True), where="post", color="C1", label="best so far")
        by_trial.set(xlabel="trial", ylabel=_SCORE)
        by_epoch.set(xlabel="epochs of the trials that had ended")
        for axes in (by_trial, by_epoch):
            count_in_whole_numbers(axes.xaxis)
        by_trial.legend(frameon=False)
        return svg(figure)


def best_so_far(ordered: Sequence[TrialRecord]) -> list[tuple[int, float]]:
    """(trial, best completed score up to it), from the first completed trial on, in the order given."""
    line: list[tuple[int, float]] = []
    for record in ordered:
        completed = [record.value] if record.state == "COMPLETE" and record.value is not None else []
        if known := [*completed, *(value for _, value in line[-1:])]:
            line.append((record.number, max(known)))
    return line


def epochs_by_rung(records: Sequence[TrialRecord], rungs: Sequence[int]) -> list[tuple[str, int, int]]:
    """Where the epochs went: for each stretch between decisions its name, the trials that entered it and the epochs
    that were trained in it. The epochs of all stretches are all epochs."""
    last = max((record.epochs for record in records), default=0)
    places = [0, *(rung for rung in rungs if rung < last), last]
    return [
        (
            f"{start + 1}-{end}" if end > start + 1 else f"{end}",
            sum(record.epochs > start for record in records),
            sum(min(record.epochs, end) - start for record in records if record.epochs > start),
        )
        for start, end in pairwise(places)
        if end > start
    ]


def budget(records: Sequence[TrialRecord], rungs: Sequence[int]) -> bytes:
    """Epochs spent between the decisions, and how many trials came so far."""
    rows = epochs_by_rung(records, rungs)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.8), layout="constrained")
        axes = figure.subplots()
        bars = axes.bar([name for name, _, _ in rows], [epochs for _, _, epochs in rows], color="C0", width=0.6)
        axes.bar_label(bars, [f"{trials} trial{'s' * (trials != 1)}" for _, trials, _ in rows], padding=2)
        axes.set(xlabel="epochs of a trial", ylabel="epochs spent")
        count_in_whole_numbers(axes.yaxis)
        axes.margins(y=0.15)
        return svg(figure)


def front(result: SearchResult) -> bytes:
    """Both objectives of every trial, and the trials that no other one beats in both."""
    unbeaten = set(result.study.front())
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        points = {r.number: (r.value or 0.0, r.robustness) for r in result.records if r.robustness is not None}
        axes.scatter(*zip(*points.values(), strict=True), color="C7", s=22, label="trials")
        best = sorted(point for number, point in points.items() if number in unbeaten)
        axes.plot(*zip(*best, strict=True), color="C1", marker="o", label="Pareto front")
        axes.annotate("chosen", points[result.best.number], xytext=(6, -12), textcoords="offset points")
        axes.set(xlabel="macro-F1", ylabel="area under the missing-rate curve")
        axes.legend(frameon=False)
        return svg(figure)


def slices(records: Sequence[TrialRecord]) -> bytes:
    """Each parameter against the score."""
    keys = _keys(records)
    rows = (len(keys) + 2) // 3
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.8 * rows), layout="constrained")
        grid = figure.subplots(rows, min(3, len(keys)), squeeze=False).ravel()
        for axes, key in zip(grid, keys, strict=False):
            _slice(axes, records, key)
        for axes in grid[len(keys) :]:
            axes.set_axis_off()
        return svg(figure)


def _slice(axes: Axes, records: Sequence[TrialRecord], key: str) -> None:
    scored = [r for r in records if r.value is not None and key in r.parameters]
    numeric = _numeric([r.parameters[key] for r in scored])
    for state, colour in _STATES:
        mine = [r for r in scored if r.state == state]
        values = [r.parameters[key] if numeric else str(r.parameters[key]) for r in mine]
        axes.scatter(values, [r.value or 0.0 for r in mine], color=colour, s=18)
    if numeric and _logarithmic([r.parameters[key] for r in scored]):
        axes.set_xscale("log")
    elif numeric and all(isinstance(r.parameters[key], int) for r in scored):
        count_in_whole_numbers(axes.xaxis)
    axes.set(xlabel=key, ylabel=_SCORE)


def parallel(records: Sequence[TrialRecord], *, chosen: int) -> bytes:
    """Every scored trial as a line through its parameters, the darker the better it scored; the chosen one on top.

    Args:
        chosen: the trial whose parameters were taken. Others may have scored higher: before they were stopped, or in
            the search where a final decided.
    """
    keys = _keys(records)
    scored = sorted((r for r in records if r.value is not None), key=lambda r: r.value or 0.0)
    scores = np.array([r.value or 0.0 for r in scored])
    shades = (scores - scores.min()) / max(float(np.ptp(scores)), 1e-12)
    colours = ScalarMappable(Normalize(scores.min(), scores.max()), _SHADES)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False)
        heights = np.stack([_heights(axes, place, key, scored) for place, key in enumerate(keys)], axis=1)
        heights = np.column_stack([heights, shades])
        for row, score, shade in zip(heights, scores, shades, strict=True):
            axes.plot(range(len(keys) + 1), row, color=colours.to_rgba(score), linewidth=1.0 + 0.8 * shade)
        for row in heights[[record.number == chosen for record in scored]]:
            axes.plot(range(len(keys) + 1), row, color="C1", linewidth=2.2, label="chosen")
        figure.colorbar(colours, ax=axes, label=_SCORE, shrink=0.8, pad=0.02)
        figure.legend(frameon=False, fontsize=8, loc="outside upper right")
        axes.set_xticks(range(len(keys) + 1), [*(key.split(".")[-1] for key in keys), "macro-F1"])
        axes.set_yticks([])
        _ends(axes, len(keys), f"{scores.min():.3f}", f"{scores.max():.3f}")
        axes.set_ylim(-0.12, 1.12)
        return svg(figure)


def _heights(axes: Axes, place: int, key: str, scored: Sequence[TrialRecord]) -> np.ndarray:
    """A parameter's values between 0 and 1, NaN where a trial does not have it; writes the ends of its axis."""
    values = [r.parameters.get(key) for r in scored]
    known = [value for value in values if value is not None]
    if not _numeric(known):
        names = sorted({str(value) for value in known})
        _ends(axes, place, names[0], names[-1])
        span = max(1, len(names) - 1)
        return np.array([np.nan if value is None else names.index(str(value)) / span for value in values])
    logarithmic = _logarithmic(known)
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    _ends(axes, place, f"{low:.3g}", f"{high:.3g}")
    if logarithmic:
        numbers, low, high = np.log(numbers), np.log(low), np.log(high)
    return (numbers - low) / max(float(high - low), 1e-12)


def _ends(axes: Axes, place: int, low: str, high: str) -> None:
    axes.axvline(place, color="0.6", linewidth=0.8)
    axes.annotate(low, (place, -0.03), ha="center", va="top", fontsize=8)
    axes.annotate(high, (place, 1.03), ha="center", va="bottom", fontsize=8)


def importances(found: Importances) -> bytes:
    """By which parameters the best trials differ from all of them, and what was compared."""
    names = list(found.shares)[::-1]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.0 + 0.4 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(names, [found.shares[name] for name in names])
        axes.set_title(found.compared, fontsize=10)
        axes.set(xlabel="difference between the best quarter's values and all trials' (PED-ANOVA, sum 1)")
        axes.set_xlim(0.0, 1.0)
        return svg(figure)


def _keys(records: Sequence[TrialRecord]) -> list[str]:
    """Every parameter that a scored trial has."""
    return list(dict.fromkeys(key for record in records if record.value is not None for key in record.parameters))


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _logarithmic(values: Sequence[Any]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20
