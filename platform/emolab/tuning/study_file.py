"""Whether the file of a study is what its search left there; damage is told before anything reads or writes it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from emolab.names import UserError
from emolab.tracking.beginning import RECORD


def check_study_file(path: Path) -> None:
    """Refuse a file that is no SQLite database any more; it stays as it is.

    Raises:
        UserError: it is damaged, and how.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise UserError(f"the study's database {path} cannot be opened: it is a folder, choose another file")
    if not path.stat().st_size:
        if (
            path.parent / RECORD
        ).exists():  # written after the study's first transaction, before which a kill is no damage
            raise UserError(damaged(path, "the file is empty"))
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        return  # locked, or not to be read: opening it says so
    except sqlite3.DatabaseError as error:
        raise UserError(damaged(path, str(error))) from None
    if found != "ok":
        raise UserError(damaged(path, " ".join(str(found).split())[:100]))


def damaged(path: Path, how: str) -> str:
    """What to tell of a file that cannot be used as it is, and what to do."""
    away = f"its folder {path.parent}" if (path.parent / RECORD).exists() else "it"
    return (
        f"the study's database {path} cannot be opened, it is damaged ({how}): put a copy of it back, or move {away} "
        "away and run the same command to begin anew"
    )
