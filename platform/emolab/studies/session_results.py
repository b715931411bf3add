"""What is kept of a model on one split: counts per session, from which every score and interval can be computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from emolab import sealed
from emolab.names import UserError

CONFIDENCE_STEPS = 30
"""Steps from the beginning of a session whose modality weights are kept (Fig. 3)."""

_METADATA = b"emolab.session_results"


@dataclass(frozen=True, kw_only=True)
class SessionResults:
    """N sessions, K classes, M modalities."""

    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    session_ids: tuple[str, ...]
    speaker_ids: tuple[str, ...]
    steps: NDArray[np.int64]
    """(N,) length of each session."""
    confusion: NDArray[np.int64]
    """(N, K, K) labelled steps, rows true, columns predicted."""
    confidence: NDArray[np.float32] | None
    """(N, CONFIDENCE_STEPS, M) weight of each modality, 0 after a session's end; None for a model without weights."""

    @property
    def observed(self) -> NDArray[np.bool_]:
        """(N, CONFIDENCE_STEPS) whether the session has the step."""
        return np.arange(CONFIDENCE_STEPS) < self.steps[:, None]


def to_parquet(results: SessionResults) -> bytes:
    """One row per session; confusion counts row by row, weights step by step."""
    columns: dict[str, pa.Array] = {
        "session_id": pa.array(results.session_ids, pa.string()),
        "speaker_id": pa.array(results.speaker_ids, pa.string()),
        "steps": pa.array(results.steps, pa.int64()),
        "confusion": pa.array(list(results.confusion.reshape(len(results.steps), -1)), pa.list_(pa.int64())),
    }
    if results.confidence is not None:
        kept = [weights[seen].ravel() for weights, seen in zip(results.confidence, results.observed, strict=True)]
        columns["confidence"] = pa.array(kept, pa.list_(pa.float32()))
    described = json.dumps({"classes": results.classes, "modalities": results.modalities})
    return sealed.to_parquet(pa.table(columns), {_METADATA: described.encode()})


def from_parquet(content: bytes) -> SessionResults:
    """What ``to_parquet`` wrote.

    Raises:
        UserError: the content is damaged or something else.
    """
    try:
        table = sealed.from_parquet(content)
        described = json.loads((table.schema.metadata or {})[_METADATA])
        classes, modalities = tuple(described["classes"]), tuple(described["modalities"])
        steps = table.column("steps").to_numpy()
        confusion = np.array(table.column("confusion").to_pylist(), dtype=np.int64)
        weights = table.column("confidence").to_pylist() if "confidence" in table.column_names else None
        return SessionResults(
            classes=classes,
            modalities=modalities,
            session_ids=tuple(table.column("session_id").to_pylist()),
            speaker_ids=tuple(table.column("speaker_id").to_pylist()),
            steps=steps,
            confusion=confusion.reshape(len(steps), len(classes), len(classes)),
            confidence=None if weights is None else padded(weights, len(modalities)),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"these are no session results: {' '.join(str(error).split())[:200]}") from None


def padded(weights: Sequence[Sequence[float]], modalities: int) -> NDArray[np.float32]:
    """Flat weights of each session, step by step -> (N, CONFIDENCE_STEPS, M); what exceeds the length is cut."""
    result = np.zeros((len(weights), CONFIDENCE_STEPS, modalities), dtype=np.float32)
    for row, flat in enumerate(weights):
        values = np.asarray(flat, dtype=np.float32).reshape(-1, modalities)[:CONFIDENCE_STEPS]
        result[row, : len(values)] = values
    return result
