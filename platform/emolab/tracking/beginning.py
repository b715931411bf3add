"""A folder's run is begun once, however often its process is killed before it could note the tracker's id of the run.

The tracker chooses the id, so there is always an instant at which it has begun a run that nobody has written down.
Therefore a key of our own is written down first; the run carries it as a tag, by which the next process finds it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emolab.sessions.manifest import canonical_json, write_atomically
from emolab.tracking.tracker import Run, Tracker

KEY_FILE = "run.key"


def begin_once(
    tracker: Tracker,
    folder: Path,
    identity: Mapping[str, Any],
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Run:
    """Begin the run that bears the folder's name, or go on with the one that a process before this one began.

    Args:
        identity: what the run is of. A run of the same folder that was begun for anything else is left alone.
    """
    return tracker.start(folder.name, parent=parent, tags=tags, key=_key(folder / KEY_FILE, identity))


def _key(file: Path, identity: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    if file.exists() and (known := file.read_text(encoding="utf-8")).startswith(f"{digest}-"):
        return known
    # Also random: a folder that was removed and made again is not the one whose run the tracker may still hold.
    key = f"{digest}-{secrets.token_hex(12)}"
    write_atomically(file, key.encode())
    return key
