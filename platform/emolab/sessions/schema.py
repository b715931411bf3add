"""One learning session in memory and as a row of a Parquet shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from edu_emotionnet.conventions import IGNORED_LABEL, MODALITIES
from emolab.names import UserError, checked_name

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Session:
    """A learner's session on a grid of T steps.

    Every modality that the corpus has is a key of ``features`` in every session; a session that lacks one
    altogether carries zeros there and an all-false presence mask.
    """

    session_id: str
    speaker_id: str
    corpus: str
    step_seconds: float
    features: Mapping[str, NDArray[np.float32]]
    """Modality -> (T, D_m); finite wherever present."""
    present: Mapping[str, NDArray[np.bool_]]
    """Modality -> (T,)."""
    labels: NDArray[np.int64]
    """(T,) class indices, -100 where unlabelled."""
    quality: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Modality -> (T,) true quality in [0, 1], where the corpus knows it (the simulator does)."""

    @property
    def num_steps(self) -> int:
        return len(self.labels)

    def check(self, *, classes: int) -> None:
        """Refuse a session that a model could not be trained on.

        Raises:
            UserError: naming the session and what is wrong with it.
        """
        checked_name(self.session_id, what="session id")
        checked_name(self.speaker_id, what="speaker id")
        where = f"session {self.session_id!r}"
        if self.num_steps == 0:
            raise UserError(f"{where} has no steps")
        if not self.features or not set(self.features) <= set(MODALITIES):
            raise UserError(f"{where}: modalities must be among {', '.join(MODALITIES)}, got {sorted(self.features)}")
        if set(self.present) != set(self.features):
            raise UserError(f"{where}: presence masks for {sorted(self.present)}, features for {sorted(self.features)}")
        for name, values in self.features.items():
            if values.ndim != 2 or len(values) != self.num_steps or len(self.present[name]) != self.num_steps:
                raise UserError(
                    f"{where}: {name} has shape {values.shape} and mask {self.present[name].shape}, "
                    f"expected {self.num_steps} steps"
                )
            finite = np.isfinite(values).all(axis=1) | ~self.present[name]
            if not finite.all():
                raise UserError(f"{where}: {name} features are not finite at step {int(np.argmin(finite))}")
        wrong = (self.labels != IGNORED_LABEL) & ((self.labels < 0) | (self.labels >= classes))
        if wrong.any():
            step = int(np.argmax(wrong))
            raise UserError(
                f"{where}: label {int(self.labels[step])} at step {step}, expected 0..{classes - 1} or -100"
            )


def arrow_schema(dimensions: Mapping[str, int], *, quality: bool) -> pa.Schema:
    """Columns of a shard. Feature matrices are flattened row by row; their widths stand in the metadata."""
    columns: list[pa.Field] = [
        pa.field("session_id", pa.string()),
        pa.field("speaker_id", pa.string()),
        pa.field("corpus", pa.string()),
        pa.field("num_steps", pa.int32()),
        pa.field("step_seconds", pa.float32()),
    ]
    for name in dimensions:
        columns += [
            pa.field(f"features.{name}", pa.list_(pa.float32())),
            pa.field(f"present.{name}", pa.list_(pa.bool_())),
        ]
        if quality:
            columns.append(pa.field(f"quality.{name}", pa.list_(pa.float32())))
    columns.append(pa.field("labels", pa.list_(pa.int64())))
    metadata = {"emolab.schema_version": str(SCHEMA_VERSION)}
    metadata |= {f"emolab.dimension.{name}": str(size) for name, size in dimensions.items()}
    return pa.schema(columns, metadata=metadata)


def to_row(session: Session) -> dict[str, Any]:
    """A session as the values of one Arrow row."""
    row: dict[str, Any] = {
        "session_id": session.session_id,
        "speaker_id": session.speaker_id,
        "corpus": session.corpus,
        "num_steps": session.num_steps,
        "step_seconds": session.step_seconds,
        "labels": session.labels.astype(np.int64),
    }
    for name, values in session.features.items():
        row[f"features.{name}"] = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        row[f"present.{name}"] = session.present[name].astype(np.bool_)
        if session.quality:
            row[f"quality.{name}"] = session.quality[name].astype(np.float32)
    return row


def check_steps(table: pa.Table) -> None:
    """Refuse rows without steps, and whose lists are not as long as these: one session's would be read as another's.

    Raises:
        UserError: naming the session and the column.
    """
    steps = table.column("num_steps").fill_null(0).to_numpy().astype(np.int64)
    if (steps < 1).any():
        raise UserError(f"session {table.column('session_id')[int(np.argmax(steps < 1))].as_py()!r} has no steps")
    lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
    for name in sorted(lists, key=lambda name: name.startswith("features.")):  # widths follow from sound numbers
        lengths = pc.call_function("list_value_length", [table.column(name)]).fill_null(0).to_numpy()
        width = int(lengths.sum()) // max(1, int(steps.sum())) if name.startswith("features.") else 1
        wrong = lengths != width * steps
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"session {table.column('session_id')[row].as_py()!r}: {name} has {lengths[row]} values, "
                f"expected {width} for each of its {steps[row]} steps"
            )


def from_table(table: pa.Table, index: int) -> Session:
    """Row ``index`` of a table with the schema above. Feature arrays are views of the table's memory."""
    row = table.slice(index, 1).combine_chunks()
    modalities = [name for name in MODALITIES if f"features.{name}" in table.column_names]

    def values(column: str) -> NDArray[Any]:
        return row.column(column).chunk(0).flatten().to_numpy(zero_copy_only=False)

    labels = values("labels")
    return Session(
        session_id=row.column("session_id")[0].as_py(),
        speaker_id=row.column("speaker_id")[0].as_py(),
        corpus=row.column("corpus")[0].as_py(),
        step_seconds=row.column("step_seconds")[0].as_py(),
        features={name: values(f"features.{name}").reshape(len(labels), -1) for name in modalities},
        present={name: values(f"present.{name}") for name in modalities},
        labels=labels,
        quality={name: values(f"quality.{name}") for name in modalities if f"quality.{name}" in table.column_names},
    )
