"""Figures of a promotion and of a model card: challenger beside champion, thresholds as dashed lines."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emolab.registry.evidence import Evidence, Tested
from emolab.registry.judged import Judged
from emolab.registry.judgement import COMPARED, difference
from emolab.registry.sweep_evidence import Curve, SingleLosses
from emolab.registry.verdict import Missing
from emolab.reports.figures import STYLE, from_zero, svg
from emolab.scores import class_recall

LIMIT = {"color": "#c62f3b", "linestyle": "--", "linewidth": 1.2}


def against_champion(judged: Judged) -> bytes | None:
    """The interval of the difference, zero and the margin; None without a comparison."""
    asked = judged.gates.against_champion
    if judged.champion is None or asked.margin is None:
        return None
    found = difference(judged.gates, judged.challenger, judged.champion)
    if isinstance(found, Missing):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.7), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(min(found.low, -asked.margin) - 1.0, -asked.margin, color="#c62f3b", alpha=0.07, linewidth=0)
        axes.axvline(-asked.margin, label=f"margin {-asked.margin:+.3f}", **LIMIT)
        axes.axvline(0.0, color="#7a828c", linewidth=1)
        axes.errorbar(
            [found.value], [0], xerr=[[found.value - found.low], [found.high - found.value]],
            fmt="o", color="C0", capsize=5, linewidth=2,
            label=f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]",
        )  # fmt: skip
        reach = 1.25 * max(abs(found.low), abs(found.high), 2 * asked.margin, 0.01)
        axes.set(
            xlim=(-reach, reach), ylim=(-1, 1), yticks=[], xlabel=f"{COMPARED[asked.metric]}, challenger − champion"
        )
        axes.legend(frameon=False, loc="upper left", fontsize=9)
        return svg(figure)


def curves(judged: Judged) -> bytes | None:
    """Macro-F1 and calibration against the missing rate; None where the challenger has no curve."""
    drawn = [(label, evidence.curve) for label, evidence in _sides(judged) if isinstance(evidence.curve, Curve)]
    if not isinstance(judged.challenger.curve, Curve):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (label, curve) in enumerate(drawn):
            for axes, values in ((left, curve.scores), (right, curve.calibration)):
                axes.plot(curve.rates, values, color=f"C{number}", marker="o", markersize=3, label=label)
            mean = "mean over the rates" if number == 0 else None
            left.axhline(curve.area, color=f"C{number}", linewidth=0.8, alpha=0.6, label=mean)
        _limit(left, judged.gates.missing_modalities.least_area, "least mean over the rates")
        _limit(right, judged.gates.calibration.most_error, "most, at rate 0")
        left.set(xlabel="missing rate, every modality", ylabel="macro-F1", ylim=(0, 1))
        right.set(xlabel="missing rate, every modality", ylabel="expected calibration error")
        from_zero(right)
        left.legend(frameon=False, fontsize=8)
        right.legend(frameon=False, fontsize=8)
        return svg(figure)


def single_losses(judged: Judged) -> bytes | None:
    """What the absence of each modality leaves of macro-F1; None where nothing is known."""
    drawn = [(label, e.single_losses) for label, e in _sides(judged) if isinstance(e.single_losses, SingleLosses)]
    if not isinstance(judged.challenger.single_losses, SingleLosses):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.9), layout="constrained")
        axes = figure.subplots()
        for number, (label, losses) in enumerate(drawn):
            values = {"all present": losses.clean} | {f"no {name}": left for name, left in losses.without.items()}
            _bars(axes, list(values), list(values.values()), number, len(drawn), label)
            most = judged.gates.missing_modalities.most_single_loss
            if number == 0 and most is not None:
                axes.axhline(losses.clean - most, label="least allowed for the challenger", **LIMIT)
        axes.set(ylabel="macro-F1", ylim=(0, 1.05))
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)
        return svg(figure)


def recalls(judged: Judged) -> bytes | None:
    """Recall of every class; None where the challenger was not tested."""
    drawn = [(label, e.tested) for label, e in _sides(judged) if isinstance(e.tested, Tested)]
    if not isinstance(judged.challenger.tested, Tested):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.9), layout="constrained")
        axes = figure.subplots()
        classes = judged.challenger.tested.sessions.classes
        same = [(label, tested) for label, tested in drawn if tested.sessions.classes == classes]
        for number, (label, tested) in enumerate(same):
            _bars(axes, list(classes), class_recall(tested.counts).tolist(), number, len(same), label)
        _limit(axes, judged.gates.floors.class_recall, "least allowed")
        axes.set(ylabel="recall", ylim=(0, 1.05))
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)
        return svg(figure)


def _sides(judged: Judged) -> list[tuple[str, Evidence]]:
    sides = [(f"version {judged.challenger.version.version}", judged.challenger)]
    if judged.champion is not None:
        sides.append((f"champion, version {judged.champion.version.version}", judged.champion))
    return sides


def _bars(axes: Axes, names: list[str], values: list[float], number: int, sides: int, label: str) -> None:
    width = 0.7 / sides
    x = np.arange(len(names)) + (number - (sides - 1) / 2) * width
    heights = np.nan_to_num(np.asarray(values))
    axes.bar(x, heights, width * 0.94, color=f"C{number}", alpha=0.85, label=label)
    for place, value, height in zip(x, values, heights, strict=True):
        told = "no steps" if math.isnan(value) else f"{value:.2f}"
        axes.annotate(told, (place, height + 0.01), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(np.arange(len(names)), names)


def _limit(axes: Axes, value: float | None, label: str) -> None:
    if value is not None:
        axes.axhline(value, label=label, **LIMIT)
