"""One process at a time on a study's folder; the second is told who is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from emolab.names import UserError
from emolab.sessions.manifest import write_atomically

LOCK = "study.lock"
HOLDER = "holder.json"


@contextmanager
def holding(folder: Path, *, what: str) -> Iterator[None]:
    """Hold a folder for the length of the block. The system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it; the message names its process id and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text() if holder.exists() else "unknown"
        raise UserError(f"the {what} in {folder} is in use by another process ({who})") from None
    try:
        write_atomically(holder, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
        yield
    finally:
        lock.release()
