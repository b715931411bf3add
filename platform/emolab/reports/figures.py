"""Figures as SVG, drawn without a display and without matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "emolab",  # equal figures, equal bytes
}


def training_curves(reports: Sequence[Mapping[str, float | None]]) -> bytes:
    """Loss and validation score over the epochs (Fig. 6 of the paper)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.2), layout="constrained")
        loss, score = figure.subplots(1, 2)
        _curve(loss, reports, "train_loss", "training")
        _curve(loss, reports, "validation_loss", "validation")
        loss.set(xlabel="epoch", ylabel="loss per step")
        _curve(score, reports, "validation_macro_f1", "macro-F1")
        _curve(score, reports, "validation_accuracy", "accuracy")
        score.set(xlabel="epoch", ylabel="validation score")
        for axes in (loss, score):
            count_in_whole_numbers(axes.xaxis)
            if axes.lines:  # a run without validation has no score
                axes.legend(frameon=False)
        return svg(figure)


def count_in_whole_numbers(axis: Axis, *, most: int = 10) -> None:
    """Put ticks at whole numbers alone, at most so many and one: there is no half an epoch.

    Without ``min_n_ticks`` matplotlib divides an axis that shows a single whole number into fractions of it.
    """
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def from_zero(axes: Axes) -> None:
    """Let the y axis begin at 0 and end above all that is drawn, which on an axis of its own height a level line is
    not: matplotlib's margin is a part of what the values span."""
    axes.set_ylim(0.0, 1.08 * axes.dataLim.ymax or 1.0)


def svg(figure: Figure) -> bytes:
    """The figure's SVG document."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()


def _curve(axes: object, reports: Sequence[Mapping[str, float | None]], key: str, label: str) -> None:
    points = [(report["epoch"], report[key]) for report in reports if report.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=2.5)  # pyright: ignore[reportAttributeAccessIssue]
