"""What tracked robustness sweeps say of one version: found by data set, run and weights, never by name alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emolab import sealed
from emolab.names import UserError
from emolab.registry.verdict import Missing
from emolab.robustness.cells import cell_id
from emolab.robustness.corruptions.observed import CLEAN
from emolab.robustness.engine import INEXACT
from emolab.robustness.metrics import area_under_curve
from emolab.studies import test_split
from emolab.studies.robustness_results import CELLS_FILE, MODELS_FILE
from emolab.tracking.runs import MLflowTracker


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One model's part of a tracked sweep of the test split."""

    run_id: str
    tags: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    """Of the table of cells: one per cell, with its scores."""

    @property
    def clean(self) -> Mapping[str, Any]:
        """The row of the clean cell, which every sweep has."""
        return next(row for row in self.rows if row["cell"] == CLEAN)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Macro-F1 against the missing rate, every modality at the same rate."""

    run_id: str
    rates: tuple[float, ...]
    scores: tuple[float, ...]
    """Mean over the corruption seeds."""
    calibration: tuple[float, ...]
    """Expected calibration error at each rate."""
    cells: tuple[str, ...]
    """The conditions; only curves over equal ones are compared."""

    @property
    def area(self) -> float:
        return area_under_curve(self.rates, self.scores)


@dataclass(frozen=True, kw_only=True)
class SingleLosses:
    """Macro-F1 with one modality absent throughout."""

    run_id: str
    clean: float
    without: Mapping[str, float]
    """Absent modality -> what is left."""

    @property
    def worst(self) -> tuple[str, float]:
        """The modality that is missed most, and what its absence costs."""
        name = min(self.without, key=lambda key: self.without[key])
        return name, self.clean - self.without[name]


def sweeps_of(tracker: MLflowTracker, *, run_id: str, weights: str, dataset: str) -> list[Sweep]:
    """Finished, exact sweeps of these weights on the test split of this data set, in any experiment, newest first."""
    found = (_sweep(tracker, sweep, run_id, weights) for sweep in tracker.find_anywhere("emolab.dataset", dataset))
    return [sweep for sweep in found if sweep is not None]


def _sweep(tracker: MLflowTracker, sweep: str, run_id: str, weights: str) -> Sweep | None:
    tags = tracker.read(sweep).tags
    mine = tags.get("emolab.kind") == "robustness" and test_split.OPENED in tags
    if not mine or tracker.client.get_run(sweep).info.status != "FINISHED":
        return None
    try:
        evaluated = json.loads(tracker.artifact(sweep, MODELS_FILE))
        table = sealed.from_parquet(tracker.artifact(sweep, CELLS_FILE))
    except (UserError, ValueError, OSError):
        return None  # an unreadable sweep is no evidence
    rows = [row for row in table.to_pylist() if row["run_id"] == run_id]
    if evaluated.get(run_id) != weights or not any(row["cell"] == CLEAN for row in rows):
        return None
    if any(row["engine"] == INEXACT for row in rows):
        return None
    return Sweep(run_id=sweep, tags=tags, rows=rows)


def no_sweep(uri: str, *, covering: str = "") -> str:
    """That a version lacks a sweep, and which job makes one."""
    return (
        f"no tracked, exact sweep of these weights on this test split{covering}: jobs/robustness.py makes one of {uri} "
        "with --suite promotion"
    )


def curves_of(sweeps: Sequence[Sweep], modalities: Sequence[str], rates: Sequence[float]) -> list[Curve]:
    """The missing-rate curves of all sweeps that cover all the rates, newest first."""
    found = []
    for sweep in sweeps:
        points = [_points(sweep, "frame_missing", modalities, rate) if rate else [sweep.clean] for rate in rates]
        if all(points):
            curve = Curve(
                run_id=sweep.run_id,
                rates=tuple(rates),
                scores=tuple(_mean(rows, "macro_f1") for rows in points),
                calibration=tuple(_mean(rows, "calibration_error") for rows in points),
                cells=tuple(sorted(row["cell"] for rows in points for row in rows)),
            )
            found.append(curve)
    return found


def single_losses_of(sweeps: Sequence[Sweep], modalities: Sequence[str], uri: str) -> SingleLosses | Missing:
    """What each modality's absence leaves, from the newest sweep that tried every one."""
    for sweep in sweeps:
        left = {name: _points(sweep, "absent", [name], 1.0) for name in modalities}
        if all(left.values()):
            return SingleLosses(
                run_id=sweep.run_id,
                clean=sweep.clean["macro_f1"],
                without={name: _mean(rows, "macro_f1") for name, rows in left.items()},
            )
    return Missing(reason=no_sweep(uri, covering=" takes every modality away in turn"))


def _points(sweep: Sweep, corruption: str, modalities: Sequence[str], level: float) -> list[Mapping[str, Any]]:
    """The cells of one point of a curve, one per corruption seed; cells of joint grids have other ids."""
    return [row for row in _rows(sweep, corruption, modalities) if abs(row["level"] - level) < 1e-9]


def _rows(sweep: Sweep, corruption: str, modalities: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for row in sweep.rows:
        of_curve = row["corruption"] == corruption and row["modalities"] == "-".join(modalities)
        if of_curve and row["cell"] == cell_id(corruption, row["level"], modalities, row["seed"]):
            yield row


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
