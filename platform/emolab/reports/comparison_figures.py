"""The figures of a comparison: modality weights (Fig. 3), F1 per class (Fig. 4), loss curves (Fig. 6), differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emolab.reports.figures import STYLE, count_in_whole_numbers, from_zero, svg
from emolab.studies.bootstrap import CurveInterval, DifferenceInterval, Interval
from emolab.studies.resampling import FEWEST_CLUSTERS

History = Sequence[Mapping[str, Any]]
"""Reports of one run's epochs."""


def modality_weights(weights: CurveInterval, modalities: Sequence[str]) -> bytes:
    """Weight of each modality over the steps of a session, with confidence bands (Fig. 3)."""
    known = weights.sessions >= FEWEST_CLUSTERS  # fewer have no band
    steps = 1 + np.flatnonzero(known)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(modalities):
            axes.plot(steps, weights.mean[known, i], color=f"C{i}", label=name, marker="o", markersize=2.5)
            axes.fill_between(
                steps, weights.low[known, i], weights.high[known, i], color=f"C{i}", alpha=0.2, linewidth=0
            )
        axes.set(xlabel="step of the session", ylabel="weight of the modality")
        from_zero(axes)
        count_in_whole_numbers(axes.xaxis)
        axes.legend(frameon=False, ncols=len(modalities))
        return svg(figure)


def class_scores(scores: Mapping[str, Sequence[Interval]], classes: Sequence[str]) -> bytes:
    """F1 of every class for a few models, with intervals and the values above them (Fig. 4)."""
    width = 0.8 / len(scores)
    places = np.arange(len(classes))
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, (model, intervals) in enumerate(scores.items()):
            x = places + (i - (len(scores) - 1) / 2) * width
            values = np.array([interval.value for interval in intervals])
            ends = np.array([[interval.low for interval in intervals], [interval.high for interval in intervals]])
            axes.bar(x, values, width * 0.95, color=f"C{i}", alpha=0.85, label=model)
            below, above = np.maximum(0.0, values - ends[0]), np.maximum(0.0, ends[1] - values)
            axes.errorbar(x, values, yerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=3)
            for place, value, top in zip(x, values, ends[1], strict=True):
                axes.annotate(f"{value:.2f}", (place, max(value, top) + 0.01), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(places, classes)
        axes.set(ylabel="F1", ylim=(0, 1.05))
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(scores))
        return svg(figure)


def loss_curves(histories: Mapping[str, Sequence[History]], *, columns: int = 4) -> bytes:
    """Training and validation loss of every model, one line per seed (Fig. 6).

    Models have loss terms of their own, so every panel has its own scale.
    """
    columns = min(columns, len(histories))
    rows = math.ceil(len(histories) / columns)
    height = 3.2 if rows == columns == 1 else 2.0 * rows + 0.3
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (model, runs) in zip(grid, histories.items(), strict=False):
            _losses(axes, runs)
            axes.set_title(model, fontsize=9)
        for axes in grid[len(histories) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        figure.supxlabel("epoch", fontsize=10)
        figure.supylabel("loss per step", fontsize=10)
        return svg(figure)


def _losses(axes: Axes, runs: Sequence[History]) -> None:
    for key, colour, label in (("train_loss", "C0", "training"), ("validation_loss", "C1", "validation")):
        shown = False
        for run in runs:
            points = [(report["epoch"], report[key]) for report in run if report.get(key) is not None]
            if points:
                name = None if shown else label
                alone = "o" if len(points) == 1 else ""  # one point has no line
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, alpha=0.8, label=name, marker=alone)
                shown = True
    count_in_whole_numbers(axes.xaxis, most=5)


def differences(intervals: Mapping[str, DifferenceInterval], *, reference: str, metric: str) -> bytes:
    """Every model's distance from the reference, with confidence intervals; right of zero it is worse."""
    names = list(intervals)[::-1]
    values = np.array([intervals[name].value for name in names])
    below = np.array([max(0.0, intervals[name].value - intervals[name].low) for name in names])
    above = np.array([max(0.0, intervals[name].high - intervals[name].value) for name in names])
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 0.9 + 0.3 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0.0, color="#666666", linewidth=1)
        axes.errorbar(values, np.arange(len(names)), xerr=[below, above], fmt="o", color="C0", markersize=4, capsize=3)
        axes.set_yticks(np.arange(len(names)), names)
        axes.set(
            xlabel=f"{metric} of {reference} minus that of the model, 95 % interval over sessions",
            ylim=(-0.6, len(names) - 0.4),
        )
        return svg(figure)
