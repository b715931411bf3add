"""A folder's run is begun once, however often its process is killed before it could note the tracker's id of the run.

The tracker chooses the id, so there is always an instant at which it has begun a run that nobody has written down.
Therefore a key of our own is written down first; the run carries it as a tag, by which the next process finds it.
Once the run is described, the folder's record says which run it is.

A folder also remembers which code computed what it holds: a run that several calls made is tagged with the commits of
all of them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from emolab.names import UserError
from emolab.redaction import redact
from emolab.sessions.manifest import canonical_json, write_atomically
from emolab.tracking.provenance import CLEAN, COMMIT, code_version, together
from emolab.tracking.tracker import MissingRunError, Run, Tracker

KEY_FILE = "run.key"
CONFIGURATION = "config.yaml"
"""Artifact of every run of a job, and a file in a training's folder: the whole configuration."""
RECORD = "run.json"
"""In a run's folder: what the run is of, and which run of which tracker it is."""
CODE = "code.json"
"""In a run's folder: commit and cleanliness of the code of each call that computed, in order and each once."""


def folder_run(
    tracker: Tracker,
    folder: Path,
    identity: Mapping[str, Any],
    *,
    holds: str,
    describe: Callable[[Run], None] = lambda _: None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    computes: bool = True,
) -> Run:
    """The run of a folder: taken up again where it is recorded, else begun, described, and then recorded.

    A run that was deleted in the tracker is begun anew: the folder holds all that the tracker is told. The run says
    which code computed: its commit is known as clean only if that of every call was.

    Args:
        identity: plain values that say what the run is of; a folder belongs to one identity for ever.
        holds: what the folder holds where its identity is another one, for the refusal.
        parent: a run id. Where that one was begun anew, a run that goes on is moved below it.
        describe: writes what every run has from its beginning. May be called again, for a run whose process was killed
            before it was recorded.
        tags: beside those that say which code ran.
        computes: whether this call adds to what the folder holds; one that only finds it leaves no trace.

    Raises:
        UserError: the folder belongs to something else, or its record is damaged.
    """
    known = own_record(folder, identity, holds=holds)
    version = code_version()
    version |= _remembered(folder / CODE, version, computes=computes)
    if known is not None and known["tracker"] == redact(tracker.uri):
        with suppress(MissingRunError):
            run = tracker.resume(known["run_id"], parent=parent)
            if computes:
                run.set_tags(version)
                run.reopen()
            return run
    run = begin_once(tracker, folder, identity, parent=parent, tags=version | dict(tags or {}))
    run.set_tags(version)  # a process before this one may have begun it, and ended it
    run.reopen()
    describe(run)
    write_record(folder, {"identity": identity, "run_id": run.run_id, "tracker": redact(tracker.uri)})
    return run


def _remembered(file: Path, version: Mapping[str, str], *, computes: bool) -> dict[str, str]:
    """Tags of the code of all calls, this one among them if it computes: their commits, and whether all were clean."""
    try:
        known = [(str(commit), str(clean)) for commit, clean in json.loads(file.read_bytes())]
    except FileNotFoundError:
        known = []
    except (ValueError, TypeError):  # damaged: nobody knows any more
        known = [("unknown", "unknown")]
    ours = (version[COMMIT], version[CLEAN])
    if ours not in known and (computes or not known):
        known.append(ours)
        write_atomically(file, json.dumps(known).encode())  # before anything is computed
    return together([{COMMIT: commit, CLEAN: clean} for commit, clean in known])


def own_record(folder: Path, identity: Mapping[str, Any], *, holds: str) -> dict[str, Any] | None:
    """What a folder says of the run that is to go on in it; None where it has none yet.

    Raises:
        UserError: the folder belongs to something else, or its record is damaged.
    """
    known = read_record(folder)
    if known is not None and known["identity"] != identity:
        raise UserError(f"{folder} holds {holds}: choose another name, or move it away")
    return known


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its run; None where it has none yet.

    Raises:
        UserError: it is damaged.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        known, reason = None, str(error)
    else:
        reason = "not the record of a run"
    if not isinstance(known, dict) or not {"identity", "run_id", "tracker"} <= known.keys():
        raise UserError(
            f"{file} is damaged ({reason}): remove this file and run the same command again, which finds the run"
        )
    return known


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Say which run a folder's is."""
    write_atomically(folder / RECORD, json.dumps(content, indent=1).encode())


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
    if file.exists() and (known := file.read_text(encoding="utf-8", errors="replace")).startswith(f"{digest}-"):
        return known
    # Also random: a folder that was removed and made again is not the one whose run the tracker may still hold.
    key = f"{digest}-{secrets.token_hex(12)}"
    write_atomically(file, key.encode())
    return key
