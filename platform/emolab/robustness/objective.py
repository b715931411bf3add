"""Robustness as one number, for a search to maximise."""

from __future__ import annotations

from torch import nn

from emolab.robustness.cells import Cell
from emolab.robustness.metrics import area_under_curve
from emolab.robustness.suites import Suite, Sweep, expand
from emolab.robustness.tally import evaluate_sessions
from emolab.scores import macro_f1
from emolab.sessions.loading import SessionStore
from emolab.sessions.manifest import Manifest

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_BATCH = 32


def missing_rate_area(model: nn.Module, store: SessionStore, manifest: Manifest, *, seed: int = 0) -> float:
    """Area under the curve of macro-F1 over the missing rate (P1, rates 0 to 0.9): a mean score, between 0 and 1.

    Args:
        model: in evaluation mode.
        store: the validation split; a search never sees another one.
    """
    cells = missing_rate_cells(list(manifest.dimensions), seed=seed)
    batches = (
        [store.session(i, manifest) for i in range(start, min(start + _BATCH, len(store)))]
        for start in range(0, len(store), _BATCH)
    )
    tally = evaluate_sessions(model, batches, cells)
    return area_under_curve([cell.level for cell in cells], macro_f1(tally.confusion.sum(axis=1)))


def missing_rate_cells(modalities: list[str], *, seed: int) -> list[Cell]:
    """The clean cell and one for each rate, every modality at the same rate."""
    sweep = Sweep(corruption="frame_missing", levels=list(RATES))
    return expand(Suite(name="objective", seeds=[seed], sweeps=[sweep]), modalities)
