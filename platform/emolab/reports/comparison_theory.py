"""The part of a comparison's page on Lemma 1 and Theorem 1: what the paper claims beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from emolab.reports.figures import STYLE, count_in_whole_numbers, svg
from emolab.reports.page import Measured, Section, TableData
from emolab.studies.comparison_results import Comparison
from emolab.studies.comparison_theory import (
    FeedbackRow,
    LipschitzRow,
    feedback_rows,
    lipschitz_rows,
    measured_sessions,
    not_measured,
)

LEMMA, THEOREM = "Lemma 1", "Theorem 1"
"""Names of the tables."""


def theory_tables(comparison: Comparison) -> dict[str, TableData]:
    """The tables by name, those for which something was measured."""
    lipschitz, feedback, reasons = lipschitz_rows(comparison), feedback_rows(comparison), not_measured(comparison)
    tables = {}
    if lipschitz or reasons:
        tables[LEMMA] = _lipschitz(lipschitz, reasons)
    if feedback:
        tables[THEOREM] = _feedback(feedback)
    return tables


def theory_sections(comparison: Comparison) -> list[Section]:
    """Empty where nothing was measured."""
    tables, sections = theory_tables(comparison), []
    split, count = measured_sessions(comparison)
    where = f"Measured on {count} sessions of the {split} split, for every seed. "
    if LEMMA in tables:
        sections.append(Section(title=_LEMMA_TITLE, text=where + _LEMMA_TEXT, table=tables[LEMMA]))
    if THEOREM in tables:
        rows = feedback_rows(comparison)
        text = f"{where}{_THEOREM_TEXT} {_verdict(rows)}"
        sections.append(Section(title=_THEOREM_TITLE, text=text, table=tables[THEOREM], figure=_convergence(rows)))
    return sections


_LEMMA_TITLE = "Lemma 1: how far the probabilities follow one modality"
_LEMMA_TEXT = (
    "The paper claims one Lipschitz constant for all inputs, from a modality's features at a step to the probabilities "
    "of that step, also with another modality missing there, that is set to 0: the product of the constants of the "
    "parts, of which it gives no value. Edu-EmotionNet as shipped has a constant, for a given length of the sessions: "
    "every attention reads the output of a LayerNorm, which is bounded. (Attention by itself has none: Kim, "
    "Papamakarios and Mnih, 2021.) But what can be proven of it is so large that it says nothing. Measured is the "
    "local constant at given sessions: the largest singular value of the Jacobian of all probabilities of a session "
    "with respect to all features of one modality in it, found by power iteration. Missing: a modality absent in the "
    "whole session; a model reads there what it has learned for it, not 0. Median: over sessions, then mean ± standard "
    "deviation over seeds; largest: over sessions and seeds. Units are probability per unit of raw feature. Power "
    "iteration approaches a constant from below: where less than all have converged, the true ones may be larger."
)

_THEOREM_TITLE = "Theorem 1: whether the feedback has one fixed point"
_THEOREM_TEXT = (
    "The paper assumes that the predictions converge and concludes that their limit is unique. Both would follow if "
    "the map from one prediction to the next contracted, at constant input, every difference of predictions by a "
    "factor below one. Factor: the largest at an input, over sampled beliefs, and of these the median over inputs and "
    "seeds and the largest. Bound: holds for every input and belief, so below one it proves the theorem's conclusion "
    "for the weights of that seed; given is the largest over seeds, and for how many seeds it lies below one. "
    "Contracting, one limit: shares of the inputs at which no sampled factor reached one, and at which every start "
    "ended on the same point. Steps: until the change of the slowest start stays below 1e-6, the median over inputs "
    "and the most; rate: typical ratio of successive changes. Models that are not listed feed nothing back."
)


def _verdict(rows: Sequence[FeedbackRow]) -> str:
    proven = [row.model for row in rows if row.proven == row.seeds]
    seen = [f"{row.model}{_partly(row)}" for row in rows if row.proven < row.seeds and row.unique == 1.0]
    against = [row.model for row in rows if row.unique < 1.0]
    parts = [("proven by the bound for", proven), ("seen at every input for", seen), ("contradicted for", against)]
    return "A unique limit is " + "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) + "."


def _partly(row: FeedbackRow) -> str:
    return f" (proven for {row.proven} of {row.seeds} seeds)" if row.proven else ""


def _lipschitz(rows: Sequence[LipschitzRow], reasons: dict[str, str]) -> TableData:
    shown = [
        [row.model, row.modality, row.missing or "none", _measured(row), row.largest, f"{row.converged:.0%}", _CLAIM]
        for row in rows
    ]
    shown += [[model, None, None, None, None, None, f"not measured: {reason}"] for model, reason in reasons.items()]
    return TableData(columns=["model", "modality", "missing", "median", "largest", "converged", "paper"], rows=shown)


_CLAIM = "one constant, no value"


def _measured(row: LipschitzRow) -> Measured:
    return Measured(row.typical.mean, row.typical.deviation)


def _feedback(rows: Sequence[FeedbackRow]) -> TableData:
    columns = [
        "model", "seeds", "inputs", "factor", "largest factor", "bound", "bound below 1", "contracting", "one limit",
        "steps", "most steps", "rate", "paper",
    ]  # fmt: skip
    shown = [
        [
            row.model,
            row.seeds,
            row.inputs,
            row.factor,
            row.largest_factor,
            row.upper_bound,
            f"{row.proven}/{row.seeds}",
            f"{row.contracting:.0%}",
            f"{row.unique:.0%}",
            row.steps,
            row.most_steps,
            row.rate,
            "unique limit",
        ]
        for row in rows
    ]
    return TableData(columns=columns, rows=shown)


def _convergence(rows: Sequence[FeedbackRow]) -> bytes:
    """Largest change of the belief from step to step at constant input."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, row in enumerate(rows):
            changes = np.array(row.changes)
            steps = 1 + np.flatnonzero(changes > 1e-12)  # below it is rounding
            axes.plot(steps, changes[steps - 1], color=f"C{number}", label=row.model, marker="o", markersize=2.5)
        axes.set(xlabel="step at constant input", ylabel="largest change of the prediction", yscale="log")
        count_in_whole_numbers(axes.xaxis)
        axes.legend(frameon=False)
        return svg(figure)
