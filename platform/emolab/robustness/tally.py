"""Counts per cell and session: small, exact, and enough for every metric and for statistics clustered by session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edu_emotionnet.batch import SessionBatch
from emolab.robustness.assembly import build_variants, clean_batch
from emolab.robustness.cells import Cell, distinct_variants
from emolab.robustness.corruptions.observed import Surroundings
from emolab.robustness.engine import CellPredictions, Engine, evaluate_cells
from emolab.robustness.metrics import CALIBRATION_BINS
from emolab.sessions.schema import Session


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Results of C cells on N sessions over their labelled steps."""

    cells: tuple[Cell, ...]
    session_ids: tuple[str, ...]
    speaker_ids: tuple[str, ...]
    confusion: NDArray[np.int64]
    """(C, N, K, K), true class by predicted class."""
    calibration: NDArray[np.float64]
    """(C, N, bins, 3): steps, right predictions and summed top probability, by bin of the top probability."""
    squared_error: NDArray[np.float64]
    """(C, N) summed multi-class Brier score."""
    weight: NDArray[np.float64] | None
    """(C, N, M) summed weight of each modality; None for a model without confidence."""
    engine: Engine


def count_predictions(
    predictions: CellPredictions, batch: SessionBatch, cells: Sequence[Cell], sessions: Sequence[Session]
) -> Tally:
    """The tally of one batch."""
    log_p, labels, counted = predictions.log_probabilities, batch.labels, batch.labelled
    cell_count, session_count, _, classes = log_p.shape
    probabilities = log_p.exp()
    top, predicted = probabilities.max(dim=-1)
    right = predicted == labels
    place = torch.arange(cell_count * session_count, device=labels.device).view(cell_count, session_count, 1)
    confusion = _histogram((place * classes + labels) * classes + predicted, counted, place.numel() * classes**2)
    # Bins are open on the left and closed on the right, as usual for the expected calibration error.
    level = (top.double() * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    index, size = place * CALIBRATION_BINS + level, place.numel() * CALIBRATION_BINS
    sums = [_histogram(index, counted, size, value) for value in (torch.ones_like(top), right, top)]
    target = torch.nn.functional.one_hot(labels.clamp_min(0), classes)
    error = (probabilities - target).double().square().sum(-1)
    shape = (cell_count, session_count)
    confidence = predictions.confidence
    return Tally(
        cells=tuple(cells),
        session_ids=tuple(session.session_id for session in sessions),
        speaker_ids=tuple(session.speaker_id for session in sessions),
        confusion=confusion.view(*shape, classes, classes).round().long().cpu().numpy(),
        calibration=torch.stack(sums, dim=-1).view(*shape, CALIBRATION_BINS, 3).cpu().numpy(),
        squared_error=error.masked_fill(~counted, 0.0).sum(-1).cpu().numpy(),
        weight=None if confidence is None else _summed(confidence, counted),
        engine=predictions.engine,
    )


def _histogram(index: Tensor, counted: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """(size,) float64 sums over the counted steps of (C, B, T) indices."""
    chosen = counted.expand_as(index)
    values = None if weights is None else weights[chosen].double()
    return torch.bincount(index[chosen], weights=values, minlength=size).double()


def _summed(confidence: Tensor, counted: Tensor) -> NDArray[np.float64]:
    return confidence.double().masked_fill(~counted[..., None], 0.0).sum(dim=2).cpu().numpy()


def evaluate_sessions(
    model: nn.Module,
    batches: Iterable[Sequence[Session]],
    cells: Sequence[Cell],
    *,
    surroundings: Surroundings | None = None,
    device: torch.device | str = "cpu",
    engine: Engine | None = None,
) -> Tally:
    """Evaluate every session under every cell; each distinct variant of a batch is built and encoded once.

    Args:
        model: on ``device``, in evaluation mode.
        batches: sessions in groups, best of similar length; grouping does not change the result.
        cells: from ``suites.expand``.
        surroundings: training statistics and donors, where a corruption needs them.
        device: where the model is.
        engine: forces one; see ``evaluate_cells``.

    Raises:
        ValueError: there are no sessions, or as ``evaluate_cells`` does.
        UserError: as ``corrupt`` does.
    """
    variants = distinct_variants(cells)
    parts = []
    for sessions in batches:
        batch = clean_batch(sessions).to(device)
        inputs = build_variants(sessions, batch, variants, surroundings)
        parts.append(
            count_predictions(evaluate_cells(model, batch, cells, inputs, engine=engine), batch, cells, sessions)
        )
    if not parts:
        raise ValueError("there are no sessions to evaluate")
    return joined(parts)


def joined(parts: Sequence[Tally]) -> Tally:
    """Tallies of the same cells on different sessions, as one; for shards that were evaluated apart.

    Raises:
        ValueError: the parts have different cells.
    """
    if any(part.cells != parts[0].cells for part in parts):
        raise ValueError("tallies of different cells cannot be joined")
    weights = [part.weight for part in parts if part.weight is not None]
    return Tally(
        cells=parts[0].cells,
        session_ids=tuple(name for part in parts for name in part.session_ids),
        speaker_ids=tuple(name for part in parts for name in part.speaker_ids),
        confusion=np.concatenate([part.confusion for part in parts], axis=1),
        calibration=np.concatenate([part.calibration for part in parts], axis=1),
        squared_error=np.concatenate([part.squared_error for part in parts], axis=1),
        weight=np.concatenate(weights, axis=1) if len(weights) == len(parts) else None,
        engine=parts[0].engine,
    )
