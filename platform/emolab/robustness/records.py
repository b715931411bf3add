"""Tallies as Parquet: what a unit of a sweep leaves on disk, and what reports are computed from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from emolab import sealed
from emolab.names import UserError
from emolab.robustness.cells import Cell
from emolab.robustness.engine import ENGINES
from emolab.robustness.metrics import CALIBRATION_BINS
from emolab.robustness.tally import Tally
from emolab.sessions.manifest import canonical_json, write_atomically

_ENGINE = b"emolab.engine"


def write_tally(path: Path, tally: Tally) -> None:
    """One row per cell and session; written whole or not at all."""
    cells, sessions = len(tally.cells), len(tally.session_ids)
    rows = cells * sessions
    columns: dict[str, pa.Array] = {
        "cell": pa.array([cell.id for cell in tally.cells for _ in range(sessions)]).dictionary_encode(),
        "session_id": pa.array(list(tally.session_ids) * cells).dictionary_encode(),
        "speaker_id": pa.array(list(tally.speaker_ids) * cells).dictionary_encode(),
        "confusion": _rows(tally.confusion.reshape(rows, -1), pa.int32()),
        "calibration": _rows(tally.calibration.reshape(rows, -1), pa.float64()),
        "squared_error": pa.array(tally.squared_error.reshape(-1)),
    }
    if tally.weight is not None:
        columns["weight"] = _rows(tally.weight.reshape(rows, -1), pa.float64())
    write_atomically(path, sealed.to_parquet(pa.table(columns), {_ENGINE: tally.engine.encode()}))


def read_tally(path: Path, cells: Sequence[Cell], *, sessions: int) -> Tally:
    """What ``write_tally`` wrote for these cells and this number of sessions.

    Raises:
        UserError: the file is missing, damaged, or was written for other cells or sessions.
    """
    try:
        table = sealed.from_parquet(path.read_bytes())
        engine = (table.schema.metadata or {})[_ENGINE].decode()
        if table.column("cell").to_pylist() != [cell.id for cell in cells for _ in range(sessions)]:
            raise ValueError("other cells or sessions")
        return Tally(
            cells=tuple(cells),
            session_ids=tuple(table.column("session_id").to_pylist()[:sessions]),
            speaker_ids=tuple(table.column("speaker_id").to_pylist()[:sessions]),
            confusion=_square(_matrix(table, "confusion").astype(np.int64), len(cells), sessions),
            calibration=_matrix(table, "calibration").reshape(len(cells), sessions, CALIBRATION_BINS, 3),
            squared_error=table.column("squared_error").to_numpy().reshape(len(cells), sessions),
            weight=_matrix(table, "weight").reshape(len(cells), sessions, -1)
            if "weight" in table.column_names
            else None,
            engine=ENGINES[ENGINES.index(engine)],
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no result of this sweep ({' '.join(str(error).split())[:120]})") from None


def write_agreement(path: Path, agreement: Mapping[str, float]) -> None:
    """A correlation per modality as JSON; undefined ones are null."""
    values = {name: None if math.isnan(value) else value for name, value in agreement.items()}
    write_atomically(path, canonical_json(values).encode())


def read_agreement(path: Path) -> dict[str, float]:
    """What ``write_agreement`` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        values = json.loads(path.read_bytes())
        return {str(name): math.nan if value is None else float(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no result of this sweep ({error})") from None


def _rows(values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1), kind))


def _matrix(table: pa.Table, name: str) -> NDArray[np.float64]:
    flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(table.num_rows, -1)


def _square(counts: NDArray[np.int64], cells: int, sessions: int) -> NDArray[np.int64]:
    classes = round(counts.shape[1] ** 0.5)
    return counts.reshape(cells, sessions, classes, classes)
