"""Where trackers are: the addresses that people give, and the files that some of them name."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.engine import make_url

from emolab.databases import sqlite_file
from emolab.names import UserError

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
"""What addresses of trackers begin with, before the driver that a database's may name. MLflow's folders of files are
not among them: it makes no new ones."""


def tracker_address(uri: str | None, *, key: str = "tracking.uri") -> str | None:
    """The configured address of a tracker, else MLFLOW_TRACKING_URI; None: the embedded one is meant.

    An SQLite file is named by its whole path, whatever the current folder of those who are told it.

    Args:
        key: that the address was given as, for the refusal.

    Raises:
        UserError: it cannot be one of a tracker. Nobody is asked whether there is one.
    """
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    configured = uri or variable
    if not configured or configured == "databricks" or configured.startswith("databricks://"):
        return configured or None
    scheme, _, rest = configured.partition(":")
    if scheme.partition("+")[0] not in _SCHEMES or not rest.strip("/"):
        named = f"{key if uri else 'MLFLOW_TRACKING_URI'}={configured}"
        raise UserError(
            f"{named} is no address of a tracker: use http://host:port, sqlite:///folder/mlflow.db or a database such "
            "as postgresql://user@host/name; null: a file in the output folder"
        )
    return _whole_path(configured)


def _whole_path(address: str) -> str:
    """The address with the whole path of an SQLite file: a worker's current folder is not the job's."""
    file = store_file(address)
    if file is None or file.is_absolute():
        return address
    return make_url(address).set(database=str(file.resolve())).render_as_string(hide_password=False)


def store_file(address: str) -> Path | None:
    """The file in which a tracker keeps its runs; None for a server, for another database, or for one in memory."""
    file = sqlite_file(address)
    return None if file is None or str(file) == ":memory:" or str(file).startswith("file:") else file
