"""The figures of a data set's page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from emolab.corpora.corpus import SPLITS
from emolab.reports.figures import STYLE, count_in_whole_numbers, svg
from emolab.sessions.facts import SessionFacts
from emolab.sessions.inventory import Entry
from emolab.sessions.manifest import Manifest

_COLOURS = {"train": "C0", "validation": "C1", "test": "C2"}


def class_shares(manifest: Manifest) -> bytes:
    """Share of each class among the labelled steps, one bar per split."""
    places = np.arange(len(manifest.classes))
    width = 0.8 / len(manifest.splits)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.0), layout="constrained")
        axes = figure.subplots()
        for i, (name, split) in enumerate(manifest.splits.items()):
            shares = np.array(split.label_counts) / max(1, sum(split.label_counts))
            at = places + (i - (len(manifest.splits) - 1) / 2) * width
            bars = axes.bar(at, shares, width * 0.95, color=_COLOURS[name], alpha=0.85, label=name)
            axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8, padding=2)
        axes.set_xticks(places, manifest.classes)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(ylabel="labelled steps")
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(manifest.splits))
        return svg(figure)


def lengths_and_speakers(kept: Sequence[Entry]) -> bytes:
    """Histogram of the lengths, and sessions per speaker, both by split."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        members = {
            name: [entry.facts.steps for entry in kept if entry.split == name and entry.facts] for name in SPLITS
        }
        shown = [name for name in SPLITS if members[name]]
        left.hist([members[n] for n in shown], bins=24, stacked=True, color=[_COLOURS[n] for n in shown], label=shown)
        left.set(xlabel="steps of a session", ylabel="sessions")
        count_in_whole_numbers(left.xaxis)
        count_in_whole_numbers(left.yaxis)
        left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(shown))
        counts = Counter((entry.speaker_id, entry.split) for entry in kept)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0][0]))
        colours = [_COLOURS[split or "train"] for (_, split), _ in ranked]
        right.bar(np.arange(len(ranked)), [count for _, count in ranked], width=0.9, color=colours)
        right.set(xlabel=f"the {len(ranked)} speakers", ylabel="sessions", xticks=[])
        count_in_whole_numbers(right.yaxis)
        right.grid(visible=False, axis="x")
        return svg(figure)


def observed_shares(manifest: Manifest, kept: Sequence[Entry]) -> bytes:
    """For each modality, how many sessions have how much of it."""
    known = _known(kept)
    edges = np.linspace(0.0, 1.0, 21)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.4), layout="constrained")
        panels = figure.subplots(1, len(manifest.dimensions), sharey=True, squeeze=False)[0]
        for i, (axes, name) in enumerate(zip(panels, manifest.dimensions, strict=True)):
            axes.hist(
                [facts.present[name] / facts.steps for facts in known], bins=list(edges), color=f"C{i}", alpha=0.85
            )
            axes.set_title(name, fontsize=9)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            count_in_whole_numbers(axes.yaxis)
        panels[0].set_ylabel("sessions")
        figure.supxlabel("steps at which the modality was observed", fontsize=10)
        return svg(figure)


def gap_curves(manifest: Manifest, entries: Sequence[Entry]) -> bytes:
    """Share of all sessions that could be read whose longest gap exceeds so many seconds, per modality."""
    known = _known(entries)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 2.8), layout="constrained")
        axes = figure.subplots()
        longest = max(
            (facts.longest_gap[name] * facts.step_seconds for facts in known for name in facts.present), default=0
        )
        at = np.linspace(0.0, max(longest, 1.0), 400)
        for i, name in enumerate(manifest.dimensions):
            _share_above(axes, at, [facts.longest_gap[name] * facts.step_seconds for facts in known], name, f"C{i}")
        worst = [max(facts.longest_gap.values()) * facts.step_seconds for facts in known]
        _share_above(axes, at, worst, "any", "#666666")
        limit = manifest.protocol.get("max_gap_seconds")
        if limit is not None:
            axes.axvline(limit, color="#666666", linewidth=1, linestyle=":")
            axes.annotate("limit", (limit, 1.0), xytext=(4, -8), textcoords="offset points", fontsize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(xlabel="seconds", ylabel="sessions with a longer gap", ylim=(0, 1.02), xlim=(0, at[-1]))
        axes.legend(frameon=False)
        return svg(figure)


def _share_above(axes: Axes, at: np.ndarray, gaps: Sequence[float], label: str, colour: str) -> None:
    ordered = np.sort(gaps)
    shares = 1 - np.searchsorted(ordered, at, side="right") / max(1, len(ordered))
    axes.plot(at, shares, color=colour, label=label, linewidth=1.4, drawstyle="steps-post")


def _known(entries: Sequence[Entry]) -> list[SessionFacts]:
    return [entry.facts for entry in entries if entry.facts is not None]
