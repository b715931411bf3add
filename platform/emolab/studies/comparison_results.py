"""A comparison read back from the tracker: all that its report is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emolab.limits import load_yaml
from emolab.names import UserError
from emolab.sessions.manifest import FILE_NAME as DATA_SET
from emolab.sessions.manifest import Manifest, parse_manifest
from emolab.studies import test_split, theory
from emolab.studies.session_results import SessionResults, from_parquet
from emolab.studies.theory import TheoryRecord
from emolab.tracking.beginning import CONFIGURATION
from emolab.tracking.runs import MLflowTracker

RECORD = "comparison.json"
"""Artifact of the comparison's run: reference, and run id or failure of every cell."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One model with one seed, after its test or its failure."""

    model: str
    seed: int
    run_id: str
    failure: str = ""
    sessions: SessionResults | None = None
    """None for a cell that failed."""
    theory: TheoryRecord | None = None
    """None where Lemma 1 and Theorem 1 were not measured."""
    history: tuple[Mapping[str, Any], ...] = ()
    """Reports of the epochs."""
    configuration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All settings it was trained with, defaults included; empty for a cell that failed."""
    metrics: Mapping[str, float]
    ended: float | None
    """When its training ended, seconds since 1970."""
    first_opened: str
    """When the test split was opened for it for the first time, UTC; empty for a cell that failed."""
    opened: str
    """When it was last opened for it."""
    openings: int
    """How often it was opened for it; more than once only after an interruption."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models x seeds on one test split."""

    run_id: str
    name: str
    tags: Mapping[str, str]
    settings: Mapping[str, Any]
    manifest: Manifest
    reference: str
    openings: Mapping[str, int]
    """How often the tracker had seen this test split opened when the comparison was concluded, for `models` of any
    comparison and for `sweeps` of corruptions."""
    cells: tuple[CellResult, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.seed for cell in self.cells))

    @property
    def sessions(self) -> SessionResults:
        """Any cell's results, for what they share: the sessions and their speakers."""
        return next(cell.sessions for cell in self.cells if cell.sessions is not None)

    def tested(self, model: str) -> dict[int, CellResult]:
        """Seed -> cell of a model, those that have a result, by seed."""
        cells = [cell for cell in self.cells if cell.model == model and cell.sessions is not None]
        return {cell.seed: cell for cell in sorted(cells, key=lambda cell: cell.seed)}

    def confusion(self, model: str) -> NDArray[np.int64]:
        """(seeds, sessions, K, K) counts of a model that has results, in the order of ``tested``."""
        return np.stack([cell.sessions.confusion for cell in self.tested(model).values() if cell.sessions is not None])


def read_comparison(tracker: MLflowTracker, run_id: str) -> Comparison:
    """The comparison that a run holds.

    Raises:
        UserError: the run is no finished comparison, or its cells do not belong together.
    """
    run = tracker.read(run_id)
    if run.tags.get("emolab.kind") != "comparison":
        raise UserError(f"run {run_id} is no comparison but a {run.tags.get('emolab.kind', 'run of another program')}")
    record = json.loads(tracker.artifact(run_id, RECORD))
    comparison = Comparison(
        run_id=run_id,
        name=run.name,
        tags=run.tags,
        settings=load_yaml(tracker.artifact(run_id, CONFIGURATION).decode()),
        manifest=parse_manifest(
            tracker.artifact(run_id, DATA_SET), where=f"run {run_id}: {DATA_SET}", remedy="run the comparison again"
        ),
        reference=record["reference"],
        openings=record["openings"],
        cells=tuple(_read_cell(tracker, cell) for cell in record["cells"]),
    )
    _check(comparison)
    return comparison


def _read_cell(tracker: MLflowTracker, cell: Mapping[str, Any]) -> CellResult:
    known = {key: cell[key] for key in ("model", "seed", "run_id", "failure")}
    if cell["failure"]:
        return CellResult(**known, metrics={}, ended=None, first_opened="", opened="", openings=0)
    run = tracker.read(cell["run_id"])
    measured = tracker.artifact(run.run_id, theory.FILE_NAME) if theory.MEASURED in run.tags else None
    return CellResult(
        **known,
        theory=None if measured is None else TheoryRecord.model_validate_json(measured),
        sessions=from_parquet(tracker.artifact(run.run_id, test_split.FILE_NAME)),
        history=tuple(json.loads(tracker.artifact(run.run_id, "history.json"))),
        configuration=load_yaml(tracker.artifact(run.run_id, CONFIGURATION).decode()),
        metrics=run.metrics,
        ended=run.ended,
        first_opened=test_split.first_opening(run.tags),
        opened=run.tags[test_split.OPENED],
        openings=int(run.tags[test_split.OPENINGS]),
    )


def _check(comparison: Comparison) -> None:
    tested = [cell for cell in comparison.cells if cell.sessions is not None]
    if not tested:
        raise UserError(f"no cell of the comparison {comparison.run_id} has a result")
    for cell in tested:
        assert cell.sessions is not None
        if cell.sessions.session_ids != comparison.sessions.session_ids:
            raise UserError(f"run {cell.run_id} was tested on other sessions than run {tested[0].run_id}")
        if cell.sessions.classes != tuple(comparison.manifest.classes):
            raise UserError(f"run {cell.run_id} has other classes than the data set of the comparison")
