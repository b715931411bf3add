"""Addresses of databases, and what databases say."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from emolab.redaction import redact


def sqlite_url(file: Path) -> str:
    """The address of a file, whatever its path is: a plain `?` or `%` in an address means something else."""
    return URL.create("sqlite", database=str(file.resolve())).render_as_string(hide_password=False)


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database; None for another database."""
    try:
        address = make_url(url)
    except ArgumentError:
        return None
    if address.get_backend_name() != "sqlite" or not address.database:
        return None
    return Path(address.database)


def in_memory(url: str) -> bool:
    """Whether an address is of an SQLite database that ends with its process, and that no other thread of it sees."""
    try:
        address = make_url(url)
    except ArgumentError:
        return False
    if address.get_backend_name() != "sqlite":
        return False
    return not address.database or ":memory:" in address.database or address.query.get("mode") == "memory"


def place_of(url: str) -> str:
    """Where a database is, however it is asked for: without user, password, driver and options."""
    file = sqlite_file(url)
    if file is not None:
        return str(file.resolve())
    try:
        address = make_url(url)
    except ArgumentError:
        return redact(url)
    place = URL.create(
        address.get_backend_name(),
        host=address.host,
        port=address.port,
        database=address.database,
        query={key: value for key, value in address.query.items() if key in ("host", "port")},
    )
    return place.render_as_string()


def message_of(error: BaseException) -> str:
    """What the database itself says, without the statement that it was asked to carry out."""
    said = next((each.orig for each in (error, error.__cause__) if isinstance(each, DBAPIError) and each.orig), error)
    return " ".join(str(said).split())[:200]
