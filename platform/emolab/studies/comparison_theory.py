"""Lemma 1 and Theorem 1 in a comparison: what was measured of each model, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emolab.studies.comparison_results import Comparison
from emolab.studies.statistics import MeanAndDeviation, mean_and_deviation
from emolab.studies.theory import FeedbackMeasured, LipschitzCase, TheoryRecord


@dataclass(frozen=True, kw_only=True)
class LipschitzRow:
    """Local Lipschitz constants of a model with respect to one modality (Lemma 1)."""

    model: str
    modality: str
    missing: str | None
    """The modality taken away; None where none was."""
    typical: MeanAndDeviation
    """Median over sessions, over seeds."""
    largest: float
    """Over sessions and seeds."""
    converged: float
    """Share of the power iterations; where below one, constants may be larger than shown."""


@dataclass(frozen=True, kw_only=True)
class FeedbackRow:
    """The feedback map of a model, over its seeds (Theorem 1)."""

    model: str
    seeds: int
    inputs: int
    factor: float
    """Median over inputs and seeds of an input's largest local contraction factor."""
    largest_factor: float
    upper_bound: float
    """Largest over seeds."""
    proven: int
    """Seeds whose bound lies below one: Banach's theorem gives their weights one limit for every input."""
    contracting: float
    """Share of inputs at which no sampled belief has a factor of one or more."""
    unique: float
    """Share of inputs at which every start ends on one point."""
    steps: float | None
    """Median over inputs of the number of steps until the slowest start has settled; None where most never do."""
    most_steps: int | None
    """The largest of these numbers; None where a start never settles."""
    rate: float | None
    """Median ratio of successive changes."""
    changes: tuple[float, ...]
    """Largest change of the belief by step, over inputs, starts and seeds."""


def lipschitz_rows(comparison: Comparison) -> list[LipschitzRow]:
    """A row per model, modality and missing modality, in the order of the comparison."""
    rows = []
    for model in comparison.models:
        by_case: dict[tuple[str, str | None], list[LipschitzCase]] = {}
        for record in _records(comparison, model):
            for case in record.lipschitz:
                by_case.setdefault((case.modality, case.missing), []).append(case)
        rows += [_lipschitz_row(model, cases) for cases in by_case.values()]
    return rows


def _lipschitz_row(model: str, cases: Sequence[LipschitzCase]) -> LipschitzRow:
    return LipschitzRow(
        model=model,
        modality=cases[0].modality,
        missing=cases[0].missing,
        typical=mean_and_deviation([float(np.median(case.constants)) for case in cases]),
        largest=max(max(case.constants) for case in cases),
        converged=sum(case.converged for case in cases) / sum(len(case.constants) for case in cases),
    )


def feedback_rows(comparison: Comparison) -> list[FeedbackRow]:
    """A row per model that feeds its prediction back."""
    rows = []
    for model in comparison.models:
        measured = [record.feedback for record in _records(comparison, model) if record.feedback is not None]
        if measured:
            rows.append(_feedback_row(model, measured))
    return rows


def _feedback_row(model: str, measured: Sequence[FeedbackMeasured]) -> FeedbackRow:
    factors = np.concatenate([one.factors for one in measured])
    taken = np.concatenate([one.steps for one in measured])
    steps = np.where(taken < 0, np.inf, taken)
    middle = float(np.median(steps))
    rates = [rate for one in measured for rate in one.rates if rate is not None]
    return FeedbackRow(
        model=model,
        seeds=len(measured),
        inputs=len(factors),
        factor=float(np.median(factors)),
        largest_factor=float(factors.max()),
        upper_bound=max(one.upper_bound for one in measured),
        proven=sum(one.upper_bound < 1.0 for one in measured),
        contracting=float((factors < 1.0).mean()),
        unique=sum(one.unique for one in measured) / len(factors),
        steps=middle if np.isfinite(middle) else None,
        most_steps=int(taken.max()) if np.isfinite(steps).all() else None,
        rate=float(np.median(rates)) if rates else None,
        changes=tuple(np.max([one.changes for one in measured], axis=0).tolist()),
    )


def not_measured(comparison: Comparison) -> dict[str, str]:
    """Model -> why it has no Lipschitz constants."""
    reasons: dict[str, str] = {}
    for cell in comparison.cells:
        if cell.theory is not None and cell.theory.not_measured:
            reasons.setdefault(cell.model, cell.theory.not_measured)
    return reasons


def measured_sessions(comparison: Comparison) -> tuple[str, int]:
    """(split, sessions) of the measurements; ("", 0) where nothing was measured."""
    records = [cell.theory for cell in comparison.cells if cell.theory is not None]
    return (records[0].split, len(records[0].session_ids)) if records else ("", 0)


def _records(comparison: Comparison, model: str) -> list[TheoryRecord]:
    return [cell.theory for cell in comparison.cells if cell.model == model and cell.theory is not None]
