"""An MLflow store in an SQLite file, which is there with all its tables or not at all.

MLflow makes the tables in dozens of migrations, each with transactions of its own. A process that is killed meanwhile
leaves a file that nobody can open, and of two processes that begin at once one fails.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.engine import make_url

from emolab.databases import sqlite_url
from emolab.names import UserError

_MAKING_SECONDS = 300.0
"""On a machine full of other work the migrations take minutes."""


def make_store(uri: str, artifacts: Path | None) -> None:
    """Make the file of an SQLite address, unless it is there; another process that makes it is waited for.

    Args:
        artifacts: folder of MLflow's default experiment; None: beside the file.

    Raises:
        UserError: another process has been making it for minutes.
    """
    name = make_url(uri).database
    if not name or name == ":memory:" or name.startswith("file:") or Path(name).exists():
        return
    database = Path(name).resolve()
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = database.with_name(f"{database.name}.lock")
    try:
        with FileLock(lock, timeout=_MAKING_SECONDS):
            if not database.exists():
                _make(database, artifacts or database.parent / "mlflow-artifacts")
    except Timeout:
        raise UserError(f"another process has been making {database} for long: end it, then run this again") from None


def _make(database: Path, artifacts: Path) -> None:
    unfinished = database.with_name(f".{database.name}.new")
    for leftover in database.parent.glob(f"{unfinished.name}*"):  # with its journal
        leftover.unlink()
    store = SqlAlchemyStore(sqlite_url(unfinished), artifacts.resolve().as_uri())
    store.engine.dispose()
    unfinished.replace(database)
