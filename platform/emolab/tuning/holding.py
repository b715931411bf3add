"""One driver at a time on a study in a database that several output folders share; the second is told who is there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from emolab.databases import message_of, sqlite_file
from emolab.names import UserError

_LONGEST_NAME = 63
"""Bytes that PostgreSQL keeps of what a connection calls itself."""
_HOLDER = text(
    "select application_name from pg_stat_activity join pg_locks using (pid) where locktype = 'advisory' and granted "
    "and (classid::bigint << 32 | objid::bigint) = :key "
    "and database = (select oid from pg_database where datname = current_database()) limit 1"
)


@contextmanager
def holding_study(database: Path | str, name: str) -> Iterator[None]:
    """Hold a study for the length of the block. The system or the server lets go of it when the process ends.

    A database in the study's own folder is held with that folder. Of the databases that several folders share, SQLite
    files and PostgreSQL can tell that a study is held.

    Raises:
        UserError: another process holds it; the message says which. The database cannot be reached.
    """
    if isinstance(database, Path):
        yield
    elif (file := sqlite_file(database)) is not None:
        with _holding_file(file, name):
            yield
    elif database.startswith("postgresql"):
        with _holding_on_server(database, name):
            yield
    else:
        yield


def check_study_not_held(database: Path | str, name: str) -> None:
    """As ``holding_study``, where the study is only looked at: it and its database may not even be there.

    Raises:
        UserError: another process holds it. The database cannot be reached.
    """
    if isinstance(database, Path):
        return
    if (file := sqlite_file(database)) is not None:
        if _lock_file(file, name).exists():
            with _holding_file(file, name):
                pass
    elif database.startswith("postgresql"):
        with connected_to(database) as connection:
            holder = connection.execute(_HOLDER, {"key": _key(name)}).first()
        if holder is not None:
            raise _in_use(name, str(holder[0] or "unknown"))


@contextmanager
def connected_to(url: str) -> Iterator[Connection]:
    """A connection to a study's database, in which every statement is a transaction of its own.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        connection = engine.connect()
    except (SQLAlchemyError, ImportError) as error:
        raise UserError(f"the study's database {url} cannot be opened: {message_of(error)}") from None
    with connection:
        yield connection


def _lock_file(file: Path, name: str) -> Path:
    return file.with_name(f"{file.name}.{name}.lock")


@contextmanager
def _holding_file(file: Path, name: str) -> Iterator[None]:
    lock = FileLock(_lock_file(file, name))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(name, f"see who has {lock.lock_file} open") from None
    except OSError as error:
        raise UserError(f"the study's database {file} cannot be opened: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _holding_on_server(url: str, name: str) -> Iterator[None]:
    """An advisory lock of a connection that does nothing else."""
    key = _key(name)
    who = f"pid {os.getpid()} on {os.uname().nodename}"[:_LONGEST_NAME]
    with connected_to(url) as connection:
        if not _take(connection, key, who):
            raise _in_use(name, str(connection.execute(_HOLDER, {"key": key}).scalar() or "unknown"))
        yield


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)


def _take(connection: Connection, key: int, who: str) -> bool:
    connection.execute(text("select set_config('application_name', :who, false)"), {"who": who})
    return bool(connection.execute(text("select pg_try_advisory_lock(:key)"), {"key": key}).scalar())


def _in_use(name: str, who: str) -> UserError:
    return UserError(f"the study {name} is in use by another process ({who}): wait for its end, or end it")
