"""What a tracker has been told and has not received yet, in an SQLite file that outlives its process.

Every writing process has a file of its own, so that no two hosts ever write one database over a shared folder. A lock
beside the file says that its process lives; the file of a dead one is taken over by the next that asks.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

Kind = Literal["begin", "parameters", "metrics", "tags", "file", "reopen", "finish"]

LOCAL = "local-"
"""How the id of a run begins that the tracker has not named yet."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (tracker TEXT NOT NULL, experiment TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (local TEXT PRIMARY KEY, remote TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, kind TEXT NOT NULL, content TEXT NOT NULL, refused TEXT
);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to tell the tracker."""

    number: int
    """Grows with time."""
    run: str
    """The tracker's id of a run, or a local one."""
    kind: Kind
    content: Mapping[str, Any]


class Outbox:
    """An ordered store of entries. All methods may be called from any thread."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self._access = threading.RLock()
        # Autocommit: every statement is durable against the death of the process when it returns.
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(_SCHEMA)

    @classmethod
    def create(cls, folder: Path, *, tracker: str, experiment: str) -> Outbox:
        """A fresh outbox of this process.

        Args:
            tracker: the tracker's address, without credentials.
            experiment: name of the experiment that takes what is begun here.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.uname().nodename}-{os.getpid()}-{os.urandom(3).hex()}.sqlite"
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire(timeout=0)
        outbox = cls(path, lock)
        outbox._database.execute("INSERT INTO about VALUES (?, ?)", (tracker, experiment))
        return outbox

    @classmethod
    def left_behind(cls, folder: Path, *, tracker: str) -> Iterator[Outbox]:
        """Outboxes for this tracker whose processes have ended, oldest first."""
        for path in sorted(folder.glob("*.sqlite"), key=lambda path: path.stat().st_mtime):
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if not path.exists():  # delivered by another process since it was listed
                lock.release()
                continue
            outbox = cls(path, lock)
            if outbox.about()[0] == tracker:
                yield outbox
            else:
                outbox.close()

    def about(self) -> tuple[str, str]:
        """Address of the tracker and name of the experiment; empty where the process died before it said so."""
        return self._database.execute("SELECT tracker, experiment FROM about").fetchone() or ("", "")

    def add(self, run: str, kind: Kind, content: Mapping[str, Any]) -> None:
        """Append an entry."""
        with self._access:
            self._database.execute(
                "INSERT INTO entries (run, kind, content) VALUES (?, ?, ?)", (run, kind, json.dumps(content))
            )

    def add_file(self, run: str, path: Path, folder: str | None) -> None:
        """Append a copy of a file or folder, as it is now."""
        kept = self._new_file(path.name)
        if path.is_dir():
            shutil.copytree(path, kept)
        else:
            shutil.copyfile(path, kept)
        self.add(run, "file", {"path": str(kept.relative_to(self._files)), "folder": folder})

    def add_text(self, run: str, text: str, name: str) -> None:
        """Append a text that becomes the file ``name`` (with folders, where it has any)."""
        kept = self._new_file(Path(name).name)
        kept.write_text(text)
        folder = str(Path(name).parent)
        self.add(run, "file", {"path": str(kept.relative_to(self._files)), "folder": None if folder == "." else folder})

    def file(self, entry: Entry) -> Path:
        """Where the copy lies that a "file" entry names."""
        return self._files / entry.content["path"]

    def waiting(self, *, most: int = 500) -> Sequence[Entry]:
        """The next entries: files last, so that a store for them that is out of order holds up nothing else."""
        with self._access:
            rows = self._database.execute(
                "SELECT id, run, kind, content FROM entries WHERE refused IS NULL ORDER BY kind = 'file', id LIMIT ?",
                (most,),
            ).fetchall()
        return [Entry(number=row[0], run=row[1], kind=row[2], content=json.loads(row[3])) for row in rows]

    def count(self) -> int:
        """How many entries wait."""
        with self._access:
            return self._database.execute("SELECT COUNT(*) FROM entries WHERE refused IS NULL").fetchone()[0]

    def received(self, entries: Sequence[Entry]) -> None:
        """Forget what the tracker has."""
        with self._access:
            self._database.executemany("DELETE FROM entries WHERE id = ?", [(entry.number,) for entry in entries])
        for entry in entries:
            if entry.kind == "file":
                shutil.rmtree(self.file(entry).parent, ignore_errors=True)

    def refused(self, entries: Sequence[Entry], reason: str) -> None:
        """Keep what the tracker will never take out of the way, with its reason."""
        with self._access:
            self._database.executemany(
                "UPDATE entries SET refused = ? WHERE id = ?", [(reason, entry.number) for entry in entries]
            )

    def refusals(self) -> list[str]:
        """What the tracker will never take, a line for each."""
        with self._access:
            rows = self._database.execute("SELECT run, kind, refused FROM entries WHERE refused IS NOT NULL").fetchall()
        return [f"{kind} of run {run}: {reason}" for run, kind, reason in rows]

    def name_run(self, local: str, remote: str) -> None:
        """Remember the tracker's id of a run that was begun here."""
        with self._access:
            self._database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (local, remote))

    def remote(self, local: str) -> str | None:
        """The tracker's id of a run that was begun here, once it has one."""
        with self._access:
            row = self._database.execute("SELECT remote FROM runs WHERE local = ?", (local,)).fetchone()
        return row[0] if row else None

    def close(self) -> None:
        """Let go of the file; one that holds nothing is removed."""
        with self._access:
            empty = not self._database.execute("SELECT COUNT(*) FROM entries").fetchone()[0]
            self._database.close()
            if empty:
                shutil.rmtree(self._files, ignore_errors=True)
                for suffix in (".sqlite", ".sqlite-wal", ".sqlite-shm"):
                    self.path.with_suffix(suffix).unlink(missing_ok=True)
            self._lock.release()
            if empty:
                self.path.with_suffix(".lock").unlink(missing_ok=True)

    @property
    def _files(self) -> Path:
        return self.path.with_suffix(".files")

    def _new_file(self, name: str) -> Path:
        folder = self._files / os.urandom(6).hex()
        folder.mkdir(parents=True)
        return folder / name


def addressees(folder: Path) -> set[str]:
    """Addresses of the trackers that outboxes in a folder are for."""
    found: set[str] = set()
    for path in folder.glob("*.sqlite"):
        with closing(sqlite3.connect(path)) as database:
            found |= {row[0] for row in database.execute("SELECT tracker FROM about")}
    return found


def new_local_id() -> str:
    """An id for a run that the tracker has not named yet."""
    return LOCAL + os.urandom(16).hex()


def now_milliseconds() -> int:
    """The time as a tracker counts it."""
    return int(time.time() * 1000)


@contextmanager
def adopted(folder: Path, *, tracker: str) -> Iterator[list[Outbox]]:
    """The outboxes that dead processes left behind, held for the block."""
    found = list(Outbox.left_behind(folder, tracker=tracker))
    try:
        yield found
    finally:
        for outbox in found:
            outbox.close()
