"""Recorded sessions that the live page can replay, from the validation split: the test split is not for looking at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.names import UserError
from emolab.serving.models import LoadedModel
from emolab.sessions.manifest import read_manifest
from emolab.sessions.schema import Session
from emolab.sessions.selection import load_selection_split

MOST = 12


def recordings(data: str | None, loaded: LoadedModel) -> list[dict[str, Any]]:
    """The first sessions of a data set's validation split, as JSON; none without a data set.

    Raises:
        UserError: the data set is damaged, has no validation split, or does not fit the model.
    """
    if data is None:
        return []
    folder = Path(data)
    manifest = read_manifest(folder)
    loaded.check_fit(manifest, folder)
    store = load_selection_split(folder, manifest, "validation")
    if not len(store):
        raise UserError(f"{folder} has no validation sessions to replay")
    return [_as_json(store.session(index, manifest)) for index in range(min(MOST, len(store)))]


def _as_json(session: Session) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "step_seconds": session.step_seconds,
        "labels": [None if label == IGNORED_LABEL else int(label) for label in session.labels],
        "features": {
            name: [row.tolist() if seen else None for row, seen in zip(values, session.present[name], strict=True)]
            for name, values in session.features.items()
        },
    }
