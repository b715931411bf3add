"""One process at a time on a folder of results; the second is told who is there."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from emolab.names import UserError
from emolab.sessions.manifest import write_atomically

LOCK = "in-use.lock"
HOLDER = "holder.json"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system says that has no locks: some shared ones are mounted so, and a training there needs none."""


@contextmanager
def holding(folder: Path, *, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder for the length of the block. The system lets go of it when the process ends, however it ends.

    Args:
        what: the folder holds, for the refusal.
        patience: seconds to wait for a process that is expected to end.

    Raises:
        UserError: another process holds it; the message names its process id and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise _in_use(folder, what) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        sys.stderr.write(f"warning: {folder} cannot be locked ({error.strerror}): let one job at a time use it\n")
    try:
        write_atomically(holder, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode())
        yield
    finally:
        lock.release()


def check_not_held(folder: Path, *, what: str) -> None:
    """As ``holding``, where the folder is only looked at: it may not even be there.

    Raises:
        UserError: another process holds it.
    """
    if not (folder / LOCK).exists():
        return
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            pass
    except Timeout:
        raise _in_use(folder, what) from None
    except OSError:
        return  # it cannot be locked, of which ``holding`` warns or tells


def _in_use(folder: Path, what: str) -> UserError:
    holder = folder / HOLDER
    who = holder.read_text() if holder.exists() else "unknown"
    return UserError(f"the {what} in {folder} is in use by another process ({who}): wait for its end, or end it")
